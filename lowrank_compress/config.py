"""What a user can set: the recipe of a run, and the part of it that each stage depends on.

A recipe is the command line in a file: every field has the name of its option. Each stage's config holds exactly what
changes that stage's result, so that a change of the output dtype, say, does not ask for a new calibration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowrank_compress.errors import InputError

RatioOf = Literal["blocks", "model"]
ModuleMetric = Literal["gram", "kfac"]
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Strict(BaseModel):
    """Immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Strict):
    """Everything that `lrc compress` can be told; the names are those of the options."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    ratio: float = 0.3
    ratio_of: RatioOf = "blocks"
    method: str = "auto"
    attention: str | None = None
    qk: str | None = None
    vo: str | None = None
    mlp: str | None = None
    metric: ModuleMetric | None = None
    allocate: str | None = None
    storage: str | None = None

    calibration: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    samples: int = Field(default=128, ge=1)
    seq_len: int | None = Field(default=None, ge=8)
    seed: int = Field(default=0, ge=0)
    micro_batch: int | None = Field(default=None, ge=1)

    damping_fisher: float = Field(default=1e-4, ge=0, lt=1)
    damping_gram: float = Field(default=1e-6, ge=0, lt=1)
    alpha: float = Field(default=0.5, gt=0)
    clip: float | None = Field(default=None, gt=0)
    floor: float = Field(default=0.0, ge=0, le=1)
    temperature: float | None = Field(default=None, gt=0)
    cap: float = Field(default=0.8, gt=0, le=1)
    round_to: int | None = Field(default=None, ge=1)

    device: str = "auto"
    dtype: str | None = None

    @model_validator(mode="after")
    def _known_dtype(self) -> Recipe:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        return self

    def to_yaml(self) -> str:
        """Render as a file that `--config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path | None, options: dict[str, Any]) -> Recipe:
    """Combine a recipe file and command-line options; an option that was given wins.

    Parameters
    ----------
    path
        A YAML file with recipe fields, or None.
    options
        Options by field name; None where not given.

    Raises
    ------
    InputError
        The file cannot be read, a field is unknown, or a value is out of range.
    """
    fields: dict[str, Any] = {}
    if path is not None:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as problem:
            raise InputError(f"The recipe {path} cannot be read ({problem}). Pass an existing YAML file.") from None
        except yaml.YAMLError as problem:
            raise InputError(f"The recipe {path} is not YAML: {' '.join(str(problem).split())}") from None
        if not isinstance(found, dict):
            raise InputError(f"The recipe {path} holds a {type(found).__name__}; expected `option: value` lines.")
        fields |= found
    fields |= {name: value for name, value in options.items() if value is not None}
    where = f"The recipe {path}" if path is not None else "The command line"
    if "model" not in fields:
        raise InputError(f"{where} names no model. Pass a checkpoint directory or a hub name.")
    try:
        return Recipe(**fields)
    except ValidationError as problem:
        raise InputError(f"{where}: {_explain(problem)}") from None


def _explain(problem: ValidationError) -> str:
    known = ", ".join(Recipe.model_fields)
    parts = []
    for error in problem.errors():
        name = ".".join(map(str, error["loc"])) or "recipe"
        if error["type"] == "extra_forbidden":
            parts.append(f"unknown option {name!r}; known are {known}")
        else:
            parts.append(f"{name}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})")
    return "; ".join(parts) + "."


class Scheme(Strict):
    """The method for each part of a block: queries and keys, values and output, MLP; and the metric of module methods.

    A part that stays as it is has the method "dense".
    """

    qk: str
    vo: str
    mlp: str
    metric: ModuleMetric


class CalibrateConfig(Strict):
    """What the calibration's statistics depend on."""

    scheme: Scheme
    source: str | None
    text_column: str | None
    label_column: str | None
    samples: int
    seq_len: int
    seed: int
    micro_batch: int
    clip: float | None
    device: str


class ScoreConfig(Strict):
    """What the bases and ranks depend on."""

    scheme: Scheme
    allocate: str
    storage: str
    ratio: float
    ratio_of: RatioOf
    damping_fisher: float
    damping_gram: float
    alpha: float
    floor: float
    temperature: float | None
    cap: float
    round_to: int
    device: str


class FactorizeConfig(Strict):
    """What the compressed checkpoint and its report depend on."""

    method: str
    scheme: Scheme
    storage: str
    round_to: int
    dtype: str
    device: str
    shard_bytes: int = 1_000_000_000


class EvaluateConfig(Strict):
    """What one evaluation depends on."""

    perplexity: tuple[str, ...] = ()
    classification: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    seq_len: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False
