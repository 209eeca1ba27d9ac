"""The `torch.compile` backend, on models small enough to compile in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recast.backend
from recast.lowering.inductor.weight_only import PACKED, ROUNDED
from recast.passes.cache import OperatorCache
from recast.patterns.errors import RecipeError
from tests.helpers import assert_close


class Block(nn.Module):
    """Packed projection, a product with a constant on the left, and perhaps a graph break between them."""

    def __init__(self, width: int = 32, broken: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.out = nn.Linear(width, width)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 4, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.broken:
            torch._dynamo.graph_break()
        return self.out(y + (self.mix @ y.transpose(1, 2)).transpose(1, 2))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    recast.backend.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    recast.backend.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="recast", options=options)


def replaced(model: Block, form: str) -> Block:
    """The model with every matrix replaced by what the form's operator stands for."""
    import copy

    other = copy.deepcopy(model)
    asked = recast.Form.parse(form)
    for weight in (other.qkv.weight, other.out.weight, other.mix):
        weight.copy_(asked.fit(weight).to_dense())
    return other


def test_graphs_are_rewritten_for_several_shapes_with_one_fit_each() -> None:
    model = Block().eval()
    run = compiled(model, recipe="low_rank(ratio=0.5)")
    wanted = replaced(model, "low_rank(ratio=0.5)")
    for shape in ((2, 5, 32), (3, 7, 32), (4, 4, 32)):  # the last: as many tokens as heads
        x = torch.randn(shape)
        assert_close(run(x), wanted(x), terms=64 * 32)
    reports = recast.backend.reports()
    assert len(reports) == 2  # the first shape, then one graph for all
    assert [row.name for row in reports[0].rows] == ["qkv", "mix", "out"]
    assert recast.backend._cache().fits == 3


def test_dense_memory_is_released_and_another_shape_still_compiles() -> None:
    model = Block().eval()
    wanted = replaced(model, "int8")
    inputs = [torch.randn(2, 5, 32), torch.randn(3, 7, 32)]
    expected = [wanted(x) for x in inputs]
    run = compiled(model, recipe="int8", release_dense=True)
    for x, y in zip(inputs, expected, strict=True):
        assert_close(run(x), y, terms=64 * 32)
    assert model.qkv.weight.untyped_storage().nbytes() == 0
    assert model.qkv.bias.untyped_storage().nbytes() > 0


def test_each_graph_between_breaks_is_rewritten() -> None:
    model = Block(broken=True).eval()
    x = torch.randn(2, 5, 32)
    assert_close(compiled(model, recipe="int8")(x), replaced(model, "int8")(x), terms=64 * 32)
    assert sorted(row.name for report in recast.backend.reports() for row in report.rows) == ["mix", "out", "qkv"]


def test_two_models_with_the_same_graph_keep_their_own_weights() -> None:
    x = torch.randn(2, 5, 32)
    for freezing in (False, True):
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = Block().eval()
            assert_close(
                compiled(model, recipe="int8", freezing=freezing)(x), replaced(model, "int8")(x), terms=64 * 32
            )
            torch._dynamo.reset()  # the second model then meets the first one's entries in Inductor's caches


def test_weights_changed_in_place_are_fitted_anew() -> None:
    model = Block().eval()
    x = torch.randn(2, 5, 32)
    compiled(model, recipe="int8")(x)
    model.out.weight.mul_(2)
    torch._dynamo.reset()
    assert_close(compiled(model, recipe="int8")(x), replaced(model, "int8")(x), terms=64 * 32)


def test_fitted_operators_are_found_on_disk_by_the_next_process() -> None:
    model = Block().eval()
    compiled(model, recipe="int8")(torch.randn(2, 5, 32))
    torch._dynamo.reset()
    recast.backend.reset()  # forgets what is in memory
    compiled(model, recipe="int8")(torch.randn(2, 5, 32))
    cache: OperatorCache = recast.backend._cache()
    assert cache.fits == 0
    assert cache.hits >= 3


