"""A sketch estimates distances, to the spread that is stated, the same on every machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank_compress.linalg.sketch import BUCKETS, DEVIATION, Sketch, sketch


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_slow_sum_over_elements():
    values = random(0, 300)
    drawn = np.random.Philox(key=0).random_raw(300)
    sums = [0.0] * BUCKETS
    for value, bits in zip(values.tolist(), drawn.tolist(), strict=True):
        sums[bits % BUCKETS] += -value if bits // BUCKETS % 2 else value
    taken = sketch([values])
    assert taken.sums == pytest.approx(sums, abs=1e-6)
    assert taken.norm == pytest.approx(float(values.norm()))


def test_signs_and_buckets_are_those_of_all_versions_and_machines():
    # numpy promises that the bits of Philox never change; expectations on other machines rely on it.
    assert (np.random.Philox(key=0).random_raw(8) % (2 * BUCKETS)).tolist() == [27, 50, 121, 92, 67, 93, 55, 60]


def test_does_not_depend_on_the_pieces():
    tensor = random(1, 40, 7)
    assert np.array_equal(sketch([tensor]).sums, sketch(tensor.split(9)).sums)


def test_a_single_element_is_told_exactly():
    tensor = random(2, 50, 20)
    other = tensor.clone()
    other[13, 4] += 0.25
    expected = 0.25 / float(tensor.norm())
    assert sketch([tensor]).distance(sketch([other])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "rank one", "one row"])
def test_distances_are_right_to_the_stated_deviation(kind: str):
    tensor = random(3, 60, 40)
    errors = []
    for seed in range(60):
        change = random(seed + 10, 60, 40)
        if kind == "rank one":
            change = random(seed + 10, 60, 1) @ random(seed + 100, 1, 40)
        if kind == "one row":
            change[1:] = 0
        change *= 1e-3 * tensor.norm() / change.norm()
        errors.append(sketch([tensor]).distance(sketch([tensor + change])) / 1e-3 - 1)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(DEVIATION, rel=0.35)


def test_text_is_read_back():
    taken = sketch([random(4, 10)])
    assert np.array_equal(Sketch.parse(taken.norm, taken.text()).sums, taken.sums)


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "/////w" + "A" * 336 + "=="])
def test_what_is_no_sketch_is_refused(text: str):
    with pytest.raises(ValueError, match=r"sketch|base64|padding|characters|multiple|size|digit"):
        Sketch.parse(1.0, text)
