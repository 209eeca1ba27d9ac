"""What is read of a file of data, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recast.data import read_batches
from recast.models import Model


@pytest.fixture
def model() -> Model:
    return Model(
        "a linear", "function", "pytorch", 32, torch.nn.Linear(3, 2).eval(), kwargs={"input": torch.zeros(2, 3)}
    )


def tensors(path: Path, x: torch.Tensor) -> Path:
    save_file({"input": x}, path)
    return path


def lines(path: Path, x: torch.Tensor) -> Path:
    path.write_text("\n".join(json.dumps({"input": row}) for row in x.tolist()))
    return path


@pytest.mark.parametrize(("write", "name"), [(tensors, "x.safetensors"), (lines, "x.jsonl")])
@pytest.mark.parametrize(("limit", "rows"), [(5, 5), (11, 11), (12, 11), (None, 11)])
def test_the_first_rows_are_read_and_the_rest_is_told(
    write: Any, name: str, limit: int | None, rows: int, model: Model, tmp_path: Path
) -> None:
    x, said = torch.randn(11, 3), list[str]()
    file = write(tmp_path / name, x)
    batches = read_batches(file, model, batch_size=4, limit=limit, say=said.append)
    assert torch.allclose(torch.cat([batch["input"] for batch in batches]), x[:rows], rtol=1e-6)
    assert said == ([f"the first 5 of 11 rows of '{file}' are used; --limit 11 would use all"] if limit == 5 else [])
