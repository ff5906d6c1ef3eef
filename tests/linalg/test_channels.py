from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_compress.linalg.channels import composition_scores, cosines, product_directions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_directions_are_those_of_the_product() -> None:
    left, right = random(3, 14, 4), random(3, 4, 11, seed=1)
    written, read = product_directions(left, right)
    for head in range(3):
        u, values, vh = torch.linalg.svd(left[head] @ right[head])
        torch.testing.assert_close(written.values[head].double(), values[:4], rtol=1e-5, atol=1e-5)
        for place in range(4):
            assert abs(float(written.vectors[head, :, place].double() @ u[:, place])) == pytest.approx(1, rel=1e-5)
            assert abs(float(read.vectors[head, :, place].double() @ vh[place])) == pytest.approx(1, rel=1e-5)


def test_scores_are_those_of_whole_products() -> None:
    """‖R M‖ / (‖R‖ ‖M‖) of every pair, by d × d matrices; for queries the transposed form reads."""
    outputs, values = random(3, 12, 4), random(3, 4, 12, seed=1)
    queries, keys = random(2, 5, 12, seed=2), random(2, 5, 12, seed=3)
    written, _ = product_directions(outputs, values)
    by_query, by_key = product_directions(queries.mT, keys)
    for read, form in ((by_query, lambda q, k: k.T @ q), (by_key, lambda q, k: q.T @ k)):
        between = cosines(written, read)
        scores = composition_scores(written, read, between)
        assert between.shape == (3, 2, 4, 5)
        for a in range(3):
            for b in range(2):
                m, r = outputs[a] @ values[a], form(queries[b], keys[b])
                assert float(scores[a, b]) == pytest.approx(float((r @ m).norm() / (r.norm() * m.norm())), rel=1e-4)
                for i in range(4):
                    for j in range(5):
                        cosine = float(written.vectors[a, :, i] @ read.vectors[b, :, j])
                        assert float(between[a, b, i, j]) == pytest.approx(cosine, abs=1e-6)


def test_unrelated_maps_score_what_is_said() -> None:
    width = 64
    written, _ = product_directions(random(6, width, 8), random(6, 8, width, seed=1))
    _, read = product_directions(random(6, width, 8, seed=2), random(6, 8, width, seed=3))
    scores = composition_scores(written, read, cosines(written, read))
    assert float(scores.mean()) == pytest.approx(width**-0.5, rel=0.1)


def test_heads_of_zeros_compose_with_nothing() -> None:
    written, read = product_directions(torch.zeros(1, 6, 2), torch.zeros(1, 2, 6))
    assert composition_scores(written, read, cosines(written, read)).tolist() == [[0.0]]
