from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_compress.allocation.curve import stored_total
from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.errors import InputError
from tests.allocation.curves import STORAGES, random_curves, some_limit

every_allocator = pytest.mark.parametrize("name", sorted(ALLOCATORS))


@every_allocator
@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6), storage=st.sampled_from(STORAGES), share=st.floats(0, 1))
def test_never_over_the_limit(name: str, seed: int, count: int, storage: str, share: float) -> None:
    curves = random_curves(seed, count, storage)
    limit = some_limit(curves, share)
    choice = ALLOCATORS[name].allocate(curves, limit)
    assert choice.shape == (count,)
    assert choice.dtype == np.int64
    assert stored_total(curves, choice) <= limit
    assert choice.tolist() == ALLOCATORS[name].allocate(curves, limit).tolist()


@every_allocator
def test_room_for_everything_loses_nothing(name: str) -> None:
    curves = random_curves(0, 4, "auto")
    choice = ALLOCATORS[name].allocate(curves, some_limit(curves, 1))
    assert all(curve.loss[point] == 0 for curve, point in zip(curves, choice, strict=True))


@every_allocator
def test_out_of_reach(name: str) -> None:
    curves = random_curves(0, 4, "auto")
    with pytest.raises(InputError, match="4 matrices cannot be stored in"):
        ALLOCATORS[name].allocate(curves, some_limit(curves, 0) - 1)


@every_allocator
def test_declared_needs_are_the_real_ones(name: str) -> None:
    allocator = ALLOCATORS[name]
    assert allocator.name == name
    curves = random_curves(0, 4, "auto")
    limit = some_limit(curves, 0.5)
    choice = allocator.allocate(curves, limit).tolist()
    without_spectra = [dataclasses.replace(curve, spectrum=None) for curve in curves]
    if allocator.needs_spectrum:
        with pytest.raises(InputError, match="singular values"):
            allocator.allocate(without_spectra, limit)
    else:
        assert allocator.allocate(without_spectra, limit).tolist() == choice
    without_influence = [dataclasses.replace(curve, influence=None) for curve in curves]
    if allocator.needs_influence:
        with pytest.raises(InputError, match="needs calibration data"):
            allocator.allocate(without_influence, limit)
    else:
        assert allocator.allocate(without_influence, limit).tolist() == choice
    if not allocator.needs_loss:
        without_loss = [dataclasses.replace(curve, loss=np.zeros_like(curve.loss)) for curve in curves]
        assert allocator.allocate(without_loss, limit).tolist() == choice


@every_allocator
def test_declared_options_are_the_real_ones(name: str) -> None:
    parameters = inspect.signature(ALLOCATORS[name].allocate).parameters.values()
    options = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    declared = ALLOCATORS[name].options
    assert [option.name for option in options] == [option.name for option in declared]
    assert all(option.default is not option.empty for option in options)
    for option in declared:
        assert option.default is None or option.read(option.default) == option.default


def test_unknown_allocator() -> None:
    with pytest.raises(InputError, match=r"Unknown allocator 'uniforn'\. Did you mean 'uniform'"):
        ALLOCATORS["uniforn"]
