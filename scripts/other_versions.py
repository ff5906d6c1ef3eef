"""Run the tests marked `versions` on the oldest and on the newest transformers that pyproject.toml admits.

Each has an environment of its own, ``.venv-oldest`` and ``.venv-newest``, that holds that transformers and whatever
else it needs in another version; all the rest comes from the environment that this script runs in. What is installed
there already is not tested again. Usage, from the root of the repository::

    python scripts/other_versions.py -- -n 2
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = "transformers"


def requirement() -> Requirement:
    """Return what pyproject.toml asks for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(rf'^ *"({PACKAGE}\b[^"]*)",$', text, re.MULTILINE)  # Python 3.10 has no tomllib
    return Requirement(found)


def oldest(asked: Requirement) -> Version:
    """Return the least version that is admitted."""
    return min(Version(limit.version) for limit in asked.specifier if limit.operator in (">=", "==", "~="))


def newest(asked: Requirement) -> Version | None:
    """Ask the package index for the newest version that is admitted; None if it cannot be reached."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--retries", "1", "--timeout", "20", "--disable-pip-version-check", "--report", "-", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return Version(json.loads(done.stdout)["install"][0]["metadata"]["version"])


def interpreter(place: Path) -> Path:
    """Return the path of an environment's Python."""
    return place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(place: Path, wanted: Version) -> str:
    """Make an environment over this one, unless it is there; return why that cannot be done, or nothing."""
    below = sysconfig.get_paths()["purelib"]
    pins = (ROOT / "constraints.txt").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    made_of = f"{wanted} {below} {sys.version} {hashlib.sha256(pins).hexdigest()}"
    stamp = place / "made-of"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_of and interpreter(place).exists():
        return ""
    venv.create(place, clear=True, symlinks=sys.platform != "win32")
    own = sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)})
    # `addsitedir` also takes up what is installed there by reference, this package for one.
    Path(own, "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    command = [str(interpreter(place)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pip sees what is below, takes it where it will do, and leaves it alone where it will not.
    command += ["--retries", "1", "--timeout", "20", f"{PACKAGE}=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (re.findall(r"^ERROR: .*", done.stderr, re.MULTILINE) or ["pip failed"])[-1]
    show = f"import {PACKAGE}; print({PACKAGE}.__version__)"
    found = subprocess.run([str(interpreter(place)), "-c", show], capture_output=True, text=True, check=False)
    if found.returncode or Version(found.stdout.strip()) != wanted:
        return f"what was installed is {found.stdout.strip() or found.stderr.strip()}"
    stamp.write_text(made_of, encoding="utf-8")
    return ""


def main(
    options: Annotated[list[str] | None, typer.Argument(help="Options for pytest.")] = None,
    required: Annotated[
        bool, typer.Option("--required", help="Fail if an environment cannot be made, as without a package index.")
    ] = False,
) -> None:
    """Test on both, and exit with 1 if a test fails."""
    asked = requirement()
    here = Version(installed_version(PACKAGE))
    failed = False
    for name, wanted in (("oldest", oldest(asked)), ("newest", newest(asked))):
        place = ROOT / f".venv-{name}"
        said = f"The {name} {asked} is {wanted}"
        if wanted == here:
            typer.echo(f"{said}, on which all tests run: nothing to do.")
            continue
        if wanted is None:
            typer.echo(f"The package index cannot be asked for the newest {asked}: not tested beyond {here}.")
            failed |= required
            continue
        if problem := make(place, wanted):
            typer.echo(f"{said}; it cannot be installed ({problem}): not tested.")
            failed |= required
            continue
        typer.echo(f"{said}: tests of loading, attention and caches in {place.name}")
        command = [str(interpreter(place)), "-m", "pytest", "-m", "versions", "-q", "-p", "no:cacheprovider"]
        failed |= subprocess.run([*command, *(options or ())], cwd=ROOT, check=False).returncode != 0
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
