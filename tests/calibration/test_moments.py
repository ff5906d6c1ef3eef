from __future__ import annotations

import pytest
import torch

from lowrank_compress.arch.spec import Role
from lowrank_compress.arch.targets import Heads, Rows, Target, View
from lowrank_compress.calibration.moments import PANEL, Moments, add_second, mirror, turned
from lowrank_compress.calibration.statistics import LIKENESS, STATISTICS
from lowrank_compress.calibration.sums import PEAKS, ROWS, SUMS, Seen, row_sums_of_squared_gradients
from lowrank_compress.errors import InputError, NumericsError

HEADS = Heads(query=6, key=2, size=4, rotary=4)


def target_of(role: Role) -> Target:
    rows = {"q": 24, "k": 8, "v": 8}.get(role, 10)
    return Target(
        name=f"m.{role}",
        block=0,
        parameter=f"m.{role}.weight",
        view=View(Rows(1, rows, 0, rows)),
        bias=None,
        role=role,
        group="qk",
        shape=(rows, 10),
        reads="attn",
        heads=HEADS if role in ("q", "k", "v", "o") else None,
    )


def seen_of(target: Target) -> Seen:
    generator = torch.Generator().manual_seed(0)
    x, y, z, g = (
        torch.randn(2, 5, size, generator=generator, dtype=torch.float64)
        for size in (10, target.shape[0], target.shape[0], target.shape[0])
    )
    weight = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return Seen(x, y, z, g, g @ weight, target.heads)


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
    # How alike experts are is taken of all of them at once.
    assert SUMS.keys() | ROWS.keys() | PEAKS.keys() | {LIKENESS} == STATISTICS.keys()
    assert not SUMS.keys() & ROWS.keys()
    assert all(STATISTICS[name].name == name for name in STATISTICS)
    # The input alone decides what may be shared, so nothing with gradients is.
    assert not any(statistic.shared and statistic.gradient for statistic in STATISTICS.values())
    assert all(statistic.roles is None or statistic.roles for statistic in STATISTICS.values())


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "up"])
def test_shapes_are_said_beforehand(role: Role) -> None:
    target = target_of(role)
    for name, statistic in STATISTICS.items():
        if statistic.fits(role):
            moments = Moments((target,), {target.name: frozenset({name})})
            moments.add(target, seen_of(target), gradient=statistic.gradient)
            (value,) = moments.means(tokens=10, losses=8).values()
            assert value.shape == statistic.shape(target), name
            assert value.numel() == statistic.elements(target), name
    assert STATISTICS["out_gram"].shape(target) == (target.shape[0],) * 2


def test_shapes_by_head() -> None:
    shapes = {role: STATISTICS["head_gram"].shape(target_of(role)) for role in ("q", "k", "v")}
    assert shapes == {"q": (6, 4, 4), "k": (2, 4, 4), "v": (2, 4, 4)}
    assert STATISTICS["score_fisher"].shape(target_of("q")) == (2, 4, 4)


@pytest.mark.parametrize("size", [3, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_second_moments_in_panels(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(tokens, size, generator=generator) for tokens in (5, 2)]
    total = torch.zeros(size, size, dtype=torch.float64)
    for part in parts:
        add_second(total, part)
    mirror(total)
    expected = sum(part.double().T @ part.double() for part in parts)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)
    assert torch.equal(total[:PANEL, PANEL:], total[PANEL:, :PANEL].T)


@pytest.mark.parametrize(("statistic", "role"), [("head_gram", "o"), ("head_fisher", "up"), ("score_fisher", "k")])
def test_what_a_target_has_not(statistic: str, role: Role) -> None:
    target = target_of(role)
    with pytest.raises(
        InputError, match=rf"{statistic} \(.*\) is taken of q.* only, but wanted of m.{role} \({role}\)"
    ):
        Moments((target,), {target.name: frozenset({statistic})})


@pytest.mark.parametrize("statistic", [name for name, found in STATISTICS.items() if found.fits("q")])
def test_what_is_not_finite_is_an_error(statistic: str) -> None:
    target = target_of("q")
    seen = seen_of(target)
    for values in (seen.x, seen.y, seen.z, seen.g, seen.delta):
        assert values is not None
        values[1, 3, 2] = float("nan")
    moments = Moments((target,), {target.name: frozenset({statistic})})
    with pytest.raises(NumericsError, match=r"of m\.q is not finite on the calibration data"):
        moments.add(target, seen, gradient=STATISTICS[statistic].gradient)
    with pytest.raises(NumericsError, match="The influence of a block is not finite"):
        moments.add_influence(seen.x, torch.ones_like(seen.x), None)


def test_turned() -> None:
    before = torch.tensor([[1.0, 0, 0], [1, 2, 3], [1, 2, 3], [0, 0, 0], [3e38, 0, 0], [1e-40, 0, 0]])
    after = torch.tensor([[0.0, 2, 0], [2, 4, 6], [-1, -2, -3], [1, 2, 3], [3e38, 3e38, 0], [1e-40, 0, 0]])
    found = turned(before, after)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([1, 0, 2, 0, 1 - 0.5**0.5, 0], dtype=torch.float64))
    assert turned(torch.full((1, 3), float("nan")), torch.ones(1, 3)).isnan().all()


def test_influence_is_a_mean_over_real_tokens() -> None:
    moments = Moments((), {})
    ones, other = torch.ones(1, 3, 2), torch.tensor([[[1.0, 1.0], [1.0, -1.0], [float("nan"), 0.0]]])
    moments.add_influence(ones, other, torch.tensor([[1, 1, 0]]))
    moments.add_influence(ones, -ones, None)
    torch.testing.assert_close(
        moments.means(tokens=5, losses=1), {"influence": torch.tensor([(0 + 1 + 2 * 3) / 5], dtype=torch.float64)}
    )
