"""What each stage depends on.

A stage's config holds exactly what changes its result, so that a change of the output dtype, say, does not ask for a
new calibration.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    model_serializer,
    model_validator,
)

from lowrank_compress.strict import MANY, Strict, stage_config
from lowrank_compress.texts import Texts

RatioOf = Literal["blocks", "model"]
ModuleMetric = Literal["gram", "kfac"]
SecondBy = Literal["full", "scales"]
Mix = Literal["auto", "quantized", "low-rank", "mixed"]
DTYPES = ("float32", "bfloat16", "float16", "float64")


def evaluate_config(where: str, **options: Any) -> EvaluateConfig:
    """Make the config of an evaluation, as `stage_config` does."""
    return stage_config(EvaluateConfig, where, options)


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


class ByteBudget(Strict):
    """A budget in bytes, of weights in few bits.

    Attributes
    ----------
    share
        Of the bytes that the original stores for all claimed weights.
    mix
        Which plans compete, by kind; all with "auto".
    group
        Columns that share a scale.
    dtype
        Of weights that are not packed.
    """

    share: float = Field(gt=0, lt=1)
    mix: Mix = "auto"
    dtype: str
    group: int = Field(default=64, ge=8, le=4096)


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
    bytes: ByteBudget | None = None

    @model_serializer(mode="wrap")
    def _said(self, handler: Any) -> dict[str, Any]:
        """Say nothing of budgets that are not there, so that what was made before there were any keeps its key."""
        found = handler(self)
        return {name: value for name, value in found.items() if name not in ("kv_ratio", "bytes") or value is not None}


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
    by_position: bool = False
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
