"""What each stage depends on.

A stage's config holds exactly what changes its result, so that a change of the output dtype, say, does not ask for a
new calibration.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from lowrank_compress.errors import InputError

RatioOf = Literal["blocks", "model"]
ModuleMetric = Literal["gram", "kfac"]
SecondBy = Literal["full", "scales"]
DTYPES = ("float32", "bfloat16", "float16", "float64")


# Numbers that are larger are mistakes: nothing has so many windows, tokens or elements.
MANY = 10**9
COMMAND_LINE = "The command line"


class Strict(BaseModel):
    """Immutable, closed to unknown keys and to numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _texts(self) -> Self:
        for name, value in self:
            texts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            for text in texts if isinstance(texts, tuple) else (texts,):
                if isinstance(text, str) and (not text.strip() or "\0" in text or not text.isprintable()):
                    raise ValueError(f"{name} is {text!r}; expected printable text, or nothing at all")
        return self


Config = TypeVar("Config", bound=Strict)


def stage_config(kind: type[Config], where: str, options: Mapping[str, Any]) -> Config:
    """Make the config of a stage; `where` says where the options are from.

    Raises
    ------
    InputError
        An option is unknown, or a value is out of range.
    """
    try:
        return kind(**options)
    except ValidationError as problem:
        raise InputError(f"{where}: {explain(problem, kind)}") from None


def evaluate_config(where: str, **options: Any) -> EvaluateConfig:
    """Make the config of an evaluation, as `stage_config` does."""
    return stage_config(EvaluateConfig, where, options)


def option_of(error: Any) -> str:
    """The option that an error is about; what a validator of this file says of one begins with its name."""
    return str(error["loc"][0]) if error["loc"] else error["msg"].removeprefix("Value error, ").split()[0]


def explain(problem: ValidationError, kind: type[Strict]) -> str:
    """Say what is wrong with the values that were given for a model."""
    known = ", ".join(kind.model_fields)
    parts = []
    for error in problem.errors():
        name = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            parts.append(f"unknown option {name!r}; known are {known}")
        else:
            got = "" if error["type"] == "value_error" else f" (got {reprlib.repr(error['input'])})"
            parts.append(f"{name}{': ' * bool(name)}{error['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(parts) + "."


class Scheme(Strict):
    """The method for each part of a block, and the metric of module methods.

    In files both are keys of one mapping.

    Attributes
    ----------
    methods
        Group -> method, alternatives with a bar between them, or "dense" for what stays as it is; and where matrices
        have a method of their own, role or shell pattern over their names -> method.
    kv_window
        Last tokens whose keys and values are cached exactly, of all others one latent; None where the cache is stock.
    """

    methods: dict[str, str]
    metric: ModuleMetric
    kv_window: int | None = Field(default=None, ge=0, le=MANY)

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, found: Any) -> Any:
        if isinstance(found, dict) and "methods" not in found:
            others = {name: found[name] for name in found if name not in cls.model_fields}
            return {"methods": others, "metric": None} | {key: found[key] for key in found if key in cls.model_fields}
        return found

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        cache = {} if self.kv_window is None else {"kv_window": self.kv_window}
        return {**self.methods, "metric": self.metric, **cache}


class TextPart(Strict):
    """One of several texts that a calibration set is mixed of.

    Attributes
    ----------
    text
        A file, a data set of the hub, or "self", what the model itself writes.
    weight
        Its share of the windows is this, by the sum of all weights.
    text_column, label_column
        Of a table; None for those that are named for all tables together.
    """

    text: str
    weight: float = Field(default=1.0, gt=0, le=MANY)
    text_column: str | None = None
    label_column: str | None = None

    @model_serializer
    def _said(self) -> dict[str, Any]:
        found = {"text": self.text, "weight": self.weight}
        columns = {"text_column": self.text_column, "label_column": self.label_column}
        return found | {name: column for name, column in columns.items() if column is not None}


SELF = "self"
"""In place of a text: what the dense model writes by itself."""
_WEIGHED = re.compile(r"(.+):(\d+(?:\.\d+)?)", re.DOTALL)
# hf:NAME:CONFIG:SPLIT, where all of it is there: what follows is a weight.
_WHOLE_HUB_NAME = re.compile(r"hf:[^:]*:[^:]*:[^:\[]*(\[[^\]]*\])?")


def weighed(word: str) -> tuple[str, float]:
    """Part the name of a text and its weight, a trailing ``:NUMBER``; 1 without one.

    It is a weight only where what stands before it is "self", a file, or a name ``hf:NAME:CONFIG:SPLIT`` with all three
    parts (which may be empty: ``hf:NAME:::2``); and where there is no file that has the whole for its name.
    """
    match = _WEIGHED.fullmatch(word)
    if match is None or os.path.exists(word):
        return word, 1.0
    name = match[1]
    known = name == SELF or _WHOLE_HUB_NAME.fullmatch(name) or (not name.startswith("hf:") and os.path.exists(name))
    return (name, float(match[2])) if known else (word, 1.0)


