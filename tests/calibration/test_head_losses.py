"""Heads with a loss of their own: what they are calibrated on, and gradients against those of transformers' losses."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.capture import capture, numbered
from lowrank_compress.calibration.cells import Cell
from lowrank_compress.calibration.labelled import labelled_batches, read_labelled
from lowrank_compress.calibration.masking import READINGS, Frame, frame_of, masked_windows, read_in_parts
from lowrank_compress.calibration.sources import Source
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.evaluation.chunks import of_words
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.evaluation.exam import examined, of_classes
from lowrank_compress.evaluation.replayed import perplexity
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import IGNORED, Batch, pair_rows
from lowrank_compress.model.walk.head import head_gradient, scored_chunks
from lowrank_compress.model.walk.walk import Walk
from tests.tiny import PAD, random_model, tiny_config, tiny_text, tiny_tokenizer

CPU = torch.device("cpu")
NAMES = frozenset({"in_gram", "out_fisher", "in_fisher"})
HEADS: dict[str, tuple[str, int]] = {
    "BertForMaskedLM": ("bert", 2),
    "BertForTokenClassification": ("bert", 5),
    "RobertaForQuestionAnswering": ("roberta", 2),
    "BertForSequenceClassification": ("bert", 1),
    "LlamaForSequenceClassification": ("llama", 1),
}


def written(name: str, place: Path) -> tuple[Path, PreTrainedModel]:
    """Write a model with a head and its tokenizer; return it in float64, too."""
    model_type, labels = HEADS[name]
    config = tiny_config(model_type, "classification", num_labels=labels)
    model: Any = getattr(transformers, name)(config)
    state = random_model(config, "classification").state_dict()
    model.load_state_dict(state, strict=False)
    model.save_pretrained(place)
    tokenizer = tiny_tokenizer(place)
    tokenizer.mask_token = "<unk>"
    tokenizer.save_pretrained(place)
    return place, getattr(transformers, name).from_pretrained(place, dtype=torch.float64).eval()


def rows_for(name: str, place: Path) -> tuple[Source, int]:
    """Write a table for a head; its source, and how many rows it has."""
    words = [tiny_text(300, seed=3).split()[start : start + 6] for start in range(0, 24, 6)]
    if "Token" in name:
        table = [{"words": each, "tags": [f"LABEL_{len(word) % 5}" for word in each]} for each in words]
        columns = ("words", "tags")
    elif "Question" in name:
        table = [
            {"q": each[0], "c": " ".join(each[1:]), "a": {"text": [f"{each[2]} {each[3]}"], "answer_start": [at]}}
            for each in words
            for at in [len(each[1]) + 1]
        ]
        columns = ("q,c", "a")
    else:
        table = [{"chosen": " ".join(each), "rejected": " ".join(each[:3])} for each in words]
        columns = ("chosen,rejected", None)
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return Source(str(path), *columns), len(table)


def batches_for(name: str, skeleton: Skeleton, place: Path, size: int = 4) -> list[Batch]:
    checkpoint = skeleton.blueprint.checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    if skeleton.task == "masked":
        ids = torch.tensor(tokenizer(tiny_text(300), add_special_tokens=False)["input_ids"])
        return masked_windows(ids[:60].view(4, 15), frame_of(tokenizer), size, seed=1)
    source, count = rows_for(name, place)
    task: Any = skeleton.task
    labelled = read_labelled(task, source, tokenizer)
    return labelled_batches(task, labelled, range(count), tokenizer, checkpoint, 40, size)


def own_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Sum a batch's losses as transformers has them, one sequence at a time and unpadded; and how many they are."""
    assert batch.labels is not None
    rows = [ids if batch.mask is None else ids[batch.mask[row].bool()] for row, ids in enumerate(batch.ids)]
    total, terms = torch.zeros((), dtype=torch.float64), 0
    if batch.paired:
        for one, other in pair_rows(len(rows) // 2).tolist():
            scores = [model(input_ids=rows[row][None]).logits[0, 0] for row in (one, other)]
            total, terms = total - nn.functional.logsigmoid(scores[0] - scores[1]), terms + 1
        return total, terms
    for ids, labels in zip(rows, batch.labels, strict=True):
        if type(model).__name__.endswith("QuestionAnswering"):
            own = {"start_positions": labels[:1], "end_positions": labels[1:]}
            count = 2
        else:
            own, count = {"labels": labels[None]}, int((labels != -100).sum())
        total, terms = total + model(input_ids=ids[None], **own).loss * count, terms + count
    return total, terms


def reference(
    model: PreTrainedModel, paths: list[str], loss_of: Callable[[], tuple[Tensor, int]]
) -> dict[str, dict[str, Tensor]]:
    """Each statistic by its definition, from autograd through the whole model."""
    seen: dict[str, list[Any]] = defaultdict(list)
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen[path].append((args[0], out))
        )
        for path in paths
    ]
    loss, terms = loss_of()
    for handle in handles:
        handle.remove()
    found: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        g = torch.cat(
            [part.flatten(0, 1) for part in torch.autograd.grad(loss, [o for _, o in seen[path]], retain_graph=True)]
        )
        x = torch.cat([given.detach().flatten(0, 1) for given, _ in seen[path]])
        delta = g @ model.get_submodule(path).get_parameter("weight").detach()
        found[path] = {"in_gram": x.T @ x / len(x), "out_fisher": g.T @ g / terms, "in_fisher": delta.T @ delta / terms}
    return found


