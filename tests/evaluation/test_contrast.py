"""Two models side by side, one block of each in memory, against both whole in memory with hooks, of every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lowrank_compress.calibration.windows import evaluation_windows, window_batches
from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.contrast import contrast
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch, pair_rows
from tests.ordinary import load, padded, tokens
from tests.tiny import MODELS, tiny_config, tiny_model

CPU = torch.device("cpu")
TEXT = tokens(70, seed=7)[0]


def pair(case: str, place: Path) -> tuple[Path, Path]:
    """A model, and one that is near it."""
    model_type, task, fields = MODELS[case]
    model: Any = tiny_model(model_type, task, **fields)
    model.save_pretrained(place / "a")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(place / "b")
    return place / "a", place / "b"


def blocks_of(model: Any) -> list[Any]:
    (found,) = (
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.split(".")[-1] in ("layers", "layer", "h")
    )
    return list(found)


class Seen:
    """What a model's blocks are called with and return, and its logits."""

    def __init__(self, model: Any, **given: Tensor) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.out: list[Tensor] = []
        handles = []
        for block in blocks_of(model):
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
                )
            )
            handles.append(block.register_forward_hook(lambda _, args, out: self.out.append(out)))
        with torch.no_grad():
            self.logits = model(**given).logits
        for handle in handles:
            handle.remove()


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """‖h' − h‖ / ‖h‖ of all tokens of all windows."""
    one, other = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*pairs, strict=True))
    return float((other - one).norm() / one.norm())


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "gemma2-lm"])
def test_equals_whole_models(case: str, tmp_path: Path) -> None:
    paths = pair(case, tmp_path)
    windows = evaluation_windows(TEXT, 20, 1)
    said: list[tuple[int, int]] = []
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in paths)
    found = contrast(one, other, window_batches(windows, 2), lambda *done: said.append(done), head_tokens=7)
    models = [load(path, "lm") for path in paths]
    seen = [
        [Seen(model, input_ids=window[None], use_cache=torch.tensor(False)) for model in models] for window in windows
    ]
    for number, block in enumerate(blocks_of(models[1])):
        assert found.blocks[number].error.relative == pytest.approx(
            relative([(a.out[number], b.out[number]) for a, b in seen]), rel=1e-10
        )
        alone = []
        for a, _ in seen:
            args, kwargs = a.calls[number]
            with torch.no_grad():
                alone.append((a.out[number], block(*args, **kwargs)))
        assert found.blocks[number].own.relative == pytest.approx(relative(alone), rel=1e-10)
        cosines = [torch.cosine_similarity(a.out[number], b.out[number], dim=-1).flatten() for a, b in seen]
        assert found.blocks[number].error.cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-10)
    entering = [(_first(a), _first(b)) for a, b in seen]
    assert found.embedding.relative == pytest.approx(relative(entering), rel=1e-10)
    assert found.blocks[0].own.relative != pytest.approx(found.blocks[0].error.relative, rel=1e-3)
    divergence, agreeing, count = 0.0, 0, 0
    for number, (window, (a, b)) in enumerate(zip(windows, seen, strict=True)):
        p, q = (each.logits[0, :-1].log_softmax(-1) for each in (a, b))
        divergence += float((p.exp() * (p - q)).sum())
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
        for model, logs in enumerate((p, q)):
            nats = -float(logs.gather(1, window[1:, None]).sum())
            assert found.losses[model][number] == pytest.approx(nats, rel=1e-10)
    assert found.divergence == pytest.approx(divergence, rel=1e-9)
    assert (found.agreeing, found.choices) == (agreeing, count)
    assert found.terms == [len(window) - 1 for window in windows]
    blocks = len(blocks_of(models[0]))
    assert said == [(done, blocks) for done in range(1, blocks + 1)]


def _first(seen: Seen) -> Tensor:
    args, kwargs = seen.calls[0]
    return args[0] if args else kwargs["hidden_states"]


def test_several_passes_do_not_matter(tmp_path: Path) -> None:
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in pair("llama-lm", tmp_path))
    batches = window_batches(evaluation_windows(TEXT, 20, 1), 1)
    whole = contrast(one, other, batches)
    found = contrast(one, other, batches, carried=2 * 20 * 32 * 8)
    assert found.blocks[1].error.relative == pytest.approx(whole.blocks[1].error.relative, rel=1e-12)
    assert found.losses == (pytest.approx(whole.losses[0]), pytest.approx(whole.losses[1]))


def test_a_model_with_itself(tmp_path: Path) -> None:
    path, _ = pair("llama-lm", tmp_path)
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float32) for _ in range(2))
    found = contrast(one, other, [Batch(TEXT[None])])
    assert [block.error.relative for block in found.blocks] == [0.0, 0.0]
    assert (found.divergence, found.agreeing) == (0.0, found.choices)
    assert found.blocks[0].error.cosine == pytest.approx(1)