def _texts_of(found: Any) -> Any:
    """Read what is said of the text, or texts, of a calibration set; one that has nothing of its own is its name."""
    if isinstance(found, str):
        return weighed(found)[0]
    if isinstance(found, Mapping | TextPart) or not isinstance(found, Sequence):
        found = found if found is None else [found]
    parts = tuple(map(_part_of, found or ()))
    if len(parts) == 1 and parts[0].text_column is None and parts[0].label_column is None:
        return parts[0].text
    named = [(part.text, part.text_column) for part in parts]
    if twice := next((name for number, (name, _) in enumerate(named) if named[number] in named[:number]), None):
        raise ValueError(f"calibration names {twice} twice; expected it once, with a weight: {twice}:2")
    return parts or None


def _part_of(found: Any) -> TextPart:
    if isinstance(found, TextPart):
        return found
    if isinstance(found, str):
        found = dict(zip(("text", "weight"), weighed(found), strict=True))
    if not isinstance(found, Mapping):
        raise ValueError(f"calibration holds {found!r}; expected the name of a text, or a mapping with its text")
    try:
        return TextPart(**found)
    except ValidationError as problem:
        raise ValueError(f"calibration: {explain(problem, TextPart).removesuffix('.')}") from None


Texts = Annotated[str | tuple[TextPart, ...] | None, BeforeValidator(_texts_of)]
"""The text of a calibration set, or several that it is mixed of."""


class CalibrationSet(Strict):
    """Which text, or texts, and which windows or examples of it."""

    source: Texts
    text_column: str | None = None
    label_column: str | None = None
    samples: int = Field(ge=1, le=MANY)
    seq_len: int = Field(ge=2, le=MANY)
    seed: int = Field(default=0, ge=0, lt=2**63)
    micro_batch: int = Field(ge=1, le=MANY)

    @classmethod
    def of(cls, config: CalibrationSet, **changes: Any) -> CalibrationSet:
        """Take the set of a config that has one, with some of it changed."""
        return CalibrationSet(**{name: getattr(config, name) for name in CalibrationSet.model_fields} | changes)


class CalibrateConfig(CalibrationSet):
    """What the calibration's statistics depend on."""

    scheme: Scheme
    clip: float | None
    device: str
    held_out: bool = False
    drawn: int = Field(default=0, ge=0, le=MANY)
    rival: Scheme | None = None


class ScoreConfig(Strict):
    """What the bases and ranks depend on."""

    scheme: Scheme
    allocate: str
    storage: str
    ratio: float
    ratio_of: RatioOf
    damping_fisher: float
    damping_gram: float
    options: dict[str, Any]
    round_to: int
    device: str
    held_out: bool = False
    rival: Scheme | None = None
    second: bool = False
    second_by: SecondBy = "full"
    kv_ratio: float | None = None

    @model_serializer(mode="wrap")
    def _said(self, handler: Any) -> dict[str, Any]:
        """Say nothing of a cache that is stock, so that what was made before there were others keeps its key."""
        return {name: value for name, value in handler(self).items() if name != "kv_ratio" or value is not None}


class FactorizeConfig(Strict):
    """What the compressed checkpoint and its report depend on."""

    method: str
    scheme: Scheme
    storage: str
    round_to: int
    dtype: str
    device: str
    shard_bytes: int = 1_000_000_000


class RefineConfig(CalibrationSet):
    """What a refined checkpoint and its report depend on."""

    device: str
    clip: float | None = Field(default=None, gt=0)
    damping_fisher: float = Field(default=1e-4, ge=0, lt=1)
    drawn: int = Field(default=0, ge=0, le=MANY)
    lambdas: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    shard_bytes: int = 1_000_000_000


class EvaluateConfig(Strict):
    """What one evaluation depends on."""

    perplexity: tuple[str, ...] = ()
    classification: str | None = None
    sts: tuple[str, ...] = ()
    text_column: str | None = None
    label_column: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    seq_len: int | None = Field(default=None, ge=2, le=MANY)
    limit: int | None = Field(default=None, ge=1, le=MANY)
    batch_size: int = Field(default=8, ge=1, le=MANY)
    seed: int = Field(default=0, ge=0, lt=2**32)
    num_fewshot: int | None = Field(default=None, ge=0, le=MANY)
    apply_chat_template: bool = False
    device: str = "cpu"
    trust_remote_code: bool = False


class CompareConfig(EvaluateConfig):
    """What a comparison of two models depends on, beside its prompts."""

    new_tokens: int = Field(default=32, ge=1, le=MANY)
    resamples: int = Field(default=10_000, ge=100, le=10**6)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class DiagnoseConfig(Strict):
    """What a diagnosis of a model depends on.

    Attributes
    ----------
    base
        The model that it was tuned from, to look for intruder dimensions among the `top` of each matrix.
    text
        A text, to look at what leaves each block.
    channels
        How many pairs of heads, and of directions, are listed; 0 for none.
    components
        Leading directions of each head among which channels are looked for.
    """

    base: str | None = None
    text: str | None = None
    text_column: str | None = None
    seq_len: int | None = Field(default=None, ge=2, le=MANY)
    limit: int = Field(default=16, ge=1, le=MANY)
    top: int = Field(default=10, ge=1, le=MANY)
    epsilon: float = Field(default=0.5, gt=0, le=1)
    channels: int = Field(default=10, ge=0, le=10**4)
    components: int = Field(default=8, ge=1, le=10**4)
    device: str = "cpu"
    trust_remote_code: bool = False
