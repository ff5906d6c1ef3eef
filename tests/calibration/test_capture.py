from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_compress.calibration import capture as module
from lowrank_compress.calibration.capture import capture, needs_gradient
from lowrank_compress.calibration.hooks import clipping
from lowrank_compress.calibration.statistics import STATISTICS, statistic_key
from lowrank_compress.errors import NumericsError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.ordinary import (
    Saved,
    head_statistics,
    influences,
    load,
    matrix,
    padded,
    statistics,
    task,
    tokens,
    traces,
)
from tests.tiny import MODELS

CPU = torch.device("cpu")
FORWARD = frozenset(name for name, statistic in STATISTICS.items() if not statistic.gradient)
LABELS = [2, 0, 1, 2]
Means = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def skeleton_of(saved: Saved, case: str, dtype: torch.dtype = torch.float64) -> Skeleton:
    return Skeleton(Checkpoint(saved(case)), CPU, dtype)


def everything(skeleton: Skeleton, names: frozenset[str] = frozenset(STATISTICS)) -> dict[str, frozenset[str]]:
    """Those of some statistics that each target can have."""
    return {
        target.name: frozenset(name for name in names if STATISTICS[name].fits(target.role))
        for target in skeleton.resolved.targets
    }


def measured(
    skeleton: Skeleton, batches: Sequence[Batch], wanted: Mapping[str, frozenset[str]] | None = None, **options: Any
) -> dict[int, Means]:
    """Statistics by block."""
    options = {"skip": lambda block: False} | options
    wanted = everything(skeleton) if wanted is None else wanted
    return {found.block: found.means for found in capture(skeleton, batches, wanted, **options)}


def assert_same(found: Mapping[int, Means], expected: Mapping[int, Means], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for block, means in expected.items():
        assert found[block].keys() == means.keys()
        for key, value in means.items():
            assert found[block][key].dtype == torch.float64
            assert found[block][key].shape == value.shape, key
            error = (found[block][key] - value).abs().max()
            assert error <= tolerance * value.abs().max(), (block, key, float(error / value.abs().max()))


def sequences_of(case: str) -> list[Tensor]:
    """Four sequences, those of a classifier of unequal lengths; all longer than half a sliding window."""
    return tokens(13, 13, 13, 13) if task(case) == "lm" else tokens(13, 9, 11, 8)


def batches_of(case: str, sizes: Sequence[int] = (2, 1, 1), width: int = 0) -> list[Batch]:
    sequences, batches, start = sequences_of(case), [], 0
    for size in sizes:
        part = sequences[start : start + size]
        if task(case) == "lm":
            batches.append(Batch(torch.stack(part)))
        else:
            batches.append(Batch(*padded(part, width), torch.tensor(LABELS[start : start + size])))
        start += size
    return batches


def expected_of(
    saved: Saved, case: str, skeleton: Skeleton, sequences: Sequence[Tensor] | None = None
) -> dict[int, Means]:
    """Every statistic from the whole model and autograd, one unpadded sequence at a time."""
    sequences = sequences or sequences_of(case)
    model = load(saved(case), task(case))
    names = [target.name for target in skeleton.resolved.targets]
    seen, terms = traces(model, names, sequences, None if task(case) == "lm" else LABELS)
    turned = influences(model, skeleton.resolved.blocks, sequences)
    expected: dict[int, Means] = {
        block: {"influence": torch.tensor([value], dtype=torch.float64)} for block, value in enumerate(turned)
    }
    for target in skeleton.resolved.targets:
        own = statistics(seen[target.name], matrix(model, target.name), terms)
        own |= head_statistics(model, target.role, seen[target.name], terms)
        for name, value in own.items():
            key = f"{target.reads if name.startswith('in_') and name != 'in_fisher' else target.name}/{name}"
            expected[target.block].setdefault(key, value)
    return expected


def statistic_of(key: str) -> str:
    return key.rsplit("/", 1)[-1]


@pytest.mark.parametrize("case", MODELS)
def test_every_statistic_equals_ordinary_autograd(case: str, saved: Saved) -> None:
    skeleton = skeleton_of(saved, case)
    expected = expected_of(saved, case, skeleton)
    of_all = {name for name, statistic in STATISTICS.items() if not statistic.experts}
    assert {statistic_of(key) for key in expected[0]} == {*of_all, "influence"}
    assert_same(measured(skeleton, batches_of(case)), expected)
    # Without gradients everything is done in the forward sweep: other code.
    activations = {
        block: {key: value for key, value in means.items() if statistic_of(key) in FORWARD | {"influence"}}
        for block, means in expected.items()
    }
    assert_same(measured(skeleton, batches_of(case), everything(skeleton, FORWARD)), activations)


def test_blocks_come_forwards_or_with_gradients_backwards(saved: Saved) -> None:
    skeleton = skeleton_of(saved, "gemma2-lm")
    for names, order in ((FORWARD, [0, 1, 2]), (FORWARD | {"out_fisher"}, [2, 1, 0])):
        wanted = everything(skeleton, names)
        assert list(measured(skeleton, batches_of("gemma2-lm"), wanted)) == order
        assert needs_gradient(wanted) == ("out_fisher" in names)


def test_sequences_of_different_lengths(saved: Saved) -> None:
    """The mean is over all tokens, not a mean of the batches' means."""
    skeleton = skeleton_of(saved, "llama-lm")
    parts = tokens(13, 5, 8, seed=3)
    assert_same(
        measured(skeleton, [Batch(part[None]) for part in parts]), expected_of(saved, "llama-lm", skeleton, parts)
    )


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "bert-classification", "opt-classification"])
def test_micro_batches_do_not_matter(case: str, saved: Saved) -> None:
    skeleton = skeleton_of(saved, case)
    reference = measured(skeleton, batches_of(case, (1, 1, 1, 1)))
    for sizes in ((4,), (3, 1), (1, 3)):
        assert_same(measured(skeleton, batches_of(case, sizes)), reference)


