"""What a user can set: the recipe of a run, and the part of it that each stage depends on.

A recipe is the command line in a file: every field has the name of its option. Each stage's config holds exactly what
changes that stage's result, so that a change of the output dtype, say, does not ask for a new calibration.
"""

from __future__ import annotations

import reprlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from lowrank_compress.artifacts.files import read_small_text
from lowrank_compress.errors import ArtifactError, InputError

RatioOf = Literal["blocks", "model"]
ModuleMetric = Literal["gram", "kfac"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
RATIO, METHOD = 0.3, "auto"


# Numbers that are larger are mistakes: nothing has so many windows, tokens or elements.
MANY = 10**9
RECIPE_BYTES = 1 << 20
COMMAND_LINE = "The command line"


class Strict(BaseModel):
    """Immutable, closed to unknown keys and to numbers that are none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _texts(self) -> Self:
        for name, value in self:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (not text.strip() or "\0" in text or not text.isprintable()):
                    raise ValueError(f"{name} is {text!r}; expected printable text, or nothing at all")
        return self


class Recipe(Strict):
    """Everything that `lrc compress` can be told; the names are those of the options."""

    model_config = ConfigDict(strict=True)

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    ratio: float = RATIO
    ratio_of: RatioOf = "blocks"
    method: str = METHOD
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
    samples: int = Field(default=128, ge=1, le=MANY)
    seq_len: int | None = Field(default=None, ge=8, le=MANY)
    seed: int = Field(default=0, ge=0, lt=2**63)
    micro_batch: int | None = Field(default=None, ge=1, le=MANY)

    damping_fisher: float = Field(default=1e-4, ge=0, lt=1)
    damping_gram: float = Field(default=1e-6, ge=0, lt=1)
    alpha: float = Field(default=0.5, gt=0)
    clip: float | None = Field(default=None, gt=0)
    floor: float = Field(default=0.0, ge=0, le=1)
    temperature: float | None = Field(default=None, gt=0)
    cap: float = Field(default=0.8, gt=0, le=1)
    round_to: int | None = Field(default=None, ge=1, le=MANY)

    device: str = "auto"
    dtype: str | None = None

    @model_validator(mode="after")
    def _known_dtype(self) -> Recipe:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        return self

    def to_yaml(self) -> str:
        """Render as a file that `--config` reads back; whether to trust code is no part of it."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)

    def settings(self) -> dict[str, Any]:
        """Everything that may stand in a file."""
        return self.model_dump(mode="json", exclude={"trust_remote_code"})


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
        The file cannot be read, a field is unknown, a value is out of range, or the file would have a checkpoint's code
        run: only the command line may say that, each time.
    """
    fields = {} if path is None else read_recipe_file(path)
    given = {name: value for name, value in options.items() if value is not None}
    if fields.pop("trust_remote_code", False) and not given.get("trust_remote_code"):
        raise InputError(
            f"The recipe {path} says trust_remote_code, which would run the checkpoint's own code. Only the command "
            "line may say so, each time: pass --trust-remote-code if you trust the checkpoint, or remove the line."
        )
    fields |= given
    where = f"The recipe {path}" if path is not None else COMMAND_LINE
    if "model" not in fields:
        raise InputError(f"{where} names no model. Pass a checkpoint directory or a hub name.")
    return make_recipe(fields, where, given)


def make_recipe(fields: Mapping[str, Any], where: str, given: Container[str] = ()) -> Recipe:
    """Make a recipe of values by field name.

    Parameters
    ----------
    where
        Where the values are from, for messages.
    given
        Names of fields whose values are from the command line instead.

    Raises
    ------
    InputError
        A field is unknown, or a value is out of range.
    """
    try:
        return Recipe(**fields)
    except ValidationError as problem:
        where = COMMAND_LINE if all(_option(error) in given for error in problem.errors()) else where
        raise InputError(f"{where}: {_explain(problem, Recipe)}") from None


def evaluate_config(where: str, **options: Any) -> EvaluateConfig:
    """Make the config of an evaluation; `where` says where the options are from.

    Raises
    ------
    InputError
        An option is unknown, or a value is out of range.
    """
    try:
        return EvaluateConfig(**options)
    except ValidationError as problem:
        raise InputError(f"{where}: {_explain(problem, EvaluateConfig)}") from None


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which a small file can explode with, and without a key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*), which a recipe has no need of")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if not isinstance(name, str):
                raise yaml.YAMLError(f"the key {name!r} is no text; expected the name of an option")
            if names.count(name) > 1:
                raise yaml.YAMLError(f"the option {name!r} is there twice")
        return super().construct_mapping(node, deep)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read the options that a recipe file gives.

    Raises
    ------
    InputError
        It cannot be read, is not YAML, or is no mapping of options.
    """
    try:
        text = read_small_text(path, RECIPE_BYTES)
        found = yaml.load(text, _Loader) or {}
    except FileNotFoundError:
        raise InputError(f"The recipe {path} does not exist. Pass an existing YAML file.") from None
    except ArtifactError as problem:
        raise InputError(f"The recipe cannot be read: {problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as problem:
        what = "it is nested too deep" if isinstance(problem, RecursionError) else " ".join(str(problem).split())
        raise InputError(f"The recipe {path} is not YAML that can be used: {what}") from None
    if not isinstance(found, dict):
        raise InputError(f"The recipe {path} holds a {type(found).__name__}; expected `option: value` lines.")
    return found


def _option(error: Any) -> str:
    """The option that an error is about; what a validator of this file says of one begins with its name."""
    return str(error["loc"][0]) if error["loc"] else error["msg"].removeprefix("Value error, ").split()[0]


def _explain(problem: ValidationError, kind: type[Strict]) -> str:
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
    held_out: bool = False
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
    alpha: float
    floor: float
    temperature: float | None
    cap: float
    round_to: int
    device: str
    held_out: bool = False
    rival: Scheme | None = None


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
    seq_len: int | None = Field(default=None, ge=2, le=MANY)
    limit: int | None = Field(default=None, ge=1, le=MANY)
    batch_size: int = Field(default=8, ge=1, le=MANY)
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "cpu"
    trust_remote_code: bool = False