def check_statistics(
    skeleton: Skeleton,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    loss_of: Callable[[PreTrainedModel, Batch], tuple[Tensor, int]],
) -> None:
    """Hold what is captured against gradients of the whole model; `loss_of` sums losses, and says how many they are."""
    paths = [target.name for target in skeleton.resolved.targets]

    def summed() -> tuple[Tensor, int]:
        parts = [loss_of(model, batch) for batch in batches]
        return sum((loss for loss, _ in parts), torch.zeros(())), sum(terms for _, terms in parts)

    expected = reference(model, paths, summed)
    for found in capture(skeleton, batches, dict.fromkeys(paths, NAMES), skip=lambda block: False):
        for target in skeleton.resolved.of_block(found.block):
            for statistic, value in expected[target.name].items():
                key = f"{target.reads if statistic == 'in_gram' else target.name}/{statistic}"
                error = (found.means[key] - value).abs().max()
                assert error <= 1e-9 * value.abs().max(), (key, float(error))
                assert value.abs().max() > 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_transformers_own_loss(name: str, tmp_path: Path) -> None:
    path, model = written(name, tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    batches = batches_for(name, skeleton, tmp_path)
    check_statistics(skeleton, model, batches, own_loss)


@pytest.mark.parametrize("name", HEADS)
def test_measures_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    path, model = written(name, tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    batches = batches_for(name, skeleton, tmp_path)
    parts = [own_loss(model, batch) for batch in batches]
    if skeleton.task == "masked":
        measured = perplexity(skeleton, batches)
        assert measured.tokens == sum(terms for _, terms in parts)
        assert measured.nats == pytest.approx(float(sum(loss.detach() for loss, _ in parts)), rel=1e-6)  # pyright: ignore
        early, late = perplexity(skeleton, batches, bounds=[0, 6, 99], head_tokens=5).parts
        assert early.tokens == sum(int((batch.labels[:, :6] != IGNORED).sum()) for batch in batches)  # pyright: ignore
        assert 0 < early.tokens < measured.tokens == early.tokens + late.tokens
        assert early.nats + late.nats == pytest.approx(measured.nats, rel=1e-10)
        return
    if skeleton.task == "answers":
        return  # tests/evaluation/test_exam.py
    right, count = 0, 0
    for batch in batches:
        assert batch.labels is not None
        with torch.no_grad():
            found: Any = model(input_ids=batch.ids, attention_mask=batch.mask)
        if batch.paired:
            scores = found.logits[pair_rows(len(batch.ids) // 2), 0]
            right, count = right + int((scores[:, 0] > scores[:, 1]).sum()), count + len(scores)
        else:
            there = batch.labels != IGNORED
            right += int((found.logits.argmax(-1) == batch.labels)[there].sum())
            count += int(there.sum())
    words = {number: f"LABEL_{number}" for number in range(5)}
    exam = of_words(batches, words) if skeleton.task == "tokens" else of_classes(batches)
    rows = examined(skeleton, exam)
    assert exam.count(rows) == count
    assert exam.measures["accuracy"](rows) == pytest.approx(right / count, rel=1e-12)
    assert count in (4, 24)


def test_divergence_is_of_what_has_a_label(tmp_path: Path) -> None:
    """Of masked tokens only, as the loss: the others change nothing."""
    path, model = written("BertForMaskedLM", tmp_path / "one")
    other = tmp_path / "other"
    changed = type(model).from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        changed.get_parameter("bert.encoder.layer.1.output.dense.weight").mul_(0.5)
    changed.save_pretrained(other)
    tiny_tokenizer(other)
    skeletons = [Skeleton(Checkpoint(each), CPU, torch.float64) for each in (path, other)]
    batches = batches_for("BertForMaskedLM", skeletons[0], tmp_path)
    total, terms = 0.0, 0
    for batch in batches:
        assert batch.labels is not None
        there = batch.labels != IGNORED
        with torch.no_grad():
            p, q = (each(input_ids=batch.ids).logits[there].log_softmax(-1) for each in (model, changed.double()))
        total, terms = total + float((p.exp() * (p - q)).sum()), terms + int(there.sum())
    assert divergences(skeletons, batches) == [pytest.approx(total / terms, rel=1e-6)]
    assert total / terms > 1e-6


@pytest.mark.parametrize("name", HEADS)
def test_labels_are_drawn_where_there_are_labels(name: str, tmp_path: Path) -> None:
    path, _ = written(name, tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    walk = Walk([skeleton], numbered(batches_for(name, skeleton, tmp_path)))
    for _ in walk.forwards():
        pass
    changed = 0
    for number, batch in enumerate(walk.batches):
        drawn = Again(skeleton, seed=2).labelled(walk, number)
        assert batch.labels is not None
        assert drawn.labels is not None
        assert torch.equal(drawn.ids, batch.ids)
        assert torch.equal(drawn.labels == IGNORED, batch.labels == IGNORED)
        changed += int((drawn.labels != batch.labels).sum())
        assert (drawn.labels < 96).all()
    assert changed > 0


def test_few_logits_at_a_time_give_the_same_gradient(tmp_path: Path) -> None:
    path, _ = written("BertForMaskedLM", tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    walk = Walk([skeleton], batches_for("BertForMaskedLM", skeleton, tmp_path))
    for _ in walk.forwards():
        pass
    batch, hidden = walk.batches[0], walk.leaving(0)
    whole, parts = (head_gradient(walk.replay(), batch, hidden, tokens) for tokens in (1 << 12, 8))
    assert len(list(scored_chunks("masked", batch, 8))) > 2
    assert (whole - parts).abs().max() <= 1e-12 * whole.abs().max()
    assert whole.abs().max() > 0


FRAME = Frame((1,), (2, 2), 95)


def test_every_token_is_masked_once_in_several_readings() -> None:
    windows = [torch.arange(4, 24), torch.arange(30, 39), torch.arange(50, 53)]
    batches = read_in_parts(windows, FRAME, 3, seed=5)
    told = torch.cat([batch.labels[batch.labels != IGNORED] for batch in batches if batch.labels is not None])
    assert sorted(told.tolist()) == sorted(torch.cat(windows).tolist())
    assert sum(len(batch.ids) for batch in batches) == 2 * READINGS + 3
    for batch in batches:
        assert batch.labels is not None
        assert ((batch.ids == 95) == (batch.labels != IGNORED)).all()
        assert batch.ids[:, 0].tolist() == [1] * len(batch.ids)
        assert batch.ids[:, -2:].unique().tolist() == [2]


def test_places_of_masks_follow_from_seed_and_number() -> None:
    windows = list(torch.arange(4, 84).view(4, 20))
    whole = masked_windows(windows, FRAME, 4, seed=5)[0]
    assert whole.labels is not None
    assert (whole.labels != IGNORED).sum(-1).tolist() == [3, 3, 3, 3]
    later = masked_windows(windows, FRAME, 4, seed=5, skip=1)[0]
    assert torch.equal(later.ids, whole.ids[1:])
    assert not torch.equal(masked_windows(windows, FRAME, 4, seed=6)[0].ids, whole.ids)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no mask token; expected mask_token in tokenizer_config\.json"):
        frame_of(tiny_tokenizer(tmp_path))


@pytest.mark.parametrize("pairs", range(1, 7))
def test_both_of_a_pair_are_of_one_half(pairs: int) -> None:
    rows = pair_rows(pairs)
    assert sorted(rows.flatten().tolist()) == list(range(2 * pairs))
    assert (rows % 2).diff(dim=1)[: pairs - pairs % 2].eq(0).all()


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path) -> None:
    path, _ = written("BertForTokenClassification", tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for batch in batches_for("BertForTokenClassification", skeleton, tmp_path):
        assert batch.labels is not None
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            words = tokenizer.decode(ids[1:]).split()
            begun = [len(tokenizer.decode(ids[1:end]).split()) for end in range(1, len(ids) + 1)]
            begins = [IGNORED] + [
                len(words[now - 1]) % 5 if now > before else IGNORED for before, now in itertools.pairwise(begun)
            ]
            assert labels.tolist() == begins
            assert len(words) == 6


def test_an_answer_beyond_the_text_that_is_read_is_at_the_first_token(tmp_path: Path) -> None:
    path, _ = written("RobertaForQuestionAnswering", tmp_path)
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(path), Checkpoint(path)
    source, _ = rows_for("Question", tmp_path)
    labelled = read_labelled("answers", source, tokenizer)
    (batch,) = labelled_batches("answers", labelled, [0], tokenizer, checkpoint, 40, 1)
    assert batch.labels is not None
    first, last = batch.labels[0].tolist()
    question = labelled.examples[0]
    begin, end = question.answer
    assert tokenizer.decode(batch.ids[0, first : last + 1]).strip() == question.context[begin:end]
    (short,) = labelled_batches("answers", labelled, [0], tokenizer, checkpoint, first + 1, 1)
    assert short.labels is not None
    assert short.labels.tolist() == [[0, 0]]
    assert short.ids.shape[1] == first + 1


def test_padding_of_pairs_is_masked(tmp_path: Path) -> None:
    path, _ = written("LlamaForSequenceClassification", tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    batches = batches_for("LlamaForSequenceClassification", skeleton, tmp_path)
    assert [(len(batch.ids), batch.terms) for batch in batches] == [(4, 2), (4, 2)]
    for batch in batches:
        assert batch.mask is not None
        assert torch.equal(batch.mask == 0, batch.ids == PAD)
        for one, other in pair_rows(2).tolist():
            assert batch.mask[one].sum() > batch.mask[other].sum()


def cell(value: object) -> Cell:
    return Cell(value, "Row 3", "answers", "rows.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("elsewhere", "Row 3 .*'elsewhere', which does not stand in the text"),
        ({"text": ["b"], "answer_start": [0]}, "'b', which does not stand in the text"),
        ({"text": ["b"]}, "Expected an answer: a text, or text and answer_start"),
        (7, "has a int .*Expected an answer"),
    ],
)
def test_bad_answers_are_named(value: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        cell(value).answer("a b c")


def test_answers_are_found() -> None:
    assert cell("b c").answer("a b c") == (2, 5)
    assert cell({"text": ["a", "x"], "answer_start": [4, 9]}).answer("a b a") == (4, 5)
    assert cell({"text": [], "answer_start": []}).answer("a") is None
    assert cell("").answer("a") is None


def test_words_and_labels_of_unequal_number_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"w": ["a", "b"], "t": "X"}) + "\n")
    with pytest.raises(CalibrationError, match="has 2 words and 1 labels; expected one for each word"):
        read_labelled("tokens", Source(str(tmp_path / "rows.jsonl"), "w", "t"), tiny_tokenizer(tmp_path))
    with pytest.raises(CalibrationError, match=r"has a int .*Expected a list of words"):
        cell(3).words()
    with pytest.raises(CalibrationError, match="Expected a list of labels"):
        cell(None).labels()
