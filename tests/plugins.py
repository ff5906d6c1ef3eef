"""Packages with plug-ins, installed for other processes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def installed(place: Path, code: str, points: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Write a package, and return the environment of a process that has it.

    Parameters
    ----------
    place
        A new directory.
    code
        Of the module ``my_package``.
    points
        Group of entry points -> name -> value.
    """
    info = place / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "my_package.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        line for group, names in points.items() for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
