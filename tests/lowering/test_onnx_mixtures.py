"""Mixtures of experts in ONNX: grouped products in standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.moe  # registers its operation
from torch import Tensor, nn

import recast
from tests.helpers import assert_close


class Grouped(nn.Module):
    """Rows in runs, some of them empty, times a stack of matrices."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.weight = nn.Parameter(torch.randn(4, 24, 16) if turned else torch.randn(4, 16, 24))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight.transpose(1, 2) if self.turned else self.weight
        y: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
        return y


@pytest.mark.parametrize("turned", [False, True])
def test_runs_of_rows_meet_their_matrices(turned: bool) -> None:
    torch.manual_seed(0)
    model = Grouped(turned).eval()
    ends = torch.tensor([2, 2, 5, 8], dtype=torch.int32)
    x = torch.randn(8, 16)
    program = recast.capture(model, (x, ends))
    artifact = recast.lower(program, "onnx")
    for cuts in ([2, 2, 5, 8], [0, 0, 0, 8], [8, 8, 8, 8], [1, 3, 6, 8]):
        ends = torch.tensor(cuts, dtype=torch.int32)
        weight = model.weight.transpose(1, 2) if turned else model.weight
        starts = [0, *cuts[:-1]]
        expected = torch.cat(
            [x[a:b].double() @ weight[e].double() for e, (a, b) in enumerate(zip(starts, cuts, strict=True))]
        )
        assert_close(artifact(x, ends), expected.detach(), terms=16)


@pytest.mark.parametrize("recipe", ["dense", "int8"])
def test_a_mixture_with_its_experts_as_they_are(recipe: str, tmp_path: Path) -> None:
    config: Any = transformers.MixtralConfig(
        vocab_size=60, hidden_size=36, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits

    program = recast.capture(Logits().eval(), (torch.randint(0, 60, (2, 7)),))
    rewritten = recast.rewrite(program, recast.plan(program, recipe))
    artifact = recast.lower(rewritten, "onnx")
    artifact.save(tmp_path / "saved")
    loaded = recast.load(tmp_path / "saved")
    for shape in ((2, 7), (1, 1), (3, 5)):
        ids = torch.randint(0, 60, shape)
        with torch.no_grad():
            assert_close(artifact(ids), rewritten(ids), terms=36 * 8, factor=8)
        assert torch.equal(loaded(ids), artifact(ids))
