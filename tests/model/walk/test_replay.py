from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowrank_compress.errors import NumericsError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.head import HEAD_TOKENS, head_gradient, lm_chunks, token_loss
from lowrank_compress.model.walk.replay import Replay
from lowrank_compress.model.walk.walk import Walk
from tests.ordinary import LM, Saved, load, padded, task, tokens
from tests.tiny import MODELS

pytestmark = pytest.mark.versions

CPU = torch.device("cpu")
# The same numbers, summed in another order where they lie elsewhere in memory. Parts of all models compute in float32
# whatever their dtype, so that even in float64 a sum may, rarely, round to another float32.
ROUNDING = {torch.float32: 5e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def replayed(walk: Walk) -> list[Tensor]:
    for _ in walk.forwards():
        pass
    with torch.no_grad():
        return [walk.head(number, walk.leaving(number)) for number in range(len(walk.batches))]


def some_batches(either_side: bool = True) -> list[Batch]:
    """Without padding, of another length, with padding on the right and perhaps on the left."""
    return [
        Batch(torch.stack(tokens(13, 13, 13, seed=1))),
        Batch(torch.stack(tokens(17, seed=2))),
        Batch(*padded(tokens(13, 7, 9, seed=3), left=[1] if either_side else [])),
        Batch(torch.stack(tokens(13, 13, 13, seed=4))),
        Batch(*padded(tokens(8, 13, 11, seed=5), left=[2] if either_side else [])),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_equals_the_whole_model(case: str, dtype: torch.dtype, saved: Saved) -> None:
    model = load(saved(case), task(case), dtype)
    # In float64 Gemma 2 itself makes NaN of positions that may look at nothing, such as those before the first token.
    batches = some_batches(either_side=dtype == torch.float32)
    found = replayed(Walk([Skeleton(Checkpoint(saved(case)), CPU, dtype)], batches))
    for batch, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert logits.dtype == expected.dtype == dtype
        assert (logits - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


def test_the_masks_of_sliding_windows_matter_here(saved: Saved) -> None:
    """The sequences above are long enough that a sliding window, taken for full attention, would be noticed."""
    for case in ("mistral-lm", "qwen2-lm", "gemma2-lm", "gemma3_text-lm"):
        model = load(saved(case), "lm")
        ids = torch.stack(tokens(13, 13, seed=1))
        changed = ids.clone()
        changed[:, 0] = 95 - (changed[:, 0] - 4)
        sliding = model.config.layer_types if case != "mistral-lm" else ["sliding_attention"]
        assert "sliding_attention" in sliding
        with torch.no_grad():
            full = load(saved(case, sliding_window=40), "lm")(input_ids=ids).logits
            assert (model(input_ids=ids).logits - full).abs().max() > 1e-3


@pytest.mark.parametrize("case", MODELS)
def test_only_one_block_is_in_memory(case: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton(Checkpoint(saved(case)), CPU, torch.float32)
    visits: list[int] = []

    def in_memory() -> list[int]:
        return [
            index
            for index, block in enumerate(skeleton.blocks)
            if any(not tensor.is_meta for tensor in [*block.parameters(), *block.buffers()])
        ]

    def step(replay: Replay, index: int, block: torch.nn.Module, number: int, hidden: Tensor) -> Tensor:
        assert in_memory() == [index]
        assert not any(tensor.is_meta for tensor in block.state_dict().values())
        visits.append(index)
        return ordinary_step(replay, index, block, number, hidden)

    ordinary_step = Replay.step
    monkeypatch.setattr(Replay, "step", step)
    walk = Walk([skeleton], some_batches())
    for step in walk.forwards():
        assert in_memory() == [step.index]
        outside = set(skeleton.model.parameters()) - set(step.blocks[0].parameters())
        assert all(parameter.is_meta for parameter in outside)
        step.leave()
        assert in_memory() == []
    walk.head(0, walk.leaving(0))
    assert in_memory() == []
    blocks = range(len(skeleton.blocks))
    assert visits == [index for index in blocks for _ in walk.batches]


def test_a_walk_may_start_again(saved: Saved) -> None:
    walk = Walk([Skeleton(Checkpoint(saved("gemma2-lm")), CPU, torch.float32)], some_batches())
    for first, second in zip(replayed(walk), replayed(walk), strict=True):
        assert (first - second).abs().max() <= ROUNDING[torch.float32] * first.abs().max()


@pytest.mark.parametrize("case", LM)
def test_logits_of_some_positions(case: str, saved: Saved) -> None:
    batch = Batch(torch.stack(tokens(13, 13)))
    walk = Walk([Skeleton(Checkpoint(saved(case)), CPU, torch.float64)], [batch])
    (whole,) = replayed(walk)
    part = walk.head(0, walk.leaving(0), 4, 9)
    assert part.shape == (2, 5, whole.shape[-1])
    assert (part - whole[:, 4:9]).abs().max() <= 1e-13 * whole.abs().max()


@pytest.mark.parametrize("case", LM)
def test_the_gradient_at_the_head_may_be_taken_in_chunks(case: str, saved: Saved) -> None:
    walk = Walk([Skeleton(Checkpoint(saved(case)), CPU, torch.float64)], [Batch(torch.stack(tokens(13, 13)))])
    replayed(walk)
    whole = head_gradient(walk.replay(), walk.batches[0], walk.leaving(0))
    found = head_gradient(walk.replay(), walk.batches[0], walk.leaving(0), tokens=10)
    assert len(list(lm_chunks(walk.batches[0], 10))) == 3
    assert (found - whole).abs().max() <= 1e-12 * whole.abs().max()


@pytest.mark.parametrize("sequences", [1, 3, 700])
@pytest.mark.parametrize("length", [2, 3, 600])
@pytest.mark.parametrize("most", [5, HEAD_TOKENS])
def test_chunks_cover_what_is_scored(sequences: int, length: int, most: int) -> None:
    batch = Batch(torch.zeros(sequences, length, dtype=torch.long))
    chunks = list(lm_chunks(batch, most))
    covered: Sequence[int] = [position for start, stop in chunks for position in range(start, stop)]
    assert covered == list(range(length - 1))
    assert all(0 < (stop - start) * sequences <= max(most, sequences) for start, stop in chunks)


def test_loss_is_a_sum_in_nats() -> None:
    logits = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    loss = token_loss(logits, torch.tensor([[2, 0]]), "this text")
    expected = torch.tensor([1.0, 2.0, 4.0]).logsumexp(0) - 4 + torch.tensor(3.0).log()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_an_error(bad: float) -> None:
    logits = torch.zeros(1, 4, 7)
    logits[0, 2, 3] = bad
    with pytest.raises(NumericsError, match="NaN or infinite logits on this text"):
        token_loss(logits, torch.zeros(1, 4, dtype=torch.long), "this text")


def test_real_tokens_are_counted() -> None:
    ids, mask = padded(tokens(5, 9, 2), left=[2])
    batch = Batch(ids, mask)
    assert batch.tokens == 16
    real = batch.real()
    assert real is not None
    assert real.tolist() == [i < 5 for i in range(9)] + [True] * 9 + [i >= 7 for i in range(9)]
    assert Batch(ids).tokens == 27
    assert Batch(ids).real() is None


def test_padding_is_never_scored() -> None:
    ids, mask = padded(tokens(5, 9, 2), left=[2])
    with pytest.raises(NumericsError, match="padding scored"):
        list(lm_chunks(Batch(ids, mask)))
