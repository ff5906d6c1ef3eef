"""How well embeddings tell how similar texts are, and how near those of a compressed model are to the dense one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_compress.calibration.cells import Cell
from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.sources import Examples, Source, rows_of
from lowrank_compress.calibration.tables import shown
from lowrank_compress.calibration.tokens import load_tokenizer, vocabulary_of
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import CalibrationError, InputError
from lowrank_compress.evaluation.embedded import cosines, embed, rank_correlation
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.stages.reporting import Reporter

TEXTS, SCORES = ("sentence1", "sentence2"), ("score", "similarity_score", "label")


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts, by their numbers among all that there are, and how similar each pair is said to be."""

    texts: list[str]
    firsts: list[int]
    seconds: list[int]
    scores: list[float]

    def batches(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int | None], size: int
    ) -> list[Batch]:
        """Make batches of the texts, labelled by their numbers, of as many tokens as all of `lengths` allow."""
        numbers = [str(number) for number in range(len(self.texts))]
        return example_batches(
            tokenizer,
            Examples(self.texts, numbers),
            {number: int(number) for number in numbers},
            min(length for length in lengths if length is not None),
            size,
            vocabulary_of(checkpoint),
        )


def read_pairs(name: str, text_column: str | None, label_column: str | None, limit: int | None) -> Pairs:
    """Read pairs of texts with scores from a table.

    Raises
    ------
    CalibrationError, InputError
        It is no table, lacks a column, has something else in one, or has no two different scores.
    """
    columns = list(TEXTS) if text_column is None else text_column.split(",")
    if len(columns) != 2:
        raise InputError(f"--sts compares pairs of texts; --text-column names {len(columns)}. Give it twice.")
    numbers: dict[str, int] = {}
    found = Pairs([], [], [], [])
    for place, row in rows_of(Source(name, ",".join(columns), label_column or SCORES[0])):
        if limit is not None and len(found.scores) == limit:
            break
        score = label_column or next((column for column in SCORES if column in row), None)
        if score is None or (text_column is None and not set(TEXTS) <= set(row)):
            raise InputError(
                f"{name} is a table without the columns {', '.join(TEXTS)} and {' or '.join(SCORES)}; name its two "
                f"columns of text by --text-column and its scores by --label-column: {shown(row)}."
            )
        for column, side in zip(columns, (found.firsts, found.seconds), strict=True):
            side.append(numbers.setdefault(Cell.find(row, column, place, name).text(), len(numbers)))
        found.scores.append(Cell.find(row, score, place, name).number())
    if len(set(found.scores)) < 2:
        raise CalibrationError(
            f"{name} has {len(found.scores)} pairs, and no two different scores among them; ranks need some."
        )
    found.texts.extend(numbers)
    return found


def similarities(
    config: EvaluateConfig, models: Mapping[str, Checkpoint], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Measure every model on all tables of pairs.

    Returns
    -------
    dict
        By table: the rank correlation of cosines with scores for each model, by its role; ``n``, how many pairs; and
        ``cosine``, the mean over all texts of that between the compressed and the dense embedding, None for one model.

    Raises
    ------
    LrcError
        A table cannot be used, or a model is none of embeddings.
    """
    tables = {name: read_pairs(name, config.text_column, config.label_column, config.limit) for name in config.sts}
    made: dict[str, dict[str, Tensor]] = {name: {} for name in tables}
    for role, checkpoint in models.items():
        skeleton = Skeleton(checkpoint, torch.device(config.device), torch.float32)
        if skeleton.task != "embedding":
            raise InputError(
                f"--sts compares embeddings, and a {type(skeleton.model).__name__} has a head; use --perplexity or "
                "--classification."
            )
        for name, pairs in tables.items():
            step = f"{role} embeddings"
            made[name][role] = _embedded(
                config, skeleton, pairs, lambda done, total, step=step: reporter.advance(step, done, total)
            )
    return {name: _compared(pairs, made[name]) for name, pairs in tables.items()}


def _embedded(config: EvaluateConfig, skeleton: Skeleton, pairs: Pairs, advance: Any) -> Tensor:
    """Embed texts as the model is to read them."""
    checkpoint = skeleton.blueprint.checkpoint
    lengths = [config.seq_len, skeleton.embedding.longest, skeleton.blueprint.longest_input()]
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    return embed(skeleton, pairs.batches(checkpoint, tokenizer, lengths, config.batch_size), advance)


def _compared(pairs: Pairs, made: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        role: rank_correlation(cosines(all_of[pairs.firsts], all_of[pairs.seconds]), pairs.scores)
        for role, all_of in made.items()
    }
    near = float(cosines(*made.values()).mean()) if len(made) == 2 else None
    return found | {"n": len(pairs.scores), "cosine": near}
