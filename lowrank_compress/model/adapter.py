"""A PEFT adapter merged into its base, once: an ordinary checkpoint in the user's cache.

transformers loads base and adapter beside each other; a method that factors weights needs their sum. peft itself
merges, in memory, where the whole base must fit; everything afterwards goes block by block as always.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lowrank_compress.artifacts.documents import canonical_hash
from lowrank_compress.artifacts.hashes import cache_directory, file_hashes
from lowrank_compress.errors import CheckpointError, InputError, LrcError, UnsupportedError
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.casting import require_finite
from lowrank_compress.model.checkpoint import Checkpoint, in_a_line
from lowrank_compress.model.shards import ADAPTER, COMPANIONS, Stored, open_tensors, read_settings

WEIGHTS = "adapter_model.safetensors"
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
_PREFIX = "base_model.model."
# peft writes a module of the adapter's own under several names where the vocabulary has grown.
_WRAPPED = re.compile(r"\.(original_module|modules_to_save)\.")


def merged(adapter: Path, find: Callable[[str, str | None], Path]) -> Path:
    """Return the directory of the dense checkpoint that an adapter and its base make.

    It is content-addressed by both, made on the first call, and used again by later ones.

    Parameters
    ----------
    adapter
        A directory with adapter_config.json; with config.json too it is its own base, as for transformers.
    find
        Finds a base by its name and revision.

    Raises
    ------
    InputError
        peft is not installed, or the base cannot be had.
    CheckpointError
        The adapter is damaged, or does not fit its base.
    UnsupportedError
        An adapter of its kind cannot be merged.
    """
    settings = _settings(adapter)
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{adapter} is a PEFT adapter ({ADAPTER}), which peft merges into its base. Install it: "
            "pip install 'lowrank_compress[adapters]'."
        )
    cache = cache_directory()
    if cache is None:
        raise InputError("There is no home directory to keep a merged adapter in. Set XDG_CACHE_HOME.")
    with _base(adapter, settings, find) as base:
        checkpoint = Checkpoint(base)
        place = cache / "merged" / _key(checkpoint, adapter)
        if not (place / "config.json").exists():
            _make(checkpoint, adapter, settings, place)
    return place


def _settings(adapter: Path) -> dict[str, Any]:
    """Read and check adapter_config.json."""
    settings = read_settings(adapter / ADAPTER)
    kind = settings.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{adapter / ADAPTER} has no peft_type. Download the adapter again.")
    if settings.get("megatron_config"):  # peft would import any module that the file names
        raise UnsupportedError(f"{adapter} is an adapter for Megatron, which cannot be merged here.")
    if not (adapter / WEIGHTS).exists():
        raise CheckpointError(
            f"{adapter} has no {WEIGHTS}; a pickle is not loaded, as it can run any code. Load the adapter with peft "
            "where you trust it and `save_pretrained` it."
        )
    return settings


@contextmanager
def _base(adapter: Path, settings: Mapping[str, Any], find: Callable[[str, str | None], Path]) -> Iterator[Path]:
    """Find the base: what the adapter names, or the full weights that it lies beside."""
    if (adapter / "config.json").exists():
        with tempfile.TemporaryDirectory() as place:
            for path in adapter.iterdir():
                if not path.name.startswith("adapter_"):  # without which it is an ordinary checkpoint
                    (Path(place) / path.name).symlink_to(path.resolve())
            yield Path(place)
        return
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name.strip():
        raise CheckpointError(f"{adapter / ADAPTER} names no base (base_model_name_or_path). Add it there.")
    try:
        found = find(name, revision if isinstance(revision, str) else None)
    except LrcError as problem:
        raise InputError(f"The base {name!r} of the adapter {adapter} cannot be had: {problem}") from problem
    yield found


def _key(base: Checkpoint, adapter: Path) -> str:
    import peft

    own = {name: adapter / name for name in (ADAPTER, WEIGHTS, *COMPANIONS) if (adapter / name).exists()}
    parts = {"base": file_hashes(base.identity()), "adapter": file_hashes(own), "peft": peft.__version__}
    return canonical_hash(parts)[:32]


def _make(base: Checkpoint, adapter: Path, settings: Mapping[str, Any], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _merge(base, adapter, settings)
        model.save_pretrained(draft)
        # An adapter with new tokens brings the tokenizer that has them.
        source = adapter if (adapter / "tokenizer_config.json").exists() else base.path
        for name in COMPANIONS:
            if (source / name).exists() and not (draft / name).exists():
                shutil.copyfile(source / name, draft / name)
        blueprint(Checkpoint(draft))  # complains of what is wrong with it
        try:
            os.rename(draft, place)
        except OSError:
            if not (place / "config.json").exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _merge(base: Checkpoint, adapter: Path, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Let peft merge, after making sure that it will load all there is, and nothing at random."""
    from peft import PeftModel, get_peft_model_state_dict

    tensors = _tensors(adapter)
    model = _load(base, adapter, settings, tensors)
    _grow(model, tensors)
    try:
        whole = PeftModel.from_pretrained(model, adapter, torch_device="cpu")
        expected = set(get_peft_model_state_dict(whole, save_embedding_layers=False))
        known = {*expected, *whole.state_dict(), *(name for name in tensors if _WRAPPED.sub(".", name) in expected)}
        if not hasattr(whole, "merge_and_unload") or not hasattr(whole.base_model, "merge_and_unload"):
            raise UnsupportedError(
                f"An adapter of the kind {settings['peft_type']} ({adapter}) adds no weights that can be merged into "
                "its base. LoRA and its relatives can be."
            )
        if wrong := sorted(expected - set(tensors)) or sorted(set(tensors) - known):
            raise CheckpointError(
                f"The adapter {adapter} does not fit its base: the tensor {wrong[0]} and {len(wrong) - 1} more are in "
                "only one of them. The base is another one, or adapter_config.json was edited."
            )
        found = whole.merge_and_unload()
        for name, tensor in found.state_dict().items():
            require_finite(tensor, name)
        return found
    except LrcError:
        raise
    except Exception as problem:  # peft raises many types
        raise CheckpointError(
            f"peft cannot merge the adapter {adapter} into its base: {in_a_line(problem)}"
        ) from problem


