"""What outputs are worth: answers, chunks of words, scores and labels, against values that were made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lowrank_compress.calibration.contexts import windows_of
from lowrank_compress.calibration.labelled import Question
from lowrank_compress.errors import CalibrationError
from lowrank_compress.evaluation.answering import LONGEST, Part, best_answer, of_answers, worth
from lowrank_compress.evaluation.chunks import chunks, make_chunks, of_words
from lowrank_compress.evaluation.exam import Exam, of_numbers, of_several
from lowrank_compress.model.walk.batch import IGNORED, Batch
from tests.runs import done
from tests.tiny import tiny_config, tiny_text, tiny_tokenizer

IDS = torch.zeros(1, 6, dtype=torch.int64)


def measured(exam: Exam, *outputs: Any) -> dict[str, float]:
    """Measure the outputs of each batch."""
    rows = np.concatenate([exam.judge(number, torch.as_tensor(each)) for number, each in enumerate(outputs)])
    return {name: float(measure(exam.examples(rows))) for name, measure in exam.measures.items()}


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 / 4),
        ("a  cat and a dog", ["the cat", "cat and dog"], 1, 1),
        ("Paris", ["Paris, France", "London"], 0, 2 / 3),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["a"], 1, 1),
        ("one one two", ["one three"], 0, 2 / 5),
    ],
)
def test_answers_as_squad_has_them(answer: str, right: list[str], exact: float, f1: float) -> None:
    assert worth(answer, right) == (exact, pytest.approx(f1))


CONTEXT = "ab cd ef gh"
PLACES = [None, None, (0, 2), (3, 5), (6, 8), (9, 11)]


def test_the_best_answer_is_of_the_text_and_does_not_end_before_it_begins() -> None:
    start = [9.0, 9.0, 1.0, 2.0, 5.0, 0.0]
    end = [9.0, 9.0, 4.0, 3.0, 0.0, 0.5]
    found = best_answer(Part(0, CONTEXT, (), PLACES, 0), torch.tensor([start, end]))
    # ef gh has 5 + 0.5; ef … ab would have 9.
    assert found == (5.5, "ef gh")


def test_an_answer_has_no_more_than_so_many_tokens() -> None:
    count = LONGEST + 5
    text = "a" * count
    part = Part(0, text, (), [(place, place + 1) for place in range(count)], 0)
    start, end = torch.zeros(count), torch.zeros(count)
    start[0], end[-1], end[LONGEST - 1] = 2, 2, 1
    assert best_answer(part, torch.stack([start, end])) == (3.0, "a" * LONGEST)


def test_answers_of_several_parts_and_none() -> None:
    """Question 0 is answered in its second part; 1 has no answer, which the model says of both; of 2 it is wrong."""
    one = [[0.0, 0, 3, 0, 0, 0], [0.0, 0, 3, 0, 0, 0]]  # ab: 6
    two = [[1.0, 0, 0, 0, 4, 0], [1.0, 0, 0, 0, 0, 4]]  # ef gh: 8
    none = [[5.0, 0, 0, 0, 0, 0], [5.0, 0, 0, 0, 1, 0]]  # nothing: 10
    parts = [
        [Part(0, CONTEXT, ("ef",), PLACES, 0), Part(1, CONTEXT, (), PLACES, 0)],
        [Part(0, CONTEXT, ("ef",), PLACES, 0), Part(1, CONTEXT, (), PLACES, 0), Part(2, CONTEXT, ("cd",), PLACES, 0)],
    ]
    exam = of_answers([Batch(IDS)] * 2, parts)
    found = measured(exam, [one, none], [two, none, none])
    assert found == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((2 / 3 + 1 + 0) / 3)}
    # Where every question has an answer, one is given.
    alone = of_answers([Batch(IDS)], [[Part(0, CONTEXT, ("ef",), PLACES, 0)]])
    assert measured(alone, [none]) == {"exact_match": 0.0, "f1": 0.5}  # ab cd ef


def test_long_texts_are_read_in_parts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    context = tiny_text(400, seed=2)
    found = windows_of(Question("ab", context, None), tokenizer, 40)
    assert len(found) > 3
    seen = {place for window in found for place in window.places if place is not None}
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert seen == set(map(tuple, whole))
    assert all(len(window.row.ids) <= 40 for window in found)
    assert all(window.row.labels == [window.first] * 2 for window in found)
    with pytest.raises(CalibrationError, match="leaves no room for its text in --seq-len 8"):
        windows_of(Question(context, context, None), tokenizer, 8)


def test_where_an_answer_is_in_each_part_of_a_long_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    context = tiny_text(400, seed=2)
    begin = context.index(" ", 60) + 1
    end = context.index(" ", begin + 12)
    holds = []
    for window in windows_of(Question("ab", context, (begin, end)), tokenizer, 40):
        assert isinstance(window.row.labels, list)
        first, last = map(int, window.row.labels)
        holds.append((first, last) != (window.first, window.first))
        if holds[-1]:
            assert tokenizer.decode(window.row.ids[first : last + 1]).strip() == context[begin:end]
        else:
            inside = [place for place in window.places if place]
            assert inside[0][0] > begin or inside[-1][1] < end
    assert True in holds
    assert False in holds


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", {("A", 0, 1), ("B", 3, 3)}),
        ("B-A B-A I-A", {("A", 0, 0), ("A", 1, 2)}),
        ("I-A I-A O", {("A", 0, 1)}),
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("S-A B-A E-A E-A", {("A", 0, 0), ("A", 1, 2), ("A", 3, 3)}),
        ("O O", set()),
        ("B-X-Y I-X-Y", {("X-Y", 0, 1)}),
    ],
)
def test_chunks_of_tags(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert chunks(tags.split()) == expected


def test_names_that_make_chunks() -> None:
    assert make_chunks(["O", "B-A", "I-A"])
    assert make_chunks(["B-A", "I-A", "E-A", "S-A"])
    assert not make_chunks(["O"])
    assert not make_chunks(["O", "NOUN"])
    assert not make_chunks(["O", "B-A", "X-A"])


def test_chunks_that_are_right() -> None:
    names = dict(enumerate(["O", "B-A", "I-A", "B-B", "I-B"]))
    labels = torch.tensor([[IGNORED, 1, 2, 0, IGNORED, 3], [1, 0, 0, 3, 4, IGNORED]])
    said = torch.tensor([[4, 1, 2, 0, 4, 0], [1, 0, 0, 3, 0, 1]])
    exam = of_words([Batch(IDS.repeat(2, 1), labels=labels)], names)
    outputs = torch.nn.functional.one_hot(said, 5)
    # A 0-1 and A 0 are right, of B 3 and of B 3-4 nothing is; 2 right, 3 found, 4 there; 4 - 1 + 5 - 1 words right.
    found = measured(exam, outputs)
    assert found == {"f1": pytest.approx(4 / 7), "precision": pytest.approx(2 / 3), "recall": 0.5, "accuracy": 7 / 9}
    assert exam.count(exam.judge(0, outputs)) == 9


def test_scores_against_numbers() -> None:
    wanted = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    batch = Batch(IDS.repeat(4, 1), labels=wanted, outputs=1)
    found = measured(of_numbers([batch]), torch.tensor([[1.0], [3.0], [2.0], [10.0]]))
    # Deviations −3 −1 −2 6 and −1.5 −.5 .5 1.5: 13 / √(50 · 5); ranks 1 3 2 4: 1 − 6 · 2 / (4 · 15).
    assert found["pearson"] == pytest.approx(13 / math.sqrt(250))
    assert found["spearman"] == pytest.approx(0.8)
    assert found["mse"] == pytest.approx((0 + 1 + 1 + 36) / 4)
    assert math.isnan(measured(of_numbers([batch]), torch.ones(4, 1))["pearson"])


def test_labels_that_are_found() -> None:
    there = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.float64)
    batch = Batch(IDS.repeat(4, 1), labels=there, outputs=3)
    said = torch.tensor([[2.0, -1, -1], [3, -1, -1], [1, 1, -1], [-1, -2, -1]])
    found = measured(of_several([batch]), said)
    # Label 0: 2 right, 3 found, 2 there. Label 1: 1, 1, 2. Label 2: nothing.
    assert found["f1_micro"] == pytest.approx(6 / 8)
    assert found["f1_macro"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert found["exact_match"] == 0.5


WORDS = tiny_text(900, seed=7).split()[:48]
TEXTS = [" ".join(WORDS[start : start + 6]) for start in range(0, 48, 6)]
HEADS: dict[str, tuple[str, dict[str, Any], list[Any], list[str]]] = {
    "regression": ("SequenceClassification", {"num_labels": 1}, [row / 3 for row in range(8)], ["pearson", "mse"]),
    "labels": (
        "SequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        [f"{row % 3};{(row + 1) % 3}" for row in range(8)],
        ["f1_micro", "f1_macro", "exact_match"],
    ),
    "chunks": (
        "TokenClassification",
        {"id2label": {0: "O", 1: "B-A", 2: "I-A"}, "label2id": {"O": 0, "B-A": 1, "I-A": 2}},
        [["B-A", "I-A", "O", "O", "B-A", "O"]] * 8,
        ["f1", "precision", "recall", "accuracy"],
    ),
    "answers": (
        "QuestionAnswering",
        {"num_labels": 2},
        [{"text": [text.split()[2]], "answer_start": [text.index(text.split()[2])]} for text in TEXTS],
        ["f1", "exact_match"],
    ),
}


def write_head(head: str, place: Path, seed: int = 0) -> Any:
    """Write a model with a head and its tokenizer."""
    name, fields, _, _ = HEADS[head]
    torch.manual_seed(seed)
    model = getattr(transformers, f"BertFor{name}")(tiny_config("bert", "classification", **fields))
    model.save_pretrained(place)
    tiny_tokenizer(place)
    return model


def write_table(head: str, place: Path) -> tuple[str, ...]:
    """Write a table for a head; return the options that name it."""
    rows: list[dict[str, Any]] = [{"text": text, "y": label} for text, label in zip(TEXTS, HEADS[head][2], strict=True)]
    columns = ("--text-column", "text", "--label-column", "y")
    if head == "answers":
        rows, columns = [{"q": "ab"} | row for row in rows], ("--text-column", "q", *columns)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--classification", str(place), *columns)


@pytest.mark.parametrize("head", HEADS)
def test_eval_says_all_measures(head: str, tmp_path: Path) -> None:
    labels, measures = HEADS[head][2:]
    model = write_head(head, tmp_path / "model")
    asked = ("eval", tmp_path / "model", *write_table(head, tmp_path / "rows.jsonl"))
    (found,) = done(*asked, "--json").json["classification"].values()
    assert found["metric"] == measures[0]
    assert set(found["metrics"]) >= set(measures)
    assert found["dense"] == found["metrics"][measures[0]]["dense"]
    assert found["n"] == (48 if head == "chunks" else 8)
    said = done(*asked).out
    assert all(f"{measure} · rows.jsonl" in said for measure in measures)
    if head == "regression":
        tokenizer, loaded = AutoTokenizer.from_pretrained(tmp_path / "model"), model.eval()
        with torch.no_grad():
            scores = [float(loaded(**tokenizer(text, return_tensors="pt")).logits) for text in TEXTS]
        assert found["dense"] == pytest.approx(np.corrcoef(scores, labels)[0, 1], rel=1e-4)
