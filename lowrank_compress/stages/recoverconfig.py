"""What `lrc recover` can be told, and what it takes from a run's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from lowrank_compress.calibration.sources import PAPERS_DATA
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.environment import micro_batch
from lowrank_compress.stages.samples import has_own
from lowrank_compress.strict import MANY
from lowrank_compress.training.student import Train

SEQ_LEN = 512


class RecoverConfig(CalibrationSet):
    """What the trained checkpoint depends on.

    Attributes
    ----------
    towards
        "dense": the dense model's predictions; "text": the tokens of the text, or labels of examples, themselves.
    block
        Steps that each block is trained for before, alone; None for none.
    steps, seconds
        How long to train the whole model: a number of steps, or about so many seconds, for which the number is found.
    batch
        Sequences a step.
    lr
        The highest learning rate; None for one that is found by trial.
    train
        What is trained (`student.Student`).
    lora
        Rank of adapters that are trained instead and then merged; None for none. Blocks by themselves have none.
    device
        Where.
    """

    towards: Literal["dense", "text"] = "dense"
    samples: int = Field(default=MANY, ge=1, le=MANY)
    block: int | None = Field(default=None, ge=1, le=MANY)
    steps: int | None = Field(default=None, ge=0, le=MANY)
    seconds: float | None = Field(default=None, gt=0, le=MANY)
    batch: int = Field(default=8, ge=1, le=MANY)
    lr: float | None = Field(default=None, gt=0)
    train: Train = "all"
    lora: int | None = Field(default=None, ge=1, le=MANY)
    device: str = "cpu"
    shard_bytes: int = 1_000_000_000

    @model_validator(mode="after")
    def _how_long(self) -> RecoverConfig:
        if self.steps is not None and self.seconds is not None:
            raise ValueError("steps and seconds are both given; expected one of them")
        if self.steps == 0 and self.block is None:
            raise ValueError("steps is 0, and no block is trained by itself either; expected one step at least")
        if self.block is not None and self.towards == "text":
            raise ValueError("block needs the dense model, which a text of one's own does not; expected one of them")
        return self


def options_of(data: Mapping[str, Any], recipe: Recipe | None, device: str) -> dict[str, Any]:
    """Decide what a config says of data and device.

    Parameters
    ----------
    data
        What was asked for: source, text_column, label_column, seq_len, seed; None for what was not.
    recipe
        Of the run whose checkpoint is trained; None for a checkpoint that is none's. Its columns belong to its text.
    device
        Where to compute.

    Raises
    ------
    InputError
        No text is named.
    """
    given = {name: value for name, value in data.items() if value is not None}
    if recipe is not None:
        own = {name: getattr(recipe, name) for name in ("seq_len", "seed")}
        if "source" not in given:
            columns = {name: getattr(recipe, name) for name in ("text_column", "label_column")}
            own |= {"source": recipe.calibration or PAPERS_DATA, **columns}
        given = {name: value for name, value in own.items() if value is not None} | given
    if "source" in given and has_own(CalibrationSet(source=given["source"], samples=1, seq_len=2, micro_batch=1)):
        given["samples"] = Recipe.model_fields["samples"].default if recipe is None else recipe.samples
    if "source" not in given:
        raise InputError("Training needs a text: name it with --calibration (the dense model teaches) or --text.")
    length = given.setdefault("seq_len", SEQ_LEN)
    return given | {"device": device, "micro_batch": micro_batch(device, length)}
