"""A folded triangle holds what the square one does, in half of the numbers."""

import pytest
import torch

from lowrank_compress.linalg.triangle import packed, unpacked


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_triangle_comes_back(size: int) -> None:
    lower = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).tril()
    rectangle = packed(lower)
    assert rectangle.shape == ((size + 1) // 2, size + 1)
    assert rectangle.numel() - lower.count_nonzero() in (0, (size + 1) // 2)
    torch.testing.assert_close(unpacked(rectangle), lower, rtol=0, atol=0)
