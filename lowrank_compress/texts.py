"""Names of texts and of other places, and of several texts with their weights, as a user gives them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_serializer

from lowrank_compress.strict import MANY, Strict, explain

Place = str | PathLike[str]
"""A path, or a name on the hub."""


def names_of(places: Place | Sequence[Place]) -> tuple[str, ...]:
    """Return the names of one place or several."""
    return (str(places),) if isinstance(places, str | PathLike) else tuple(map(str, places))


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