@pytest.mark.parametrize("case", [case for case in MODELS if case.endswith("classification")])
def test_padding_is_in_no_statistic(case: str, saved: Saved) -> None:
    skeleton = skeleton_of(saved, case)
    batches = batches_of(case, (1, 1, 1, 1), width=14)
    assert all((batch.mask == 0).any() for batch in batches if batch.mask is not None)
    assert_same(measured(skeleton, batches), measured(skeleton, batches_of(case, (1, 1, 1, 1))))


@pytest.mark.parametrize("case", ["llama-classification", "gemma2-classification"])
def test_padding_on_the_left_of_a_decoder(case: str, saved: Saved) -> None:
    """Numbers at padded positions are never looked at; positions are shifted, which rotary embeddings do not feel."""
    skeleton = skeleton_of(saved, case, torch.float32)
    parts = tokens(13, 9, 11)
    found = measured(skeleton, [Batch(*padded(parts, left=[0, 1, 2]), torch.tensor(LABELS[:3]))])
    alone = measured(skeleton, [Batch(part[None], None, torch.tensor([LABELS[i]])) for i, part in enumerate(parts)])
    assert_same(found, alone, 1e-4)


@pytest.mark.parametrize("names", [FORWARD, frozenset(STATISTICS)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("finished", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1, 2}], ids=str)
def test_finished_blocks_are_skipped(names: frozenset[str], finished: set[int], saved: Saved) -> None:
    skeleton = skeleton_of(saved, "gemma2-lm", torch.float32)
    wanted = everything(skeleton, names)
    whole = measured(skeleton, batches_of("gemma2-lm"), wanted)
    rest = measured(skeleton, batches_of("gemma2-lm"), wanted, skip=lambda block: block in finished)
    assert list(rest) == [block for block in whole if block not in finished]
    assert_same(rest, {block: means for block, means in whole.items() if block not in finished}, 1e-6)


def test_nothing_is_computed_that_nobody_wants(saved: Saved) -> None:
    """Inputs that several matrices read are measured once, under a name of their own."""
    skeleton = skeleton_of(saved, "llama-lm")
    block = "model.layers.1"
    wanted = {
        f"{block}.self_attn.k_proj": frozenset({"in_gram", "out_fisher"}),
        f"{block}.self_attn.v_proj": frozenset({"in_gram"}),
        f"{block}.mlp.down_proj": frozenset({"in_abs"}),
    }
    found = measured(skeleton, batches_of("llama-lm"), wanted)
    assert set(found[0]) == {"influence"}
    assert set(found[1]) == {"attn/in_gram", f"{block}.self_attn.k_proj/out_fisher", "hidden/in_abs", "influence"}
    whole = measured(skeleton, batches_of("llama-lm"))
    assert_same({1: found[1]}, {1: {key: whole[1][key] for key in found[1]}})


def test_influence_needs_no_other_statistic(saved: Saved) -> None:
    skeleton = skeleton_of(saved, "bert-classification")
    batches = batches_of("bert-classification")
    whole = measured(skeleton, batches)
    assert_same(measured(skeleton, batches, {}), {block: {"influence": whole[block]["influence"]} for block in (0, 1)})


