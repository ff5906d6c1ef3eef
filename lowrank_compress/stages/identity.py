"""What a checkpoint or a text is by content, and what it is called."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.calibration.hub import hub_id
from lowrank_compress.calibration.own import VERSION as OWN_VERSION
from lowrank_compress.calibration.sources import Source
from lowrank_compress.calibration.textfiles import check_file
from lowrank_compress.errors import CalibrationError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import HUB


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """SHA-256 over a checkpoint's config, weight and tokenizer files; their hashes are remembered."""
    return canonical_hash(file_hashes(checkpoint.identity()))


def source_id(source: Source) -> str:
    """Identity of a text source's content: the hash of a file, the fingerprint of a hub data set, how a model writes.

    Raises
    ------
    CalibrationError
        It does not exist, or cannot be read.
    """
    if source.is_own:  # the model, and how it is asked, are in the same keys
        return f"{source.name}:{OWN_VERSION}"
    if source.is_hub:
        return hub_id(source.name)
    check_file(source.name)
    try:
        return sha256(Path(source.name))
    except OSError as problem:
        raise CalibrationError(f"{source.name} cannot be read ({problem}). Expected a readable file.") from None


def text_name(text: str) -> str:
    """Name a text without the path to it."""
    return text if text.startswith("hf:") else Path(text).name


def display_name(model: str) -> str:
    """Name a model without the path to it: the hub name, or the directory's own name."""
    if model.startswith(HUB):
        return model.removeprefix(HUB)
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
