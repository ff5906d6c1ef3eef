"""Words with tags: how many are right, and how many of the chunks that tags such as B-PER and I-PER make of them.

Chunks are counted as the CoNLL shared tasks do (Tjong Kim Sang and Buchholz, CoNLL 2000): one is right if its first
word, its last word and its kind are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank_compress.evaluation.exam import Exam, scored_places
from lowrank_compress.evaluation.measures import ACCURACY, CHUNKS, Rows
from lowrank_compress.model.walk.batch import Batch

OUTSIDE, BEGINS, GOES_ON = "O", ("B", "S"), ("I", "E")


def of_words(batches: Sequence[Batch], names: Mapping[int, str]) -> Exam:
    """Judge the class of each word at its first token, and the chunks, where the names of classes make such.

    Parameters
    ----------
    names
        Of the classes, by their numbers.
    """
    chunked = make_chunks(list(names.values()))

    def judge(number: int, outputs: Tensor) -> Rows:
        batch = batches[number]
        assert batch.labels is not None
        there, found = scored_places(batch), outputs.argmax(-1)
        rows = [_words(found[row][there[row]], batch.labels[row][there[row]]) for row in range(len(found))]
        if chunked:
            for row, sums in enumerate(rows):
                tags = [[names[int(each)] for each in part[row][there[row]]] for part in (found, batch.labels)]
                one, other = map(chunks, tags)
                sums += [len(one & other), len(one), len(other)]
        return torch.tensor(rows, dtype=torch.float64).numpy()

    measures = CHUNKS if chunked else ACCURACY
    return Exam(batches, judge, 5 if chunked else 2, measures, unit="words")


def _words(found: Tensor, right: Tensor) -> list[int]:
    return [int((found == right).sum()), len(right)]


def make_chunks(names: Sequence[str]) -> bool:
    """Whether names of classes are tags of chunks: O, and letters of BIO or BIOES with a kind behind a hyphen."""
    others = [name for name in names if name != OUTSIDE]
    letters = {name.partition("-")[0] for name in others if "-" in name}
    return bool(others) and all("-" in name for name in others) and letters <= {*BEGINS, *GOES_ON}


def chunks(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Find the chunks of a sequence of tags: kind, first and last word.

    A word goes on with the chunk of the one before if its letter says so and that one does not end it, and both have
    one kind; else it begins one, whatever its letter.
    """
    found, before, start = set(), OUTSIDE, 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, _, kind = tag.partition("-")
        last, _, last_kind = before.partition("-")
        goes_on = letter in GOES_ON and last in ("B", "I") and kind == last_kind
        if not goes_on:
            if before != OUTSIDE:
                found.add((last_kind, start, place - 1))
            start = place
        before = tag
    return found
