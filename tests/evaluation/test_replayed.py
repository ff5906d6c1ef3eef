from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_compress.calibration.windows import evaluation_windows, window_batches
from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.exam import examined, of_classes
from lowrank_compress.evaluation.replayed import Perplexity, perplexity, position_bounds
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.ordinary import CLASSIFIERS, LM, Saved, load, padded, summed_loss, tokens

CPU = torch.device("cpu")
LENGTH = 95
TEXT = tokens(LENGTH, seed=7)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("models"))


def skeleton_of(saved: Saved, case: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Skeleton:
    return Skeleton(Checkpoint(saved(case, **overrides)), CPU, dtype)


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("case", LM)
def test_perplexity_equals_the_whole_model(case: str, bos: int | None, saved: Saved) -> None:
    """Every token of the text once, in the context of its own window; the windows are cut here by hand."""
    model = load(saved(case), "lm")
    body, nats, count = 19, 0.0, 0
    with torch.no_grad():
        for start in range(0 if bos else 1, LENGTH, body):
            context = torch.tensor([bos]) if bos else TEXT[start - 1 : start]
            loss, terms = summed_loss(model, torch.cat([context, TEXT[start : start + body]]), None)
            nats, count = nats + loss.item(), count + terms
    assert count == LENGTH - (bos is None)
    batches = window_batches(evaluation_windows(TEXT, body + 1, bos), 3)
    found = perplexity(skeleton_of(saved, case), batches)
    assert found.tokens == count
    assert found.nats == pytest.approx(nats, rel=1e-10)
    assert found.value == pytest.approx(math.exp(nats / count), rel=1e-10)
    # In the dtype that is used for real, and with other micro-batches.
    single = perplexity(
        skeleton_of(saved, case, torch.float32), window_batches([*evaluation_windows(TEXT, 20, bos)], 1)
    )
    assert single.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_chunks_of_the_head_do_not_matter(chunk: int, saved: Saved) -> None:
    skeleton = skeleton_of(saved, "gemma2-lm")
    batches = window_batches(evaluation_windows(TEXT, 20, 1), 3)
    whole = perplexity(skeleton, batches)
    found = perplexity(skeleton, batches, head_tokens=chunk)
    assert found.tokens == whole.tokens
    assert found.nats == pytest.approx(whole.nats, rel=1e-12)


def test_several_passes_do_not_matter(saved: Saved) -> None:
    skeleton = skeleton_of(saved, "llama-lm")
    batches = window_batches(evaluation_windows(TEXT, 20, 1), 1)
    whole, said = perplexity(skeleton, batches), []
    found = perplexity(skeleton, batches, lambda done, total: said.append((done, total)), carried=2 * 20 * 32 * 4)
    assert (found.nats, found.tokens) == (pytest.approx(whole.nats, rel=1e-13), whole.tokens)
    # Five windows, two at a time, through two blocks.
    assert said == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("chunk", [3, 512])
def test_positions_apart_equal_the_whole_model(chunk: int, saved: Saved) -> None:
    """Each token's loss, taken from the logits of the whole model, goes to the part that its position lies in."""
    ids, bounds = TEXT[:80].view(4, 20), [0, 4, 5, 13, 20]
    with torch.no_grad():
        scores = load(saved("llama-lm"), "lm")(input_ids=ids).logits.log_softmax(-1)
    losses = -scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # (4, 19), of positions 1 to 19
    found = perplexity(skeleton_of(saved, "llama-lm"), window_batches([*ids], 2), bounds=bounds, head_tokens=chunk)
    assert [part.tokens for part in found.parts] == [12, 4, 32, 28]
    assert [part.nats for part in found.parts] == pytest.approx(
        [
            losses[:, :3].sum().item(),
            losses[:, 3].sum().item(),
            losses[:, 4:12].sum().item(),
            losses[:, 12:].sum().item(),
        ],
        rel=1e-10,
    )
    assert (found.tokens, found.nats) == (76, pytest.approx(losses.sum().item(), rel=1e-10))


def test_bounds_of_positions_double_up_to_the_window() -> None:
    assert position_bounds(256) == [0, 32, 64, 128, 256]
    assert position_bounds(300) == [0, 32, 64, 128, 256, 300]
    assert position_bounds(20) == [0, 20]


def test_the_first_token_is_context(saved: Saved) -> None:
    """Overlapping windows share a context token, and score every other one once."""
    skeleton = skeleton_of(saved, "gpt2-lm")
    first, second = Batch(TEXT[None, :12]), Batch(TEXT[None, 11:20])
    found = perplexity(skeleton, [first, second])
    assert found.tokens == 19
    apart = perplexity(skeleton, [first]).nats + perplexity(skeleton, [second]).nats
    assert found.nats == pytest.approx(apart, rel=1e-12)


def test_a_perplexity_beyond_all_numbers() -> None:
    assert Perplexity(0.0, 3).value == 1.0
    assert Perplexity(3 * math.log(7), 3).value == pytest.approx(7)
    assert Perplexity(2000.0, 2).value == math.inf


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_accuracy_equals_the_whole_model(case: str, saved: Saved) -> None:
    model = load(saved(case), "classification")
    sequences = tokens(*[9, 12, 7, 15, 8] * 4, seed=3)
    with torch.no_grad():
        right = [int(model(input_ids=ids[None]).logits.argmax()) for ids in sequences]
    labels = torch.tensor([answer if i % 3 else (answer + 1) % 3 for i, answer in enumerate(right)])
    batches = [Batch(*padded(sequences[i : i + 6]), labels[i : i + 6]) for i in range(0, 20, 6)]
    said: list[tuple[int, int]] = []
    # In float32: in float64 Gemma 2 makes NaN of padding that is longer than its window.
    skeleton = skeleton_of(saved, case, torch.float32)
    exam = of_classes(batches)
    rows = examined(skeleton, exam, lambda done, total: said.append((done, total)))
    assert exam.count(rows) == 20
    assert exam.measures["accuracy"](rows) == 13 / 20
    assert said[-1] == (len(skeleton.blocks), len(skeleton.blocks))


@pytest.mark.parametrize("case", ["llama-lm", "opt-lm", "bert-classification"])
def test_logits_that_are_not_finite_are_an_error(case: str, saved: Saved) -> None:
    """The checkpoint is finite, the logits overflow: nothing is dropped to make a number."""
    skeleton = skeleton_of(saved, case, torch.float32)
    head: Any = skeleton.model.get_output_embeddings() or skeleton.model.get_submodule("classifier")
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor(1), torch.inf))
    if case.endswith("lm"):
        with pytest.raises(NumericsError, match="NaN or infinite logits on the evaluation text"):
            perplexity(skeleton, [Batch(TEXT[None])])
    else:
        with pytest.raises(NumericsError, match="NaN or infinite logits on the labelled examples"):
            examined(skeleton, of_classes([Batch(TEXT[None], None, torch.tensor([0]))]))


def test_half_precision_overflow_is_an_error(saved: Saved, tmp_path: Any) -> None:
    """Finite float32 weights whose logits only float16 cannot hold."""
    path = saved("llama-lm")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"] * 4e5
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert perplexity(Skeleton(Checkpoint(tmp_path), CPU, torch.float32), [Batch(TEXT[None])]).value > 1
    with pytest.raises(NumericsError):
        perplexity(Skeleton(Checkpoint(tmp_path), CPU, torch.float16), [Batch(TEXT[None])])
