from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation import block_influence, uniform
from lowrank_compress.allocation.block_influence import removed_elements
from lowrank_compress.allocation.curve import Curve, stored_total
from lowrank_compress.errors import InputError
from tests import reference
from tests.allocation.curves import STORAGES, random_curves, ranked, some_limit

laws = settings(deadline=None, derandomize=True)
temperatures = st.sampled_from([None, 0.01, 0.1, 3.0])


def fine(name: str, block: int, influence: float, size: int = 1000) -> Curve:
    """A curve that can store any number of elements."""
    return ranked(name, np.arange(1, size + 1), np.linspace(1, 0, size), block=block, influence=influence)


def blocks_of(curves: list[Curve]) -> list[list[Curve]]:
    return [[curve for curve in curves if curve.block == block] for block in sorted({curve.block for curve in curves})]


def shares_kept(curves: list[Curve], choice: np.ndarray) -> list[float]:
    """The kept share of each block."""
    kept = []
    for block in sorted({curve.block for curve in curves}):
        own = [(curve, point) for curve, point in zip(curves, choice, strict=True) if curve.block == block]
        kept.append(sum(int(curve.stored[point]) for curve, point in own) / sum(curve.dense for curve, _ in own))
    return kept


@laws
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 8),
    temperature=temperatures,
    share=st.floats(0, 1),
    full=st.floats(0, 1),
)
def test_shares_equal_a_search_for_their_common_factor(
    seed: int, count: int, temperature: float | None, share: float, full: float
) -> None:
    rng = np.random.default_rng(seed)
    influence, dense = rng.uniform(0, 0.6, size=count), rng.integers(50, 5000, size=count)
    room = np.floor(dense * np.where(rng.random(count) < full, rng.random(count), 1)).astype(np.int64)
    remove = int(share * room.sum())
    found = removed_elements(influence, dense, room, remove, temperature)
    assert found.sum() == pytest.approx(remove, rel=1e-12)
    assert np.all(found <= room)
    weight = np.exp(-influence / (influence.mean() if temperature is None else temperature)) * dense
    low, high = 0.0, max(room / weight) if remove else 0.0
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * weight, room).sum() < remove else (low, middle)
    np.testing.assert_allclose(found, np.minimum(high * weight, room), rtol=1e-9, atol=1e-6)


@laws
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 8),
    storage=st.sampled_from(STORAGES),
    share=st.floats(0, 1),
    temperature=temperatures,
)
def test_equals_block_by_block(seed: int, count: int, storage: str, share: float, temperature: float | None) -> None:
    curves = random_curves(seed, count, storage)
    limit = some_limit(curves, share)
    blocks = blocks_of(curves)
    dense = [sum(curve.dense for curve in block) for block in blocks]
    least = [sum(int(curve.stored[0]) for curve in block) for block in blocks]
    room = np.array(dense) - np.array(least)
    influence = np.array([block[0].influence for block in blocks])
    removed = removed_elements(influence, np.array(dense), room, sum(dense) - limit, temperature)
    expected: list[int] = []
    spent = 0
    for number, block in enumerate(blocks):
        allowed = sum(dense[: number + 1]) - round(sum(removed[: number + 1])) - spent
        chosen = reference.uniform_choice(block, max(allowed, least[number]))
        spent += stored_total(block, np.array(chosen))
        expected += chosen
    assert block_influence.allocate(curves, limit, temperature=temperature).tolist() == expected


@laws
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), temperature=temperatures, cap=st.floats(0.05, 1))
def test_options_never_break_the_limit(seed: int, share: float, temperature: float | None, cap: float) -> None:
    curves = random_curves(seed, 8, STORAGES[seed % len(STORAGES)])
    limit = some_limit(curves, share)
    room = 0
    for block in blocks_of(curves):
        dense = sum(curve.dense for curve in block)
        room += min(dense - sum(int(curve.stored[0]) for curve in block), math.ceil(cap * dense))
    assert block_influence.least(curves, cap=cap, temperature=temperature) == sum(c.dense for c in curves) - room
    if sum(curve.dense for curve in curves) - limit > room:
        with pytest.raises(InputError, match="Raise --cap"):
            block_influence.allocate(curves, limit, temperature=temperature, cap=cap)
    else:
        choice = block_influence.allocate(curves, limit, temperature=temperature, cap=cap)
        assert stored_total(curves, choice) <= limit


def test_the_softmax_of_the_paper() -> None:
    influence = [0.05, 0.1, 0.3]
    curves = [fine(f"w{block}", block, score) for block, score in enumerate(influence)]
    found = shares_kept(curves, block_influence.allocate(curves, 2400, temperature=0.1))
    softmax = np.exp(-np.array(influence) / 0.1) / np.exp(-np.array(influence) / 0.1).sum()
    np.testing.assert_allclose(1 - np.array(found), 3 * 0.2 * softmax, atol=1.5e-3)


