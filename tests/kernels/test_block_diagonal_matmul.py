import pytest
import torch

from recast.kernels.block_diagonal_matmul.reference import block_diagonal_matmul, block_diagonal_to_dense
from tests.helpers import assert_close


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 4, 2), (8, 1, 3)], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)], ids=str)
def test_agrees_with_the_dense_product(shape: tuple[int, int, int], batch: tuple[int, ...]) -> None:
    b, _, q = shape
    blocks = torch.randn(shape, dtype=torch.float64)
    dense = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    assert torch.equal(block_diagonal_to_dense(blocks), dense)
    x = torch.randn(*batch, b * q, dtype=torch.float64)
    assert_close(block_diagonal_matmul(x, blocks), x @ dense.T, terms=q)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 5 features, 2 blocks of 3 take 6"):
        block_diagonal_matmul(torch.ones(5), torch.ones(2, 4, 3))
