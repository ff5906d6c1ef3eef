"""Names for people: of matrices and modules, where in the model they are, and of what losses are measured in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_compress.model.tasks import AUTO, unit_of_loss

# The first number in a name is its block's; that of an expert follows.
_BLOCK = re.compile(r"(?:.*?\.)?(\d+)[.:](.+)")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def loss_unit(report: Mapping[str, Any]) -> str:
    """Name what losses are measured in that are no shares, and of what, by a checkpoint's lowrank.json."""
    about, units = report.get("about", {}), dict[str, str]()
    for task, auto in AUTO.items():
        # Several heads may be of one class; of all but the first the report says the unit itself.
        units.setdefault(auto.__name__, unit_of_loss(task))
    return about.get("loss") or units.get(about.get("auto_class", ""), unit_of_loss("lm"))


def place_of(name: str) -> tuple[int | None, str]:
    """Part the name of a matrix into the number of its block, None outside of all, and what it is called there."""
    place = _BLOCK.fullmatch(name)
    return (int(place[1]), place[2]) if place else (None, name)


def collective(kind: str) -> str:
    """Name a matrix inside of a block without the number of its expert, if it is of one."""
    return _NUMBER.sub("", kind)


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Name dotted paths by as few of their last parts as tell them apart."""
    paths = {name: name.split(".") for name in names}
    found = {}
    for name, parts in paths.items():
        others = [other for other in paths.values() if other != parts]
        sizes = range(1, len(parts))
        size = next((n for n in sizes if all(parts[-n:] != other[-n:] for other in others)), len(parts))
        found[name] = ".".join(parts[-size:])
    return found
