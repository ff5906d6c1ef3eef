"""What a sweep is asked to do: a grid of methods, ratios, seeds and calibrations over one model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from lowrank_compress.config import EvaluateConfig, evaluate_config
from lowrank_compress.errors import InputError
from lowrank_compress.recipe import RATIO, Recipe, make_recipe
from lowrank_compress.recipefile import read_recipe_file
from lowrank_compress.strict import Strict, stage_config

AXES = ("model", "method", "ratio", "seed", "calibration")


@dataclass(frozen=True)
class Point:
    """One combination: its name, which is that of its run, and its recipe."""

    name: str
    label: str
    recipe: Recipe


class SweepConfig(Strict):
    """A grid over one model.

    Attributes
    ----------
    model
        A directory or a name on the hub.
    methods
        Names, or mappings with ``method`` and whatever other options of a recipe that row of the grid has.
    ratios, seeds, calibrations
        The other axes; no calibration is the default of a recipe.
    options
        Options of a recipe that all have.
    evaluate
        What is measured of each: fields of an evaluation, such as ``perplexity`` and ``seq_len``.
    """

    model: str
    methods: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    ratios: tuple[float, ...] = Field(default=(RATIO,), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    calibrations: tuple[Any, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    evaluate: dict[str, Any] = Field(default_factory=dict)

    def points(self, where: str) -> list[Point]:
        """Make all combinations; those that share statistics stand together.

        Raises
        ------
        InputError
            An option is unknown or out of range, or two combinations are the same.
        """
        found = list(self._points(where))
        name, count = Counter(point.name for point in found).most_common(1)[0]
        if count > 1:
            raise InputError(f"{where}: {count} combinations are called {name}; expected each once.")
        return found

    def _points(self, where: str) -> Iterator[Point]:
        if clash := sorted(set(self.options) & set(AXES)):
            raise InputError(f"{where}: options names {clash[0]!r}, which is an axis of the sweep. Name it there.")
        for number, calibration in enumerate(self.calibrations or (None,)):
            for entry in self.methods:
                own = {"method": entry} if isinstance(entry, str) else dict(entry)
                if "method" not in own:
                    raise InputError(f"{where}: the entry {own} of methods names no method.")
                for seed in self.seeds:
                    for ratio in self.ratios:
                        fields = {**self.options, **own, "model": self.model, "ratio": ratio, "seed": seed}
                        fields |= {} if calibration is None else {"calibration": calibration}
                        label = " ".join([str(own["method"]), *(f"{k}={v}" for k, v in own.items() if k != "method")])
                        parts = [label.replace(" ", "-"), f"{ratio:g}"]
                        parts += [f"seed{seed}"] if len(self.seeds) > 1 else []
                        parts += [_text_name(calibration, number)] if len(self.calibrations) > 1 else []
                        name = "-".join(re.sub(r"[^\w.=-]+", "+", part) for part in parts)
                        yield Point(name, label, make_recipe(fields, where))

    def evaluation(self, where: str, device: str) -> EvaluateConfig | None:
        """Make the config of the evaluation; None where nothing is to be measured.

        Raises
        ------
        InputError
            A field is unknown or out of range.
        """
        fields = dict(self.evaluate)
        for name in ("perplexity", "sts", "tasks"):
            if isinstance(fields.get(name), str):
                fields[name] = (fields[name],)
        found = evaluate_config(where, **{"device": device, **fields})
        return found if found.perplexity or found.classification or found.sts or found.tasks else None


def _text_name(calibration: Any, number: int) -> str:
    return Path(calibration).stem if isinstance(calibration, str) else f"text{number}"


def read_sweep(path: Path) -> SweepConfig:
    """Read the file of a sweep.

    Raises
    ------
    InputError
        It cannot be read, or an entry is unknown.
    """
    return make_sweep(read_recipe_file(path), f"The sweep {path}")


def make_sweep(fields: Mapping[str, Any], where: str) -> SweepConfig:
    """Make the config of a sweep; `where` says where the fields are from.

    Raises
    ------
    InputError
        A field is unknown, missing or out of range.
    """
    return stage_config(SweepConfig, where, fields)
