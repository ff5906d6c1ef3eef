"""Regressions and classifiers of several labels: what tables say of them, and gradients against those of autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lowrank_compress.calibration.again import Again
from lowrank_compress.calibration.capture import numbered
from lowrank_compress.calibration.several import marked_batches, read_marked
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.windows import batches_hash
from lowrank_compress.errors import CalibrationError, InputError, LrcError
from lowrank_compress.evaluation.divergence import divergences
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.tasks import Task, task_of
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.outputs import drawn_labels, random_signs, summed_loss
from lowrank_compress.model.walk.walk import Walk
from tests.calibration.test_head_losses import check_statistics
from tests.tiny import random_model, tiny_config, tiny_text, tiny_tokenizer

CPU = torch.device("cpu")
WORDS = tiny_text(400, seed=3).split()
TEXTS = [" ".join(WORDS[start : start + 4 + start % 3]) for start in range(0, 25, 5)]
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "one score": ("bert", {"num_labels": 1}),
    "three scores": ("bert", {"num_labels": 3, "problem_type": "regression"}),
    "labels": ("bert", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "labels of a decoder": ("llama", {"num_labels": 3, "problem_type": "multi_label_classification"}),
}


def written(head: str, place: Path, factor: float = 1.0) -> tuple[Path, PreTrainedModel]:
    """Write a model with such a head and its tokenizer; return it in float64, too."""
    model_type, fields = HEADS[head]
    model: Any = random_model(tiny_config(model_type, "classification", **fields), "classification")
    with torch.no_grad():
        next(
            p for name, p in model.named_parameters() if name.endswith("1.output.dense.weight") or "1.mlp.down" in name
        ).mul_(factor)
    model.save_pretrained(place)
    tiny_tokenizer(place)
    return place, type(model).from_pretrained(place, dtype=torch.float64).eval()


def table(place: Path, labels: list[Any] | None) -> Source:
    """Write a table of texts, and of labels where there are some."""
    rows = [{"text": text} | ({} if labels is None else {"y": labels[row]}) for row, text in enumerate(TEXTS)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(place / "rows.jsonl"), "text", None if labels is None else "y")


def batches_for(path: Path, source: Source) -> list[Batch]:
    checkpoint = Checkpoint(path)
    examples = read_marked(task_of(checkpoint.config), source, checkpoint)
    return numbered(marked_batches(examples, AutoTokenizer.from_pretrained(path), checkpoint, 40, 2))


def outputs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of each sequence by itself."""
    return torch.cat([model(input_ids=ids[None]).logits for ids in batch.ids])


def own_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """What gradients are of: scores with random signs, or the loss of labels that a table says or the model draws."""
    count = model.config.num_labels
    if model.config.problem_type != "multi_label_classification":
        found = outputs(model, batch)
        return (found * random_signs(found.shape, batch.first)).sum(), found.numel()
    if batch.labels is None:
        found = outputs(model, batch)
        right = drawn_labels(found, batch.first)
        return nn.functional.binary_cross_entropy_with_logits(found, right, reduction="sum"), found.numel()
    pairs = zip(batch.ids, batch.labels, strict=True)
    each = [model(input_ids=ids[None], labels=labels[None]).loss for ids, labels in pairs]
    return torch.stack(each).sum() * count, len(each) * count


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_whole_model(head: str, labelled: bool, tmp_path: Path) -> None:
    path, model = written(head, tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    count = model.config.num_labels
    said = [[float(row % (place + 2) == 0) for place in range(count)] for row in range(len(TEXTS))]
    batches = batches_for(path, table(tmp_path, said if labelled else None))
    assert sum(batch.terms for batch in batches) == len(TEXTS) * count
    check_statistics(skeleton, model, batches, own_loss)


def test_signs_make_the_gauss_newton_matrix_on_average() -> None:
    """E[v vᵀ] = I, so that E[Jᵀv vᵀJ] = JᵀJ; and what is drawn is of a sequence's number alone."""
    signs = random_signs(torch.Size([4000, 3]), 5).double()
    assert signs.abs().eq(1).all()
    assert (signs.T @ signs / len(signs) - torch.eye(3)).abs().max() < 0.05
    assert torch.equal(random_signs(torch.Size([2, 3]), 7), random_signs(torch.Size([4, 3]), 5)[2:])


def test_labels_are_drawn_as_the_model_says() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0]).repeat(4000, 1)
    drawn = drawn_labels(logits, 0)
    assert (drawn.mean(0) - logits[0].sigmoid()).abs().max() < 0.03
    assert torch.equal(drawn_labels(logits[:2], 9), drawn_labels(logits[:4], 7)[2:])


