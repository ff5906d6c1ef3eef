from __future__ import annotations

import pytest
import torch

from lowrank_compress.calibration.moments import STATISTICS, SUMS, row_sums_of_squared_gradients


@pytest.mark.parametrize(
    ("sequences", "length", "inner", "out"),
    [(3, 4, 40, 30), (3, 50, 8, 6), (1, 1, 5, 7), (2, 6, 1, 9), (2, 6, 12, 12)],
)
def test_row_sums_without_forming_the_gradient(sequences: int, length: int, inner: int, out: int) -> None:
    """Short sequences take one way, long ones the other: both are the definition."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, length, inner, generator=generator, dtype=torch.float64)
    g = torch.randn(sequences, length, out, generator=generator, dtype=torch.float64)
    expected = torch.zeros(out, dtype=torch.float64)
    for sequence in range(sequences):
        gradient = sum(torch.outer(g[sequence, t], x[sequence, t]) for t in range(length))
        expected += (gradient**2).sum(1)  # pyright: ignore
    torch.testing.assert_close(row_sums_of_squared_gradients(x, g), expected, rtol=1e-12, atol=0)


def test_every_statistic_has_a_sum() -> None:
    assert SUMS.keys() == STATISTICS.keys()
    assert all(STATISTICS[name].name == name for name in STATISTICS)
    # The input alone decides what may be shared, so nothing with gradients is.
    assert not any(statistic.shared and statistic.gradient for statistic in STATISTICS.values())
