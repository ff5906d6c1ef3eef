"""A finished checkpoint, put on the Hugging Face hub: its own files, and nothing else of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from lowrank_compress.artifacts.hashes import file_hashes
from lowrank_compress.artifacts.manifest import MANIFEST, listed, read_manifest, require_intact
from lowrank_compress.errors import ArtifactError, InputError, first_line
from lowrank_compress.model.dense import EXPORT, exported
from lowrank_compress.stages.run import LOADED, Run, require_alone

LISTINGS: Mapping[str, Callable[[Path], Mapping[str, str]]] = {MANIFEST: listed, EXPORT: exported}
"""Files of checkpoints that say which files are of them."""


def finished_files(target: Path) -> tuple[Path, list[str]]:
    """Find the checkpoint that a target means, and the files that it consists of, which are as they were written.

    Parameters
    ----------
    target
        A run, a compressed checkpoint, or an export.

    Raises
    ------
    ArtifactError
        It is not finished, or was changed since.
    InputError
        It is none of them.
    """
    run = Run(target)
    if run.exists():
        final = run.finished()
        return final.path, sorted({*final.manifest.outputs, MANIFEST})
    if (manifest := read_manifest(target)) is not None:
        require_intact(target, manifest)
        require_alone(target, manifest)
        return target, sorted({*manifest.outputs, MANIFEST})
    files = exported(target)
    if not files:
        raise InputError(f"{target} is no finished checkpoint of this program: pass a run, or what was exported.")
    there = {name: target / name for name, digest in files.items() if digest and (target / name).is_file()}
    found = file_hashes(there)
    if changed := [name for name, digest in files.items() if digest and found.get(name) != digest]:
        raise ArtifactError(f"{target / changed[0]} is missing or not as it was written. Export it again.")
    return target, sorted(files)


def check_account(repo: str, token: str | None = None) -> None:
    """Make sure before any work that there is a token, that the hub takes it, and that the name is one.

    Raises
    ------
    InputError
        It is not so.
    """
    with _reaching(repo, token):
        huggingface_hub.utils.validate_repo_id(repo)
        if not (token or huggingface_hub.get_token()):
            raise InputError(
                "Pushing to the hub needs a token that may write: log in with `hf auth login`, set HF_TOKEN, or pass "
                "--token."
            )
        HfApi(token=token).whoami()


def publish(
    target: Path, repo: str, *, token: str | None = None, private: bool = False, overwrite: bool = False
) -> str:
    """Put a finished checkpoint into a repository of the hub, in one commit; return its address.

    The repository is made if there is none. An earlier checkpoint of ours is replaced: files of it that the new one
    does not have are removed, as they would be loaded with it. What else is there stays.

    Parameters
    ----------
    target
        A run, a compressed checkpoint, or an export.
    repo
        OWNER/NAME, or a name for a repository of the token's own account.
    token
        None for that of the environment, or of a log-in. It is kept nowhere.
    private
        Whether a new repository is to be.
    overwrite
        Replace a model that is not from this program.

    Raises
    ------
    LrcError
        The target is not finished, the hub cannot be reached or refuses, or another model is there.
    """
    place, names = finished_files(target)
    with _reaching(repo, token):
        api = HfApi(token=token, library_name="lowrank_compress")
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        present = set(api.list_repo_files(url.repo_id))
        ours = _ours(api, url.repo_id, present)
        models = [name for name in sorted(present - ours) if name.endswith(LOADED)]
        if models and not overwrite:
            raise InputError(
                f"{url.repo_id} on the hub holds another model ({models[0]}), or one that was changed. Choose another "
                "name, or pass --overwrite to replace it."
            )
        stale = sorted((ours | set(models if overwrite else ())) & present - set(names))
        additions = [CommitOperationAdd(name, place / name) for name in names]
        api.create_commit(
            url.repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message="Upload a checkpoint of lowrank_compress",
        )
    return str(url)


def _ours(api: HfApi, repo: str, present: set[str]) -> set[str]:
    """Name the files of a repository that a checkpoint of ours there lists."""
    found: set[str] = set()
    with tempfile.TemporaryDirectory() as place:
        for name, read in LISTINGS.items():
            if name in present:
                api.hf_hub_download(repo, name, local_dir=place)
                found |= set(read(Path(place)))
    return found


@contextmanager
def _reaching(repo: str, token: str | None) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as problem:
        said = first_line(problem).replace(token, "…") if token else first_line(problem)
        raise InputError(
            f"{repo} on the Hugging Face hub cannot be written to ({said}). Check the name, the network, and that the "
            "token may write there. What is finished stays; the same command pushes it later."
        ) from None