def test_shared_inputs_are_summed_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = skeleton_of(saved, "phi3-lm")
    calls: list[tuple[int, ...]] = []

    def gram(seen: Any) -> Tensor:
        calls.append(tuple(seen.x.shape))
        return seen.x

    monkeypatch.setitem(module.Moments.add.__globals__["ROWS"], "in_gram", gram)
    batches = batches_of("phi3-lm")
    measured(skeleton, batches, everything(skeleton, frozenset({"in_gram"})))
    assert len(calls) == 4 * len(skeleton.blocks) * len(batches)


def test_clipping_is_from_above_only() -> None:
    g = torch.randn(3, 5, 8, dtype=torch.float64)
    g[0, 2] = 0
    g[1] = 0
    g[2, 4] *= 50
    norms = [float(row.norm()) for row in g.flatten(0, 1)]
    mean = sum(norms) / sum(norm > 0 for norm in norms)
    shares = clipping(g, 2.0)
    assert shares is not None
    found = g * shares
    for before, after, norm in zip(g.flatten(0, 1), found.flatten(0, 1), norms, strict=True):
        if norm <= 2 * mean:
            assert torch.equal(after, before)
        else:
            torch.testing.assert_close(after, before * (2 * mean / norm))
    assert found[2, 4].norm() < g[2, 4].norm()
    assert clipping(g, None) is clipping(torch.zeros(2, 3, 4), 1.0) is None
    unclipped = clipping(g, 1e9)
    assert unclipped is not None
    assert torch.equal(g * unclipped, g)


@pytest.mark.parametrize("case", ["phi3-lm", "bert-classification"])
def test_clipped_statistics(case: str, saved: Saved) -> None:
    """The unit of clipping is a token's gradient at a module's whole output, the parts of a fused one together."""
    skeleton = skeleton_of(saved, case)
    model = load(saved(case), task(case))
    names = [target.name for target in skeleton.resolved.targets]
    seen, terms = traces(model, names, sequences_of(case), None if task(case) == "lm" else LABELS)
    found = measured(skeleton, batches_of(case, (4,)), clip=1.1)
    cut = 0
    for targets in skeleton.resolved.modules().values():
        whole = torch.cat([torch.cat([trace.g for trace in seen[target.name]]) for target in targets], 1)
        norms = whole.norm(dim=1)
        limit = 1.1 * norms[norms > 0].mean()
        factor = torch.where(norms > limit, limit / norms, torch.ones(()))
        cut += int((factor < 1).sum())
        for target in targets:
            g = torch.cat([trace.g for trace in seen[target.name]]) * factor[:, None]
            fisher = g.T @ g / terms
            mean = found[target.block][f"{target.name}/out_fisher"]
            assert (mean - fisher).abs().max() <= 1e-12 * fisher.abs().max()
            if target.role == "v":
                size = skeleton.resolved.heads.size
                heads = [fisher[start : start + size, start : start + size] for start in range(0, len(fisher), size)]
                mean = found[target.block][f"{target.name}/head_fisher"]
                assert (mean - torch.stack(heads)).abs().max() <= 1e-12 * fisher.abs().max()
            gram = torch.cat([trace.x for trace in seen[target.name]])
            gram = gram.T @ gram / len(gram)
            assert (found[target.block][statistic_key(target, "in_gram")] - gram).abs().max() <= 1e-12 * gram.max()
    assert cut > 0


def test_progress_is_told(saved: Saved) -> None:
    skeleton = skeleton_of(saved, "llama-lm", torch.float32)
    said: list[tuple[str, int, int]] = []
    measured(skeleton, batches_of("llama-lm"), advance=lambda step, done, total: said.append((step, done, total)))
    assert said == [
        *(("forward", i, 2) for i in (1, 2)),
        *(("loss", i, 3) for i in (1, 2, 3)),
        *(("backward", i, 2) for i in (1, 2)),
    ]


@pytest.mark.parametrize(
    "names",
    [FORWARD, frozenset(), frozenset({"out_fisher"}), frozenset({"head_fisher"}), frozenset({"score_fisher"})],
    ids=lambda names: ",".join(sorted(names)) or "influence",
)
def test_infinite_activations_are_an_error(
    names: frozenset[str], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of(saved, "llama-lm", torch.float32)
    embedding: Any = skeleton.model.get_input_embeddings()
    embedding.weight.data[int(sequences_of("llama-lm")[2][5])] = float("inf")
    with pytest.raises(NumericsError, match=r"finite|NaN"):
        measured(skeleton, batches_of("llama-lm"), everything(skeleton, names))
