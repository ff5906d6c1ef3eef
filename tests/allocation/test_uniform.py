from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation import uniform
from tests import reference
from tests.allocation.curves import STORAGES, random_curves, some_limit


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_equals_trying_every_share(seed: int, count: int, storage: str, share: float) -> None:
    curves = random_curves(seed, count, storage)
    limit = some_limit(curves, share)
    assert uniform.allocate(curves, limit).tolist() == reference.uniform_choice(curves, limit)


@pytest.mark.parametrize("storage", STORAGES)
def test_equal_matrices_get_equal_ranks(storage: str) -> None:
    curves = random_curves(0, 1, storage) * 5
    choice = uniform.allocate(curves, some_limit(curves, 0.4))
    assert len(np.unique(choice)) == 1


def test_no_matrices() -> None:
    assert uniform.allocate([], 0).tolist() == []