def test_padding_of_classifiers_counts_for_nothing(tmp_path: Path) -> None:
    paths = pair("bert-classification", tmp_path)
    sequences = tokens(9, 12, 7, 15, seed=3)
    labels = torch.tensor([0, 1, 2, 1])
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in paths)
    ids, mask = padded(sequences)
    found = contrast(one, other, [Batch(ids, mask, labels)])
    models = [load(path, "classification") for path in paths]
    seen = [[Seen(model, input_ids=ids[None]) for model in models] for ids in sequences]
    for number in range(2):
        assert found.blocks[number].error.relative == pytest.approx(
            relative([(a.out[number], b.out[number]) for a, b in seen]), rel=1e-6
        )
    logs = [[each.logits[0].log_softmax(-1) for each in both] for both in seen]
    assert found.terms == [1] * 4
    for model in (0, 1):
        expected = [-float(both[model][label]) for both, label in zip(logs, labels, strict=True)]
        assert found.losses[model] == pytest.approx(expected, rel=1e-6)
    assert found.divergence == pytest.approx(sum(float((p.exp() * (p - q)).sum()) for p, q in logs), rel=1e-5)


# What tokens, or texts, should be said to be.
TEXTS = torch.stack(tokens(8, 8, 8, 8, seed=4))
WORDS = torch.full((4, 8), IGNORED).index_put((torch.tensor([0, 0, 1, 3]), torch.tensor([1, 5, 2, 7])), torch.tensor(1))
HEADS: dict[str, tuple[dict[str, Any], Batch]] = {
    "MaskedLM": ({}, Batch(TEXTS, labels=WORDS)),
    "TokenClassification": ({"num_labels": 3}, Batch(TEXTS, labels=WORDS)),
    "QuestionAnswering": ({"num_labels": 2}, Batch(TEXTS, labels=torch.tensor([[1, 3], [0, 0], [7, 7], [2, 6]]))),
    "regression": (
        {"num_labels": 2, "problem_type": "regression"},
        Batch(TEXTS, labels=torch.tensor([[0.5, 1], [2, -1], [0, 0], [3, 1]], dtype=torch.float64), outputs=2),
    ),
    "labels": (
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        Batch(TEXTS, labels=torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double(), outputs=3),
    ),
    "pairs": ({"num_labels": 1}, Batch(TEXTS, labels=torch.zeros(2, dtype=torch.int64), paired=True)),
}


def own_loss(head: str, model: Any, batch: Batch, number: int) -> float:
    """Sum of the terms of transformers' own loss of a sequence, or of a pair."""
    rows = pair_rows(2)[number] if head == "pairs" else torch.tensor([number])
    assert batch.labels is not None
    labels = batch.labels[number : number + 1]
    with torch.no_grad():
        if head == "pairs":
            chosen, rejected = model(input_ids=batch.ids[rows]).logits[:, 0]
            return -float(torch.nn.functional.logsigmoid(chosen - rejected))
        if head == "QuestionAnswering":
            ends = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
            return 2 * float(model(input_ids=batch.ids[rows], **ends).loss)
        terms = int((labels != IGNORED).sum())
        if not terms:
            return 0.0
        mean = float(model(input_ids=batch.ids[rows], labels=labels).loss)
        return mean * terms / (2 if head == "regression" else 1)


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_other_heads(head: str, tmp_path: Path) -> None:
    fields, batch = HEADS[head]
    name = f"BertFor{head}" if head[0].isupper() else "BertForSequenceClassification"
    torch.manual_seed(0)
    made: Any = getattr(transformers, name)(tiny_config("bert", "classification", **fields)).double()
    for place in ("a", "b"):
        made.save_pretrained(tmp_path / place)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    one, other = (Skeleton(Checkpoint(tmp_path / place), CPU, torch.float64) for place in "ab")
    seen: list[tuple[int, Tensor]] = []

    def judge(number: int, outputs: Tensor) -> Any:
        seen.append((number, outputs))
        return np.full((2, 1), float(len(seen)))

    found = contrast(one, other, [batch, batch], judge=judge, carried=1, head_tokens=8)
    sequences = 2 if head == "pairs" else 4
    for side, place in enumerate("ab"):
        model = type(made).from_pretrained(tmp_path / place).eval()
        expected = [own_loss(head, model, batch, number) for number in range(sequences)]
        assert found.losses[side] == pytest.approx(2 * expected, rel=1e-9)
    per = {"regression": 2, "labels": 3, "QuestionAnswering": 2, "pairs": 1}.get(head)
    assert found.terms == 2 * ([2, 1, 0, 1] if per is None else [per] * sequences)
    assert found.loss(0) == pytest.approx(sum(found.losses[0]) / sum(found.terms))
    (apart,) = divergences([one, other], [batch])
    assert found.divergence / sum(found.terms) == pytest.approx(apart, rel=1e-9)
    assert found.choices == (0 if head == "regression" else sum(found.terms))
    if head != "MaskedLM":  # of text, with the logits of few tokens at once
        assert [number for number, _ in seen] == [0, 0, 1, 1]
        assert [[float(rows[0, 0]) for rows in side] for side in found.rows] == [[1.0, 3.0], [2.0, 4.0]]
    if head == "labels":
        assert found.agreeing == 2 * int(((seen[0][1] > 0) == (seen[1][1] > 0)).sum())


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float32) for path in pair("llama-lm", tmp_path))
    head: Any = other.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor(1), torch.inf))
    with pytest.raises(NumericsError, match="The second model gave NaN or infinite logits on the text"):
        contrast(one, other, [Batch(TEXT[None])])
