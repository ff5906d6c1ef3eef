"""What each of the texts of a calibration set says, for those who look at a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lowrank_compress.config import CalibrationSet
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.workers import Workers
from lowrank_compress.stages.identity import text_name
from lowrank_compress.stages.samples import parts_of


class PerText:
    """Adds up, for each text, the loss that the dense model has on it.

    Parameters
    ----------
    config
        Which texts.
    by_text
        The batches of each; their sequences are numbered through, in this order.
    """

    def __init__(self, config: CalibrationSet, by_text: Sequence[Sequence[Batch]]) -> None:
        self._parts, self._batches = parts_of(config), by_text
        self._ends = list(accumulate(sum(len(batch.ids) for batch in part) for part in by_text))
        self._nats, self._terms = [0.0] * len(by_text), [0.0] * len(by_text)
        self._begun: set[int] = set()

    def told(self, batch: Batch, nats: float) -> None:
        """Take a part of the summed loss of a batch; of batches that are of no text, none."""
        text = bisect_right(self._ends, batch.first)
        if text == len(self._ends):
            return
        self._nats[text] += nats
        if batch.first not in self._begun:
            self._begun.add(batch.first)
            self._terms[text] += batch.terms

    def report(self, workers: Workers) -> list[dict[str, Any]]:
        """Say of each text its weight, windows and tokens, and the dense perplexity, None where it was not measured."""
        sums = workers.total([*self._nats, *self._terms])
        count = len(self._parts)
        found = []
        for number, (part, batches) in enumerate(zip(self._parts, self._batches, strict=True)):
            nats, terms = sums[number], sums[count + number]
            found.append(
                {
                    "text": text_name(part.text),
                    "weight": part.weight,
                    "windows": sum(len(batch.ids) for batch in batches),
                    "tokens": sum(batch.tokens for batch in batches),
                    "perplexity": math.exp(nats / terms) if terms and nats / terms < 700 else None,
                }
            )
        return found