def test_a_plan_and_statistics_of_the_whole_model_serve_its_graphs() -> None:
    model = Block(broken=False).eval()
    batches = [torch.randn(4, 6, 32) for _ in range(3)]
    program = recast.capture(model, (batches[0],))
    statistics = recast.calibrate(program, batches)
    plan = recast.plan(program, {"rules": [{"match": "qkv.k", "form": "low_rank(rank=4)"}]}, statistics)
    assert list(plan.entries) == ["qkv.k"]
    rewritten = recast.rewrite(program, plan)
    run = compiled(model, plan=plan, calibration=statistics)
    x = torch.randn(2, 5, 32)
    assert_close(run(x), rewritten(x), terms=64 * 32)
    assert recast.backend.reports()[0].rows[0].measured_error is not None


def test_too_little_coverage_fails_with_the_misses() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 1)).eval()
    with pytest.raises(Exception, match="a convolution with a kernel of 3, not 1x1"):
        compiled(model, recipe="int8", min_coverage=0.9)(torch.randn(2, 4, 9))


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)).train()
    with pytest.raises(Exception, match=r"call model\.eval\(\)"):
        compiled(model, recipe="int8")(torch.randn(2, 32))


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(Exception, match="did you mean 'recipe'"):
        compiled(Block().eval(), recipee="int8")(torch.randn(2, 5, 32))


@pytest.mark.parametrize("share", [2, -0.1, "half", True])
def test_a_share_beyond_one_is_refused(share: object) -> None:
    with pytest.raises(recast.RecastError, match="a share from 0 to 1 would work"):
        recast.backend.Options.of({"min_coverage": share})


@pytest.mark.parametrize(("level", "kernel"), [(0, PACKED), (4, ROUNDED)])
def test_few_tokens_may_be_rounded(level: int, kernel: str) -> None:
    options = {"recipe": "int4(group=32)", "accuracy_level": level}
    model = nn.Linear(64, 48).eval()
    compiled, x = torch.compile(model, backend="recast", options=options), torch.randn(2, 64)
    with torch.no_grad():
        gap = (compiled(x) - model(x)).norm() / model(x).norm()
    assert [row.kernel for row in recast.backend.reports()[0].rows] == [kernel]
    assert gap < 0.2
    with pytest.raises(RecipeError, match=r"accuracy_level is 2; 0 \(exact\) or 4"):
        recast.backend.Options.of({"accuracy_level": 2})


def test_gradients_reach_the_input() -> None:
    model = Block().eval()
    other = replaced(model, "low_rank(ratio=0.5)")
    x = torch.randn(2, 5, 32)
    with torch.enable_grad():
        found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(model, recipe="low_rank(ratio=0.5)")(found).square().sum().backward()
        other(wanted).square().sum().backward()
    assert found.grad is not None
    assert wanted.grad is not None
    assert_close(found.grad, wanted.grad, terms=64 * 32 * 16)


def test_the_backend_is_found_without_importing_recast() -> None:
    code = "import torch, torch._dynamo as d; assert 'recast' in d.list_backends(None), d.list_backends(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_ONCE = """
import json, sys
import torch
from torch._dynamo.utils import counters

torch.manual_seed(int(sys.argv[1]))
model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)).eval()
x = torch.randn(5, 32)
with torch.no_grad():
    y = torch.compile(model, backend="recast", options={"recipe": "int8"})(x)
    error = float((y - model(x)).norm() / model(x).norm())
found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
print(json.dumps({"error": error, **found}))
"""


def test_compiled_code_is_shared_between_processes_but_never_another_models_weights(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "RECAST_CACHE": str(tmp_path / "cache")}

    def once(seed: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", _ONCE, seed], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first, other = once("0"), once("1")
    assert (first["hit"], first["miss"]) == (0, 1)
    assert (other["hit"], other["miss"]) == (1, 0)
    # Two layers rounded to 8 bits: far from what another model's weights would give, which is an error about 1.
    assert max(first["error"], other["error"]) < 0.03
