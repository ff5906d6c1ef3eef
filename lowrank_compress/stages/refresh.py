"""The model code that travels in a checkpoint: whether it is this program's, and how it becomes that again.

Where this package is installed, its own code loads a checkpoint, whatever the checkpoint's copy says; the copy is for
machines without.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version

import lowrank_compress
from lowrank_compress.artifacts.directories import keep_aside
from lowrank_compress.artifacts.documents import read_json, write_json
from lowrank_compress.artifacts.files import is_regular, read_small_text, sha256, write_atomically
from lowrank_compress.artifacts.manifest import Manifest, read_manifest, relist
from lowrank_compress.errors import ArtifactError, CheckpointError, InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.shipped.config import REMOTE_FILE, VERSION
from lowrank_compress.shipped.saving import REMOTE_CLASSES, remote_code
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.run import Run

Code = Literal["ours", "older code", "newer code"]


def code_of(directory: Path, manifest: Manifest | None) -> Code:
    """Compare a checkpoint's copy of the model code with the package's.

    Parameters
    ----------
    directory
        A checkpoint with such a file.
    manifest
        Of the stage that wrote it, if one did: it says by which version of this package.

    Returns
    -------
    str
        "ours" if both are the same. Another is taken for older unless a later version of the package is known to have
        written it.
    """
    there = directory / REMOTE_FILE
    if sha256(there) == _packaged():
        return "ours"
    format_version = re.search(r"^VERSION = (\d+)$", read_small_text(there), re.MULTILINE)
    if format_version and int(format_version[1]) > VERSION:
        return "newer code"
    try:
        wrote = Version(str(manifest.environment.get("lowrank_compress"))) if manifest else None
    except InvalidVersion:
        wrote = None
    return "newer code" if wrote and wrote > Version(lowrank_compress.__version__) else "older code"


def checkpoint_of(target: Path) -> tuple[Run | None, Path]:
    """Find the run, if there is one, and the checkpoint that a target means: a run, one of its own, or another one.

    Raises
    ------
    InputError
        There is no such directory.
    ArtifactError
        The run has no checkpoint yet, or another file of it was changed.
    """
    if not target.is_dir():
        raise InputError(f"There is no directory {target}; expected a run or a compressed checkpoint on this machine.")
    inside, name = Run(target.absolute().parent), target.absolute().name
    if inside.exists() and inside.index.exists() and name in (chain := _directories(inside)):
        return inside, inside.finished(editable=(REMOTE_FILE,), before=chain[name]).path
    run = Run(target)
    return (run, run.finished(editable=(REMOTE_FILE,)).path) if run.exists() else (None, target)


def _directories(run: Run) -> dict[str, str | None]:
    """Name the directories of a run's checkpoints, and for each the stage that came after it, if one did."""
    chain = read_index(run.index).chain
    after = [*(link.stage for link in chain[1:]), None]
    return {link.directory: stage for link, stage in zip(chain, after, strict=True)}


def refresh(directory: Path) -> tuple[bool, Path | None]:
    """Put the package's model code in the place of a checkpoint's copy, and let ``AutoConfig`` lead to it.

    Checkpoints of earlier versions lack the latter (an entry of config.json); with it, programs that ask for the config
    first load them by their own code. Nothing else is touched. A manifest that lists a file lists the new one
    afterwards. What is not as a manifest of ours lists it, is kept.

    Returns
    -------
    bool
        Whether anything had to be written.
    Path or None
        Where the file was moved to that nobody knows to be ours, if there was one.

    Raises
    ------
    LrcError
        The checkpoint is not one that this package compressed, does not load by code of its own, is of a later version
        of this package, or is not a plain directory of files.
    """
    path = directory / REMOTE_FILE
    _require_known_classes(directory)
    if directory.is_symlink() or path.is_symlink() or (path.exists() and not is_regular(path)):
        raise ArtifactError(
            f"{path} is a link, or no file; expected a file in a directory of its own. Copy the checkpoint (out of a "
            "cache, say) and refresh the copy."
        )
    manifest = read_manifest(directory)
    recorded = None if manifest is None else manifest.outputs.get(REMOTE_FILE, {}).get("sha256")
    found = sha256(path) if path.exists() else None
    if found and code_of(directory, manifest) == "newer code":
        raise ArtifactError(
            f"{path} is of a later version of this program than {lowrank_compress.__version__}, and stays. Update "
            "lowrank_compress."
        )
    packaged = _packaged()
    kept = None
    if found != packaged:
        if found != recorded:
            kept = keep_aside(path)
        write_atomically(path, _copy)
    relisted = manifest is not None and recorded not in (None, packaged)
    if manifest is not None and relisted:
        manifest = relist(directory, manifest, REMOTE_FILE)
    led = _lead(directory, manifest)
    return found != packaged or relisted or led, kept


def _lead(directory: Path, manifest: Manifest | None) -> bool:
    """Add ``AutoConfig`` to the auto_map of config.json, unless that is there or the file was changed by hand."""
    config = directory / "config.json"
    settings = read_json(config)
    if "AutoConfig" in settings["auto_map"] or config.is_symlink():
        return False
    if manifest is not None and manifest.outputs.get(config.name, {}).get("sha256") != sha256(config):
        return False
    entry = f"{Path(REMOTE_FILE).stem}.{REMOTE_CLASSES['AutoConfig']}"
    write_json(config, settings | {"auto_map": {"AutoConfig": entry, **settings["auto_map"]}})
    if manifest is not None:
        relist(directory, manifest, config.name)
    return True


def _packaged() -> str:
    """Hash the package's own model code."""
    return hashlib.sha256(remote_code()).hexdigest()


def _copy(target: Path) -> None:
    target.write_bytes(remote_code())


def _require_known_classes(directory: Path) -> None:
    """Refuse a checkpoint whose config.json does not lead to classes that the package's code has."""
    checkpoint = Checkpoint(directory)
    if checkpoint.quantization is None:
        raise CheckpointError(f"{directory} is not compressed by this program; there is no code in it to refresh.")
    entries = checkpoint.raw_config.get("auto_map")
    stem = f"{Path(REMOTE_FILE).stem}."
    named = [name for name in (entries.values() if isinstance(entries, dict) else ()) if str(name).startswith(stem)]
    unknown = [name for name in named if str(name).removeprefix(stem) not in REMOTE_CLASSES.values()]
    if not named or unknown:
        raise CheckpointError(
            f"{directory / 'config.json'} names {', '.join(map(str, unknown)) or 'no class'} of {REMOTE_FILE} in its "
            "auto_map; expected classes that this version has. Write the checkpoint again: load it and "
            "`save_pretrained` it."
        )
