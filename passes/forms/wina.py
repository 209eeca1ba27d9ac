"""Gating by how much an input moves the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast.passes.forms.gated import Gating

__all__ = ["Wina"]


@dataclass(frozen=True)
class Wina(Gating):
    """``y = W_:,K x_K``, K of each token the inputs of the largest ``|x_j| ‖W_:,j‖``.

    Needs no data. For a weight with orthogonal columns no other K of that size has a smaller error: ``‖W x - W_:,K x_K‖²`` is
    then the sum of the squared scores that are left out.

    Notes
    -----
    Chen et al., WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (2025), without the
    rotation that makes columns orthogonal.

    Examples
    --------
    >>> import torch
    >>> operator = Wina(0.5).fit(torch.tensor([[3.0, 1.0]]))
    >>> operator.apply(torch.tensor([[1.0, 2.0], [1.0, 4.0]])).tolist()  # scores 3, 2 and 3, 4
    [[3.0], [4.0]]
    """

    name: ClassVar[str] = "wina"
    summary: ClassVar[str] = "each token reads the columns of its largest inputs, weighed by the columns' norms"
    weighted: ClassVar[bool] = True
