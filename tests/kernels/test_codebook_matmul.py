import numpy as np
import pytest
import torch

from recast.kernels.codebook_matmul import reference
from recast.kernels.quantized_matmul.reference import pack_codes, pack_int4, packed_bytes, unpack_codes
from tests.helpers import assert_close


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 3, 8, 17])
def test_codes_come_back_and_take_the_bytes_that_are_counted(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (5, n))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, packed_bytes(n, bits))
    # Planes end at bytes, so that at most one byte a plane is not full.
    assert packed.shape[1] <= n * bits / 8 + bits.bit_count()
    assert torch.equal(unpack_codes(packed, bits, n).long(), codes)
    if bits == 4:
        assert torch.equal(packed, pack_int4(codes))


def test_bits_that_cannot_be_packed_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 would work"):
            pack_codes(torch.zeros(1, 1), bits)


def test_lookup_takes_each_block_from_its_own_table() -> None:
    rows, columns, bits, dim, m, n = 2, 3, 2, 2, 6, 11
    table = torch.randn(rows, columns, 2**bits, dim, dtype=torch.float64)
    pieces = -(-n // dim)
    codes = torch.randint(0, 2**bits, (m, pieces))
    scale = torch.randn(m, 3, dtype=torch.float64)
    expected = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            piece = j // dim
            entry = table[i * rows // m, piece * columns // pieces, codes[i, piece], j % dim]
            expected[i, j] = entry * scale[i, j // 4]
    found = reference.lookup(pack_codes(codes, bits), table, scale, bits=bits, group=4, features=n)
    assert_close(found, torch.from_numpy(expected))


def test_nearest_is_nearest() -> None:
    table, numbers = torch.randn(16, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64) * 2
    expected = np.abs(numbers.numpy()[..., None] - table.numpy()).argmin(-1)
    assert torch.equal(reference.nearest_codes(numbers, table), torch.from_numpy(expected))


def test_coded_scales_are_near_in_each_block() -> None:
    scale = torch.rand(5, 131, dtype=torch.float64) * torch.logspace(0, 2, 5).unsqueeze(1)
    codes, step, mean = reference.code_scales(scale)
    assert codes.shape == scale.shape
    assert step.shape == (3,)  # 655 scales in blocks of 256
    found = reference.decode_scales(codes, step, mean).numpy().reshape(-1)
    flat = scale.numpy().reshape(-1)
    for block in range(3):
        part = slice(256 * block, 256 * (block + 1))
        largest = np.abs(flat[part] - flat.mean()).max()
        assert np.abs(found[part] - flat[part]).max() <= largest / 127 / 2 * (1 + 1e-9)
