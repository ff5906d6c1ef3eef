from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation import welore
from lowrank_compress.errors import InputError
from tests import reference
from tests.allocation.curves import STORAGES, random_curves, some_limit


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_equals_trying_every_threshold(seed: int, count: int, storage: str, share: float) -> None:
    curves = random_curves(seed, count, storage)
    limit = some_limit(curves, share)
    assert welore.allocate(curves, limit).tolist() == reference.welore_choice(curves, limit)


def test_the_loss_plays_no_part() -> None:
    curves = random_curves(1, 4, "pair")
    limit = some_limit(curves, 0.5)
    scaled = [dataclasses.replace(curve, loss=curve.loss * 10.0**i) for i, curve in enumerate(curves)]
    assert welore.allocate(curves, limit).tolist() == welore.allocate(scaled, limit).tolist()


def test_a_flat_spectrum_stays_dense_while_it_can() -> None:
    flat, falling = random_curves(2, 2, "pair")
    assert flat.spectrum is not None
    flat = dataclasses.replace(flat, spectrum=np.ones_like(flat.spectrum))
    least = int(falling.stored[0])
    choice = welore.allocate([flat, falling], flat.dense + least)
    assert flat.choice(choice[0]).is_dense
    assert welore.allocate([flat, falling], int(flat.stored[0]) + least).tolist() == [0, 0]


def test_a_spectrum_is_needed() -> None:
    curve = dataclasses.replace(random_curves(0, 1, "pair")[0], name="layers.0.up", spectrum=None)
    with pytest.raises(InputError, match=r"'welore' needs the singular values of layers\.0\.up"):
        welore.allocate([curve], curve.dense)