def test_the_default_does_not_depend_on_the_scale_of_the_influences() -> None:
    curves = random_curves(3, 8, "pair")
    limit = some_limit(curves, 0.6)
    choice = block_influence.allocate(curves, limit).tolist()
    for factor in (1e-3, 0.1, 10):
        scaled = [dataclasses.replace(curve, influence=factor * (curve.influence or 0)) for curve in curves]
        assert block_influence.allocate(scaled, limit).tolist() == choice
    mean = float(np.mean([block[0].influence for block in blocks_of(curves)]))
    assert block_influence.allocate(curves, limit, temperature=mean).tolist() == choice


@pytest.mark.parametrize("influence", [0.0, 0.3, -1e-17])
def test_blocks_of_equal_influence_lose_equal_shares(influence: float) -> None:
    curves = [fine(f"w{block}", block, influence, size) for block, size in enumerate((1000, 3000, 2000))]
    found = shares_kept(curves, block_influence.allocate(curves, 4200))
    np.testing.assert_allclose(found, 0.7, atol=1e-3)


def test_a_cap_passes_the_excess_on_in_proportion() -> None:
    curves = [fine(f"w{block}", block, score) for block, score in enumerate((0.02, 0.2, 0.3))]
    free = shares_kept(curves, block_influence.allocate(curves, 1800, temperature=0.1))
    assert free[0] < 0.3
    capped = shares_kept(curves, block_influence.allocate(curves, 1800, temperature=0.1, cap=0.6))
    assert capped[0] == pytest.approx(0.4, abs=1e-3)
    assert (1 - capped[1]) / (1 - capped[2]) == pytest.approx(np.e, rel=1e-2)
    # At the cap itself all blocks lose the same; what is out of reach is said, and what is not can be reached.
    assert shares_kept(curves, block_influence.allocate(curves, 1200, cap=0.6)) == [0.4, 0.4, 0.4]
    with pytest.raises(
        InputError, match=r"3 matrices cannot be stored in 1199 .* at most 0\.6 removed .* can go is 0\.6\. Raise"
    ):
        block_influence.allocate(curves, 1199, cap=0.6)


def test_a_block_without_choices_leaves_the_rest_to_the_others() -> None:
    """The least influential block has nothing smaller than 900 of its 1000 elements."""
    stiff = ranked("w0", np.array([900, 1000]), np.array([1.0, 0.0]), block=0, influence=0.01)
    curves = [stiff, fine("w1", 1, 0.2), fine("w2", 2, 0.3)]
    choice = block_influence.allocate(curves, 1900)
    assert stored_total(curves, choice) == 1900
    assert shares_kept(curves, choice)[0] == 0.9


def test_what_rounding_leaves_over_goes_to_the_next_block() -> None:
    coarse = ranked("w0", np.array([300, 1000]), np.array([1.0, 0.0]), block=0, influence=0.2)
    curves = [coarse, fine("w1", 1, 0.2), fine("w2", 2, 0.2)]
    assert shares_kept(curves, block_influence.allocate(curves, 2100)) == [0.3, 1.0, 0.8]
    assert shares_kept(curves, block_influence.allocate(curves, 1500)) == [0.3, 0.7, 0.5]


def test_one_block_is_uniform() -> None:
    curves = [dataclasses.replace(curve, block=4, influence=0.1) for curve in random_curves(5, 6, "pivot")]
    for share in (0, 0.3, 0.7, 1):
        limit = some_limit(curves, share)
        assert block_influence.allocate(curves, limit).tolist() == uniform.allocate(curves, limit).tolist()


def test_an_extreme_temperature_empties_one_block_after_the_other() -> None:
    curves = [fine(f"w{block}", block, score) for block, score in enumerate((0.4, 0.1, 0.3, 0.2))]
    assert shares_kept(curves, block_influence.allocate(curves, 2501, temperature=1e-6)) == [1.0, 0.001, 1.0, 0.5]


def test_impossible_options() -> None:
    curves = random_curves(0, 4, "pair")
    limit = some_limit(curves, 0.5)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=f"temperature must be above 0, got {temperature}"):
            block_influence.allocate(curves, limit, temperature=temperature)
    for cap in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=rf"must lie in \(0, 1\], got {cap}"):
            block_influence.allocate(curves, limit, cap=cap)
    without = [*curves[:3], dataclasses.replace(curves[3], name="layers.1.up", influence=None)]
    with pytest.raises(InputError, match=r"needs calibration data: the curve of layers\.1\.up has no block influence"):
        block_influence.allocate(without, limit)