@pytest.mark.parametrize("head", HEADS)
def test_the_second_look_draws_labels_and_none_for_scores(head: str, tmp_path: Path) -> None:
    path, model = written(head, tmp_path)
    skeleton = Skeleton(Checkpoint(path), CPU, torch.float64)
    batches = batches_for(path, table(tmp_path, [[0.0] * model.config.num_labels] * len(TEXTS)))
    walk = Walk([skeleton], batches)
    for _ in walk.forwards():
        pass
    for number, batch in enumerate(batches):
        found = Again(skeleton, seed=2).labelled(walk, number)
        with torch.no_grad():
            wanted = drawn_labels(outputs(model, batch), 2 + batch.first) if "labels" in head else batch.labels
        assert found.labels is not None
        assert wanted is not None
        assert torch.equal(found.labels, wanted)


@pytest.mark.parametrize("head", HEADS)
def test_divergence_is_of_the_outputs(head: str, tmp_path: Path) -> None:
    one, other = written(head, tmp_path / "one"), written(head, tmp_path / "other", 0.5)
    batches = batches_for(one[0], table(tmp_path, None))
    total, terms = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            wanted, found = (outputs(model, batch) for _, model in (one, other))
        if "labels" in head:
            p, q = wanted.sigmoid(), found.sigmoid()
            total += float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())
        else:
            total += float((wanted - found).square().sum()) / 2
        terms += wanted.numel()
    skeletons = [Skeleton(Checkpoint(path), CPU, torch.float64) for path, _ in (one, other)]
    assert divergences(skeletons, batches) == [pytest.approx(total / terms, rel=1e-9)]
    assert total / terms > 1e-6


def marks(place: Path, value: Any, column: str = "y", **more: Any) -> list[list[float]]:
    """What a row with such a value is read as, for a model with the labels joy, anger and fear."""
    config = tiny_config("bert", "classification", num_labels=3, problem_type="multi_label_classification", **more)
    config.id2label = dict(enumerate(["joy", "anger", "fear"]))
    config.label2id = {label: number for number, label in config.id2label.items()}
    random_model(config, "classification").save_pretrained(place)
    row = {"text": "a"} | (value if isinstance(value, dict) else {"y": value})
    (place / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return read_marked("labels", Source(str(place / "rows.jsonl"), "text", column), Checkpoint(place)).labels or []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["anger", "joy"], [1, 1, 0]),
        ([2], [0, 0, 1]),
        (1, [0, 1, 0]),
        ("fear", [0, 0, 1]),
        ("joy; fear", [1, 0, 1]),
        ("0;2", [1, 0, 1]),
        ("", [0, 0, 0]),
        ([], [0, 0, 0]),
        ([1.0, 0.0, 1.0], [1, 0, 1]),
        ([False, False, True], [0, 0, 1]),
    ],
)
def test_labels_that_apply(value: Any, expected: list[float], tmp_path: Path) -> None:
    assert marks(tmp_path, value) == [expected]


