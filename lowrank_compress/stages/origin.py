"""What the card of a compressed checkpoint says of its original: name, licence, languages.

It is found once, when the checkpoint is first made, and kept in lowrank.json, of which later stages make theirs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_compress.artifacts.files import read_small_text, sha256
from lowrank_compress.calibration.labelled import prefers
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import ArtifactError
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.tasks import AUTO, unit_of_loss
from lowrank_compress.stages.reading import SCORED
from lowrank_compress.stages.samples import sources_of

CARD = "README.md"
# Where a model of the hub lies in its cache.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)$")
_LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([.-][\w.-]+)?", re.IGNORECASE)
_WORD = re.compile(r"[\w.+-]{1,64}")
_LARGEST_LICENCE = 1 << 20


@dataclass(frozen=True)
class Heard:
    """What a model was calibrated on.

    Attributes
    ----------
    datasets
        Data sets of the hub.
    paired
        Whether it is pairs of texts, of which one is preferred.
    """

    datasets: tuple[str, ...] = ()
    paired: bool = False

    @classmethod
    def of(cls, config: CalibrationSet) -> Heard:
        """Tell it from the names of the texts and of their columns."""
        sources = [] if config.source is None else sources_of(config)
        names = dict.fromkeys(source.name.split(":")[1] for source in sources if source.is_hub)
        return cls(tuple(names), bool(sources) and all(map(prefers, sources)))


def about(model: Blueprint, heard: Heard = Heard()) -> dict[str, Any]:
    """Find what a card says of the dense checkpoint that it was made from; only what there is.

    Of a head whose losses the class of the model does not tell the unit of, it has that, too.

    Parameters
    ----------
    model
        The dense checkpoint.
    heard
        What it was calibrated on.
    """
    checkpoint = model.checkpoint
    said = _header(checkpoint.path / CARD)
    licence = {name: said[name] for name in ("license", "license_name", "license_link") if _is_text(said.get(name))}
    languages = said.get("language")
    found = {
        "auto_class": AUTO[model.task].__name__,
        "sentence_transformers": (checkpoint.path / "modules.json").exists(),
        "base_model": _hub_name(checkpoint.path),
        "licence": licence,
        "licence_files": {path.name: sha256(path) for path in _licence_files(checkpoint)},
        "language": [
            each
            for each in (languages if isinstance(languages, list) else [languages])
            if isinstance(each, str) and _WORD.fullmatch(each)
        ],
        "datasets": list(heard.datasets),
        "loss": unit_of_loss(model.task, heard.paired) if model.task in SCORED else None,
    }
    return {name: value for name, value in found.items() if value}


def _header(path: Path) -> Mapping[str, Any]:
    """Read the metadata of a card; nothing where there is none that can be read."""
    try:
        text = read_small_text(path, _LARGEST_LICENCE)
        found = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") and text.count("---") > 1 else None
    except (OSError, ArtifactError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= 200


def _hub_name(path: Path) -> str | None:
    """Name the repository of the hub that a directory is the cached copy of."""
    if path.parent.name != "snapshots" or (found := _CACHED.fullmatch(path.parent.parent.name)) is None:
        return None
    return f"{found[1]}/{found[2]}"


def _licence_files(checkpoint: Checkpoint) -> list[Path]:
    found = [path for path in sorted(checkpoint.path.iterdir()) if _LICENCES.fullmatch(path.name)]
    return [path for path in found if path.is_file() and path.stat().st_size <= _LARGEST_LICENCE]


def copy_licences(checkpoint: Checkpoint, report: Mapping[str, Any], out: Path) -> None:
    """Copy the files of the licence that a report names, where they are as they were."""
    for name, digest in report.get("about", {}).get("licence_files", {}).items():
        path = checkpoint.path / Path(name).name
        if path.is_file() and sha256(path) == digest:
            shutil.copyfile(path, out / path.name)
