"""Configurations: what their values may be, and how what is wrong with them is said."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from lowrank_compress.errors import InputError

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
