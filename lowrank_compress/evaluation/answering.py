"""Answers to questions that stand in a text: which one a model gives, and how well it meets those that are right.

Exact match and F1 are those of SQuAD (Rajpurkar et al., EMNLP 2016; ACL 2018 where there may be no answer): both are
of texts without case, punctuation, articles and more than one blank, F1 is of their words, and of several right answers
the nearest counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_compress.evaluation.exam import Exam
from lowrank_compress.evaluation.measures import ANSWERS, Rows
from lowrank_compress.model.walk.batch import Batch

# Tokens of an answer at most.
LONGEST = 30
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Part:
    """A question and a part of its text, as one sequence.

    Attributes
    ----------
    example
        Number of the question.
    context
        The whole text.
    right
        Answers that are right; none where there is no answer.
    places
        For each token of the sequence from which character of the text to which it is; None where it is not of it.
    first
        Place of the token that stands for no answer.
    """

    example: int
    context: str
    right: tuple[str, ...]
    places: Sequence[tuple[int, int] | None]
    first: int


def of_answers(batches: Sequence[Batch], parts: Sequence[Sequence[Part]]) -> Exam:
    """Judge the answers to questions; that there is none counts as one where it is the truth of any of them.

    Parameters
    ----------
    parts
        Of each batch: what its sequences are.
    """
    may_lack = any(not part.right for group in parts for part in group)

    def judge(number: int, outputs: Tensor) -> Rows:
        return np.array([_judged(part, logits) for part, logits in zip(parts[number], outputs, strict=True)])

    def examples(rows: Rows) -> Rows:
        found = []
        for example in np.unique(rows[:, 0]):
            own = rows[rows[:, 0] == example]
            best = own[own[:, 1].argmax()]
            # No answer is given where it is likelier in every part.
            lacks = may_lack and own[:, 2].min() > best[1]
            found.append([*(best[5:7] if lacks else best[3:5]), 1.0])
        return np.array(found)

    return Exam(batches, judge, 7, ANSWERS, examples, parts=[part.example for group in parts for part in group])


def _judged(part: Part, logits: Tensor) -> list[float]:
    """The example; logits of the best answer and of none; exact match and F1 of the best answer, and of none."""
    score, answer = best_answer(part, logits)
    nothing = float(logits[0, part.first] + logits[1, part.first])
    return [part.example, score, nothing, *worth(answer, part.right), *worth("", part.right)]


def best_answer(part: Part, logits: Tensor) -> tuple[float, str]:
    """Return the likeliest answer of at most `LONGEST` tokens of the text, and the sum of its two logits.

    Parameters
    ----------
    logits
        Of its first and its last token, (2, length).
    """
    inside = torch.tensor([place is not None for place in part.places])
    start, end = (each.double().masked_fill(~inside, -torch.inf) for each in logits[:, : len(inside)])
    sums = start[:, None] + end[None, :]
    wrong = torch.ones_like(sums, dtype=torch.bool)
    sums = sums.masked_fill(wrong.tril(-1) | wrong.triu(LONGEST), -torch.inf)
    one, other = divmod(int(sums.argmax()), len(inside))
    begins, ends = part.places[one], part.places[other]
    assert begins is not None
    assert ends is not None
    return float(sums[one, other]), part.context[begins[0] : ends[1]]


def worth(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, each against the nearest of those that are right; against none where none is."""
    answer_words = _words(answer)
    pairs = [(answer_words, _words(each)) for each in right or ("",)]
    return max(float(one == other) for one, other in pairs), max(_f1(one, other) for one, other in pairs)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    if not one or not other:
        return float(one == other)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))