def test_a_column_for_each_label_is_found_by_its_name(tmp_path: Path) -> None:
    assert marks(tmp_path, {"fear": "1", "joy": 0, "anger": True}, "fear,joy,anger") == [[0, 1, 1]]
    assert marks(tmp_path, {"a,b": ["joy"]}, "a,b") == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("value", "column", "message"),
    [
        ("rage", "y", "The label 'rage' is none of the model's classes: anger"),
        ([7], "y", "The label '7' is none"),
        (None, "y", "has nothing in the column 'y'. Expected a list of labels"),
        (2.5, "y", "has a float in the column 'y'. Expected a list of labels"),
        ([1.0, 0.0], "y", "has a list of 2 in y, each true or false, and the model has 3 labels"),
        ([0, 1, 0], "y", "names a label twice in y: .0, 1, 0.. Name those that apply, or write 1.0 and 0.0"),
        ([1.0, "joy"], "y", "has a list of unlike values"),
        ([0.5, 0.0, 1.0], "y", "Expected 1 or 0, true or false"),
        (
            {"joy": 1, "anger": 0},
            "joy,anger",
            "names the columns joy, anger, and the model's labels are joy, anger, fear",
        ),
        ({"joy": 1, "anger": 0, "y": 1}, "joy,anger,y", "expected one column for each label, of its name"),
        ({"joy": 1, "anger": 0, "fear": "yes"}, "joy,anger,fear", "Expected 1 or 0, true or false"),
        ({"joy": 1, "anger": 0}, "joy,anger,fear", "has no column 'fear'"),
    ],
)
def test_wrong_labels_are_named(value: Any, column: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LrcError, match=message):
        marks(tmp_path, value, column)


def scores(place: Path, rows: list[dict[str, Any]], column: str = "y", count: int = 1) -> list[list[float]]:
    config = tiny_config("bert", "classification", num_labels=count, problem_type="regression")
    random_model(config, "classification").save_pretrained(place)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_marked("scores", Source(str(place / "rows.jsonl"), "text", column), Checkpoint(place)).labels or []


def test_numbers_of_a_regression(tmp_path: Path) -> None:
    assert scores(tmp_path, [{"text": "a", "y": 2}, {"text": "b", "y": "-0.25"}]) == [[2], [-0.25]]
    assert scores(tmp_path, [{"text": "a", "y": [1, 2.5]}], count=2) == [[1, 2.5]]
    assert scores(tmp_path, [{"text": "a", "p": 1, "q": "3"}], "q,p", 2) == [[3, 1]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "Row|Line 1 of .* Expected a number"),
        (None, "has nothing in the column 'y'. Expected a number"),
        ("high", "has a str in the column 'y'. Expected a number"),
        (True, "has a bool in the column 'y'. Expected a number"),
        ([1, 2], "has 2 numbers in y, and the model gives 1 score; expected as many"),
    ],
)
def test_what_is_no_number_is_named(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        scores(tmp_path, [{"text": "a", "y": value}])


def test_an_empty_table_and_a_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no rows"):
        scores(tmp_path, [])
    with pytest.raises(InputError, match="has no column 'y'; it has text"):
        scores(tmp_path, [{"text": "a"}])


def test_a_hash_knows_fractions_of_labels() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    one, other = (Batch(ids, labels=torch.tensor([[value]], dtype=torch.float64)) for value in (0.25, 0.5))
    assert batches_hash([one]) != batches_hash([other])


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"num_labels": 1}, "scores"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "labels"),
        ({"num_labels": 2}, "classification"),
        ({"num_labels": 2, "problem_type": "regression"}, "scores"),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, "labels"),
    ],
)
def test_heads_are_told_by_their_problem(fields: dict[str, Any], task: Task) -> None:
    config = tiny_config("bert", "classification", **fields)
    config.architectures = [transformers.BertForSequenceClassification.__name__]
    assert task_of(config) == task


def test_the_loss_of_labels_is_that_of_torch() -> None:
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4, 3)).double()
    expected = -(y * nn.functional.logsigmoid(z) + (1 - y) * nn.functional.logsigmoid(-z)).sum()
    assert torch.allclose(summed_loss("labels", z, y), expected)
