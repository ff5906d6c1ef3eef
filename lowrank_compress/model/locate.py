"""Find what MODEL names: a checkpoint's directory, that of an adapter, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from lowrank_compress.errors import InputError, first_line
from lowrank_compress.model.adapter import merged
from lowrank_compress.model.kinds import few, no_config, no_weights
from lowrank_compress.model.shards import ADAPTER, COMPANIONS, INDEX, MODULES, SINGLE, read_index

Snapshot = Callable[..., str]


def locate(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Find a checkpoint: a local directory, or a repository of the Hugging Face hub, downloaded or cached.

    Where there is an adapter (with weights of its own, or for another checkpoint), the directory is that of the model
    with the adapter merged into it, which is made once and kept in the user's cache.

    Parameters
    ----------
    model
        A directory, or a hub name.
    revision
        Of a repository; None for its main one.
    trust_remote_code
        Whether code of the repository is wanted too.

    Raises
    ------
    InputError
        It is neither.
    LrcError
        The adapter cannot be merged.
    """
    path = directory_of(model)
    return _with_adapter(download(model, revision, trust_remote_code) if path is None else path, trust_remote_code, ())


def _with_adapter(path: Path, trust_remote_code: bool, through: tuple[Path, ...]) -> Path:
    """Merge the adapter of a directory, if it has one."""
    if not (path / ADAPTER).exists():
        return path
    if path.resolve() in through:
        raise InputError(f"The adapter {path} names itself as its base, or a directory that leads back to it.")

    def find(base: str, revision: str | None) -> Path:
        there = directory_of(base)
        found = download(base, revision, trust_remote_code) if there is None else there
        return _with_adapter(found, trust_remote_code, (*through, path.resolve()))

    return merged(path, find)


def directory_of(model: str) -> Path | None:
    """The directory that `model` names; None if it may be a hub name.

    Raises
    ------
    InputError
        It is a file, or a path to nothing.
    """
    if not model.strip():
        raise InputError("The model's name is empty; expected a checkpoint directory or a hub name.")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as problem:
        raise InputError(f"{model!r} cannot be looked up ({problem}); expected a directory or a hub name.") from None
    if exists:
        raise InputError(
            f"{model} is a file; expected a checkpoint directory (one with config.json) or a hub name. {_file(path)}"
        )
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1:
        raise InputError(f"The directory {model} does not exist; expected a checkpoint directory or a hub name.")
    return None


def _file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF files are quantized or converted: pass the original checkpoint."
    return f"Pass the directory that holds it, {path.parent}, if its config.json is there too."


def download(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    snapshot: Snapshot | None = None,
    listing: Callable[..., Iterable[str]] | None = None,
) -> Path:
    """Download what is read of a repository, and nothing else: config and tokenizer first, then the weights they name.

    Parameters
    ----------
    model, revision
        Repository and its revision.
    trust_remote_code
        Whether its code comes along.
    snapshot, listing
        In place of huggingface_hub's ``snapshot_download`` and ``list_repo_files``.

    Raises
    ------
    InputError
        It cannot be had, or is no checkpoint.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    snapshot = snapshot or huggingface_hub.snapshot_download
    listing = listing or huggingface_hub.list_repo_files

    def fetch(patterns: list[str], at: str | None) -> Path:
        return Path(snapshot(model, revision=at, allow_patterns=patterns))

    def names(at: str | None) -> list[str]:
        try:
            return sorted(listing(model, revision=at))
        except Exception:  # no network: nothing is known
            return []

    try:
        small = [
            "config.json",
            ADAPTER,
            INDEX,
            *COMPANIONS,
            f"{MODULES}/*.json",
            f"{MODULES}/*.safetensors",
            *(["*.py"] if trust_remote_code else []),
        ]
        path = fetch(small, revision)
        # All parts from the same state of the repository.
        at = path.name if path.parent.name == "snapshots" else revision
        if (path / ADAPTER).exists():
            fetch(["adapter_model.safetensors"], at)
        if not (path / "config.json").exists():
            if (path / ADAPTER).exists():
                return path
            raise InputError(no_config(f"The repository {model}", names(at)))
        fetch([SINGLE], at)
        if (path / SINGLE).exists():
            return path
        if not (path / INDEX).exists():
            raise InputError(no_weights(f"The repository {model}", names(at)))
        shards = sorted(set(read_index(path / INDEX).values()))
        fetch(shards, at)
        if lacking := [name for name in shards if not (path / name).exists()]:
            raise InputError(f"The repository {model} lacks {few(lacking)}, though its {INDEX} names them.")
        return path
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, json.JSONDecodeError) as problem:
        raise InputError(
            f"{model!r} is neither a directory here nor a model that could be had from the Hugging Face hub "
            f"({first_line(problem)}). Check the name and revision, log in if it is gated, or pass a "
            "directory."
        ) from problem
