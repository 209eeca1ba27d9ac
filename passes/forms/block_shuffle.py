"""BlockShuffle: the Monarch structure as feed-forward layers are built from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from recast.passes.forms.monarch import Monarch

__all__ = ["BlockShuffle"]


@dataclass(frozen=True)
class BlockShuffle(Monarch):
    """W x ≈ f⁻¹(U f(V x)): V and U block-diagonal, f the shuffle that deals out the features of each block to all.

    The same matrices as `Monarch`, and the same fit; two blocks unless said otherwise, and the inner width min(m, n)
    unless a rank is given: (in² + in out) / (2 in out) of the parameters where a layer widens, 62.5 % from h to 4h.

    Notes
    -----
    Wei et al., Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers (2024).

    Examples
    --------
    >>> import torch
    >>> BlockShuffle().fit(torch.randn(64, 16)).nbytes / (64 * 16 * 4)
    0.625
    """

    name: ClassVar[str] = "block_shuffle"
    summary: ClassVar[str] = "two block-diagonal matrices with a shuffle between, two blocks by default"

    blocks: int = field(default=2, metadata={"help": "blocks of each factor; must divide both sizes"})