def _tensors(adapter: Path) -> dict[str, Stored]:
    with open_tensors(adapter / WEIGHTS) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: Stored(adapter / WEIGHTS, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()
        }


def _load(
    base: Checkpoint, adapter: Path, settings: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> PreTrainedModel:
    """Load the base, with the head that the adapter is for."""
    _ = base.config, base.dtype
    if base.quantization is not None:
        raise UnsupportedError(
            f"The base of the adapter {adapter}, {base.path}, is compressed; adapters are merged into dense "
            "checkpoints."
        )
    named = (getattr(base.config, "architectures", None) or [""])[0]
    classifier = named.endswith("ForSequenceClassification")
    if settings.get("task_type") != "SEQ_CLS" or classifier:
        blueprint(base)  # complains of what is wrong with it
        auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        return auto.from_pretrained(base.path, dtype="auto")
    heads = [stored.shape[0] for name, stored in tensors.items() if name.endswith(_HEADS)]
    if not heads:
        raise CheckpointError(f"The adapter {adapter} is for a classifier (SEQ_CLS), but stores no head for it.")
    try:
        found = AutoModelForSequenceClassification.from_pretrained(
            base.path, dtype="auto", num_labels=heads[0], output_loading_info=True
        )
    except Exception as problem:
        raise CheckpointError(f"{base.path} cannot be loaded as a classifier: {in_a_line(problem)}") from problem
    model, info = found
    brought = {name.removeprefix(_PREFIX) for name in tensors}
    if lacking := sorted(name for name in info["missing_keys"] if name not in brought):
        raise CheckpointError(
            f"Neither the adapter {adapter} nor its base {base.path} stores {lacking[0]}, which the classifier needs."
        )
    return model


def _grow(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> None:
    """Make room for the rows of an embedding that the adapter brings along."""
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        stored = tensors.get(f"{_PREFIX}{name}.weight")
        if module is embedding and stored is not None and stored.shape[0] != model.config.vocab_size:
            model.resize_token_embeddings(stored.shape[0], mean_resizing=False)
