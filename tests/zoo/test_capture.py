"""Architectures that plain `torch.export` does not capture: capture does, and the program gives what the model gives."""

import warnings

import pytest
import torch

from recast.patterns.capture.export import capture
from tests import zoo
from tests.zoo.compare import gap, tensors

# By what stands in the way: loops over the experts that were hit, truths asked of values, ways kept for compilers.
# The coverage benchmark runs all of them.
QUICK = ("fsmt",)
SLOW = ("dbrx", "nllb-moe")


@pytest.mark.parametrize("name", [*QUICK, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_captured_where_plain_export_fails(name: str) -> None:
    model, args, kwargs = zoo.build(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception):  # noqa: B017, PT011  # torch raises many classes here
            torch.export.export(model, args, kwargs, strict=False)
    program = capture(model, args, kwargs)
    assert not any("shapes only" in note for note in program.notes)
    for batch, length in [(2, 10), (1, 12), (3, 13)]:
        args, kwargs = zoo.vary(model, batch, length, seed=batch)
        with torch.no_grad():
            expected = tensors(model(*args, **kwargs))
            assert gap(tensors(program(*args, **kwargs)), expected) == "", (batch, length)
