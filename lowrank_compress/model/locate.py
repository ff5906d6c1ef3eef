"""Find what MODEL names: a checkpoint's directory, that of an adapter, or a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lowrank_compress.errors import InputError, first_line
from lowrank_compress.model.adapter import merged
from lowrank_compress.model.kinds import few, no_config, no_weights
from lowrank_compress.model.shards import ADAPTER, COMPANIONS, INDEX, MODULES, SINGLE, read_index

Snapshot = Callable[..., str]
HUB = "hf://"
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<folder>[^@]+?))?/?")


class Address(NamedTuple):
    """A place on the Hugging Face hub: a repository, its revision, and a folder in it."""

    repo: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> Address:
        """Read a hub name, or hf://OWNER/NAME[@REVISION][/FOLDER] as in huggingface_hub's file system.

        Raises
        ------
        InputError
            It is none, or names another revision.
        """
        if not model.startswith(HUB):
            return cls(model, revision)
        found = _ADDRESS.fullmatch(model)
        if found is None or _climbs(found["folder"] or ""):
            raise InputError(f"{model} names nothing on the hub; expected hf://OWNER/NAME[@REVISION][/FOLDER].")
        if revision is not None and found["revision"] not in (None, revision):
            raise InputError(f"{model} names the revision {found['revision']}, and --revision {revision}. Pass one.")
        return cls(found["repo"], found["revision"] or revision, found["folder"] or "")


def _climbs(folder: str) -> bool:
    return any(part in ("", ".", "..") for part in folder.split("/")) if folder else False


def in_folder(model: str, folder: str | None) -> str:
    """Name a folder of a directory, or of a repository of the hub.

    Raises
    ------
    InputError
        The folder does not lie in it, or the repository is named without its owner.
    """
    if folder is None:
        return model
    folder = folder.strip("/")
    if not folder or _climbs(folder):
        raise InputError(f"--subfolder {folder!r} is no folder of a model; expected one like 'base' or 'v2/base'.")
    directory = directory_of(model)
    if directory is not None:
        return str(directory / folder)
    known = Address.of(model)
    if "/" not in known.repo:
        raise InputError(f"--subfolder needs the repository's full name, OWNER/NAME; got {model}.")
    at = f"@{known.revision}" if known.revision else ""
    return f"{HUB}{known.repo}{at}/" + "/".join(part for part in (known.folder, folder) if part)


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
    if model.startswith(HUB):
        return None
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

    listing = listing or huggingface_hub.list_repo_files
    address = Address.of(model, revision)
    inside = f"{address.folder}/" if address.folder else ""
    where = f"The repository {address.repo}" + (f", in {address.folder}," if inside else "")

    def fetch(patterns: list[str], at: str | None) -> Path:
        return _fetched(address, patterns, at, snapshot)

    def names(at: str | None) -> list[str]:
        try:
            found = sorted(listing(address.repo, revision=at))
        except Exception:  # no network: nothing is known
            return []
        return [name.removeprefix(inside) for name in found if name.startswith(inside)]

    with _reaching(model):
        small = [
            "config.json",
            ADAPTER,
            INDEX,
            *COMPANIONS,
            f"{MODULES}/*.json",
            f"{MODULES}/*.safetensors",
            *(["*.py"] if trust_remote_code else []),
        ]
        path = fetch(small, address.revision)
        # All parts from the same state of the repository.
        root = path.parents[address.folder.count("/")] if inside else path
        at = root.name if root.parent.name == "snapshots" else address.revision
        if (path / ADAPTER).exists():
            fetch(["adapter_model.safetensors"], at)
        if not (path / "config.json").exists():
            if (path / ADAPTER).exists():
                return path
            raise InputError(no_config(where, names(at)))
        fetch([SINGLE], at)
        if (path / SINGLE).exists():
            return path
        if not (path / INDEX).exists():
            raise InputError(no_weights(where, names(at)))
        shards = sorted(set(read_index(path / INDEX).values()))
        fetch(shards, at)
        if lacking := [name for name in shards if not (path / name).exists()]:
            raise InputError(f"{where} lacks {few(lacking)}, though its {INDEX} names them.")
        return path


def files_of(model: str, names: Iterable[str]) -> Path:
    """Return the directory of a checkpoint of which only some files are read: they are all that is downloaded.

    Raises
    ------
    InputError
        It is neither a directory nor a repository that can be had.
    """
    directory = directory_of(model)
    if directory is not None:
        return directory
    with _reaching(model):
        address = Address.of(model)
        return _fetched(address, list(names), address.revision, None)


def _fetched(address: Address, patterns: list[str], at: str | None, snapshot: Snapshot | None) -> Path:
    import huggingface_hub

    inside = f"{address.folder}/" if address.folder else ""
    fetch = snapshot or huggingface_hub.snapshot_download
    return Path(fetch(address.repo, revision=at, allow_patterns=[f"{inside}{name}" for name in patterns])) / inside


@contextmanager
def _reaching(model: str) -> Iterator[None]:
    """Say what it means that a repository cannot be had."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, json.JSONDecodeError) as problem:
        raise InputError(
            f"{model!r} is neither a directory here nor a model that could be had from the Hugging Face hub "
            f"({first_line(problem)}). Check the name and revision, log in if it is gated, or pass a "
            "directory."
        ) from problem
