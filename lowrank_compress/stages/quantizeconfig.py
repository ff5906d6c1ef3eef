"""What `lrc quantize` can be told, and what it takes from a run's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from lowrank_compress.calibration.sources import PAPERS_DATA
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import InputError
from lowrank_compress.formats.packed import BITS
from lowrank_compress.methods.rounding import ROUNDINGS
from lowrank_compress.recipe import Recipe
from lowrank_compress.shipped.beside import MOST_ACTIVATION_BITS
from lowrank_compress.stages.environment import micro_batch
from lowrank_compress.strict import MANY

SEQ_LEN, SAMPLES = 512, 128
NO_TEXT = (
    "This quantization looks at the model on a text: name one with --calibration, or take --rounding rtn without "
    "--smooth, --outliers and --activation-bits, which needs none."
)


class QuantizeConfig(CalibrationSet):
    """What the quantized checkpoint depends on.

    Attributes
    ----------
    rounding
        How (`rounding.ROUNDINGS`).
    bits
        Of every weight, a whole number; or so many stored bits for a weight on average, scales included.
    bytes
        In place of bits: the share of the original's bytes, of all claimed weights, that may be stored.
    group
        Columns that share a scale; 0: all of a row do.
    symmetric
        Whether zero points are 0.
    residual_rank
        Of a product that is added to each matrix and makes up for rounding: an adapter beside the checkpoint, or in it
        where something else is beside the codes, too. 0: none.
    inside
        Whether that product is in the checkpoint all the same, and counted; under a budget each matrix has it or not,
        whichever loses less.
    smooth
        Whether outliers of activations are shifted to weights (SVDQuant).
    outliers
        Columns that inputs beyond this magnitude meet are left as they are, in two bytes (LLM.int8()). None: no column.
    activation_bits
        To which what enters a layer is rounded as it computes. None: not.
    head
        Bits of the output head, which `bytes` counts then and `bits` does not. None: it stays as it is.
    damping, damping_fisher
        Shares of their mean diagonals that are added to the diagonals of Gram and Fisher matrices.
    clip
        As in `CalibrateConfig`.
    device
        Where.
    """

    samples: int = Field(default=SAMPLES, ge=1, le=MANY)
    rounding: str = "kfac"
    bits: float | None = Field(default=None, ge=2, le=16)
    bytes: float | None = Field(default=None, gt=0, lt=1)
    group: int = Field(default=64, ge=0, le=4096)
    symmetric: bool = True
    residual_rank: int = Field(default=0, ge=0, le=MANY)
    inside: bool = False
    smooth: bool = False
    outliers: float | None = Field(default=None, gt=0)
    activation_bits: int | None = Field(default=None, ge=2, le=MOST_ACTIVATION_BITS)
    head: int | None = None
    damping: float = Field(default=0.01, gt=0, le=1)
    damping_fisher: float = Field(default=0.1, gt=0, le=100)
    clip: float | None = Field(default=None, gt=0)
    device: str = "cpu"
    shard_bytes: int = 1_000_000_000

    @model_validator(mode="after")
    def _one_budget(self) -> QuantizeConfig:
        if (self.bits is None) == (self.bytes is None):
            raise ValueError("bits and bytes are one budget; expected one of them")
        if self.whole is None and self.bits is not None and self.bits > BITS[-1] + 1:
            raise ValueError(f"bits is {self.bits:g}; expected up to 9 bits for a weight, scales included")
        if self.whole is not None and self.whole not in BITS:
            raise ValueError(f"bits is {self.whole}; expected one of {', '.join(map(str, BITS))}, or a fraction")
        if self.head is not None and self.head not in BITS:
            raise ValueError(f"head is {self.head}; expected one of {', '.join(map(str, BITS))}, the bits of the head")
        if 0 < self.group < 8:
            raise ValueError(f"group is {self.group}; expected 8 columns or more, or 0 for all of a row")
        if self.inside and not self.residual_rank:
            raise ValueError("inside says where a product is; expected a residual_rank, too")
        if self.aided and self.whole is None:
            raise ValueError("smooth, outliers and activation_bits go with one whole number of bits for all weights")
        return self

    @property
    def aided(self) -> bool:
        """Whether layers have something beside their codes (`Beside`), which stock formats have no place for."""
        return self.smooth or self.outliers is not None or self.activation_bits is not None

    @property
    def whole(self) -> int | None:
        """The bits of all weights, where all have the same."""
        return int(self.bits) if self.bits is not None and self.bits.is_integer() else None


def looks(said: Mapping[str, Any]) -> bool:
    """Whether what was asked for of a quantization, by field, has to look at the model on a text."""
    aids = said.get("smooth"), said.get("outliers") is not None, said.get("activation_bits") is not None
    return ROUNDINGS[said.get("rounding", "kfac")].needs != "nothing" or any(aids)


def options_of(data: Mapping[str, Any], recipe: Recipe | None, said: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Decide what a config says of data and device.

    Parameters
    ----------
    data
        What was asked for: source, text_column, label_column, samples, seq_len, seed; None for what was not.
    recipe
        Of the run whose checkpoint is quantized; None for a checkpoint that is none's.
    said
        What was asked for otherwise, which needs a text, or none.
    device
        Where to compute.

    Raises
    ------
    InputError
        No text is named, and one is needed; or the rounding is unknown.
    """
    given = text_of(data, recipe)
    if not looks(said):
        given = {name: value for name, value in given.items() if name == "seed"} | {"source": None}
    elif "source" not in given:
        raise InputError(NO_TEXT)
    length: int = given.setdefault("seq_len", SEQ_LEN) or SEQ_LEN
    return given | {"device": device, "micro_batch": micro_batch(device, length)}


def text_of(data: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """Say which text is looked at: what was asked for of it, and else what the run's recipe says; None is no answer."""
    given = {name: value for name, value in data.items() if value is not None}
    if recipe is None:
        return given
    own = {name: getattr(recipe, name) for name in ("samples", "seq_len", "seed")}
    if "source" not in given:
        columns = {name: getattr(recipe, name) for name in ("text_column", "label_column")}
        own |= {"source": recipe.calibration or PAPERS_DATA, **columns}
    return {name: value for name, value in own.items() if value is not None} | given
