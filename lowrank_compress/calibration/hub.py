"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_compress.calibration.tables import Row
from lowrank_compress.errors import CalibrationError, InputError

if TYPE_CHECKING:
    import datasets

_SLICE = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class HubName:
    """What ``hf:NAME[:CONFIG[:SPLIT]]`` says; the split may be a slice such as ``train[:1000]``."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Read a name.

        Raises
        ------
        InputError
            It does not have that form.
        """
        name, config, split = [*text.removeprefix("hf:").split(":", 2), "", ""][:3]
        if not name or "[" in name + config:
            raise InputError(
                f"{text} names no data set; expected hf:NAME[:CONFIG[:SPLIT]], for instance hf:NAME::train[:1000] "
                "where the data set has one configuration."
            )
        return cls(name, config or None, split or "train")


def hub_id(text: str) -> str:
    """Identify the content of a data set; nothing but its description is downloaded.

    Raises
    ------
    CalibrationError
        It is neither cached nor to be had.
    """
    asked = HubName.parse(text)
    return f"{text}@{_described(asked, text)._get_dataset_fingerprint(asked.split)}"


def load_hub(text: str) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set: from the cache where it is there, else row by row from the hub.

    What is taken of a data set that is not cached is all that is downloaded, for splits such as ``train``,
    ``train[:1000]`` or ``train[1000:2000]``; for others, such as ``train[:10%]``, all of it is.

    Raises
    ------
    CalibrationError
        It is neither cached nor to be had.
    """
    import datasets

    asked = HubName.parse(text)
    plain = _SLICE.fullmatch(asked.split)
    try:
        if plain is None or Path(_described(asked, text).cache_dir).is_dir():
            return datasets.load_dataset(asked.name, asked.config, split=asked.split)
        start, stop = int(plain[2] or 0), int(plain[3]) if plain[3] else None
        data = datasets.load_dataset(asked.name, asked.config, split=plain[1], streaming=True).skip(start)
        return data if stop is None else data.take(max(0, stop - start))
    except Exception as problem:  # the datasets library raises many types
        raise _unavailable(text, problem) from problem


def hub_rows(data: Iterable[Any], text: str) -> Iterator[Row]:
    """Read the rows of an open data set."""
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"Row {number}", row
    except CalibrationError:
        raise
    except Exception as problem:  # a network that breaks off, a value that cannot be decoded, and others
        raise _unavailable(text, problem, f" beyond row {number}") from problem


def _described(asked: HubName, text: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(asked.name, asked.config)
    except Exception as problem:  # the datasets library raises many types
        raise _unavailable(text, problem) from problem


def _unavailable(text: str, problem: Exception, where: str = "") -> CalibrationError:
    if isinstance(problem, CalibrationError):
        return problem
    first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return CalibrationError(
        f"The data set {text} is neither cached nor to be had from the hub{where} ({first}). Pass a text file instead."
    )
