"""A model of your own: rewritten for torch.compile and for ONNX Runtime from one plan.

python examples/own_module.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import recast


class Mixer(nn.Module):
    """Two ways of writing a product, one packed weight."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 4 * width)
        self.down = nn.Parameter(torch.randn(2 * width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return x + (nn.functional.silu(gate) * up) @ self.down


def main() -> None:
    """Plan once, run everywhere."""
    torch.manual_seed(0)
    model = Mixer().eval()
    x = torch.randn(4, 16, 128)
    batches = [torch.randn(8, 16, 128) for _ in range(4)]

    program = recast.capture(model, (x,))
    print(recast.coverage(program))
    statistics = recast.calibrate(program, batches)
    recipe = {
        "default": "int8",
        "rules": [
            {"match": "gate_up.up", "form": "low_rank(ratio=0.6) | int8"},
            {"match": "gate_up.gate", "form": "int8"},
        ],
    }
    plan = recast.plan(program, recipe, statistics)
    rewritten = recast.rewrite(program, plan)
    print(rewritten.report)

    with torch.no_grad():
        compiled = torch.compile(model, backend="recast", options={"plan": plan, "calibration": statistics})
        print("torch.compile:", (compiled(x) - rewritten(x)).abs().max().item())
    with tempfile.TemporaryDirectory() as folder:
        recast.lower(rewritten, target="onnx").save(Path(folder) / "mixer")
        loaded = recast.load(Path(folder) / "mixer")
        print("ONNX Runtime: ", (loaded(x) - rewritten(x)).abs().max().item())


if __name__ == "__main__":
    main()
