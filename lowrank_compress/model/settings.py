"""What config.json may say: checked before transformers is let at it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.errors import CheckpointError, InputError, UnsupportedError
from lowrank_compress.model.shards import Stored
from lowrank_compress.shipped.config import QUANT_METHOD, VERSION, LowRankConfig

# Entries that make `from_pretrained` load something else than the usual files into the usual modules.
_UNUSUAL = ("transformers_weights", "fusion_config", "compression_config")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "n_embd", "n_head", "n_inner", "dim", "hidden_dim", "n_heads", "ffn_dim", "word_embed_proj_dim", "num_labels",
)  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions")
MANY_POSITIONS = 1 << 40
# What to do about quantized weights that are all there is.
_CURES = {
    "mxfp4": "Make it plain: AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.bfloat16, quantization_config="
    "Mxfp4Config(dequantize=True)).save_pretrained(PLAIN), with transformers, and compress that.",
}


def quantization(path: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how this package compressed a checkpoint: the ``quantization_config`` of its config.json.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    raw
        Its config.json.

    Returns
    -------
    dict or None
        None for a dense checkpoint.

    Raises
    ------
    UnsupportedError
        It is quantized by something else, or by another version of this package.
    CheckpointError
        The entry is malformed.
    """
    found = raw.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(method, str) or not method:
        raise CheckpointError(
            f"{path / 'config.json'} has a malformed quantization_config ({_short(found)}); expected an object with a "
            "quant_method, or none at all. Remove the entry if the weights are plain ones."
        )
    if method != QUANT_METHOD:
        cure = _CURES.get(method, "Start from the dense checkpoint that it was made from.")
        raise UnsupportedError(f"{path} is quantized ({_short(method)}); expected plain floating-point weights. {cure}")
    version = found.get("version", VERSION)
    if type(version) is int and version > VERSION:
        raise UnsupportedError(
            f"{path} was compressed by a later version of this program (format version {_short(version)}; this one "
            f"reads 1 to {VERSION}). Update lowrank_compress."
        )
    try:
        LowRankConfig(**found)
    except Exception as problem:  # whatever a malformed entry runs into
        raise CheckpointError(
            f"{path / 'config.json'} has a malformed quantization_config ({_short(problem)}). Compress the original "
            "checkpoint again."
        ) from problem
    return found


def own_code(raw: Mapping[str, Any]) -> list[str]:
    """Name the auto classes for which a checkpoint brings code of its own (not that of this package)."""
    entries = raw.get("auto_map")
    ours = isinstance(found := raw.get("quantization_config"), dict) and found.get("quant_method") == QUANT_METHOD
    if not isinstance(entries, dict) or ours:
        return []
    return [name for name in entries if name == "AutoConfig" or str(name).startswith("AutoModelFor")]


def refuse_own_code(path: Path, raw: Mapping[str, Any], *, known: bool, trusted: bool) -> None:
    """Refuse a checkpoint whose own code would have to run but may not, or would run in place of what is compressed.

    Parameters
    ----------
    known
        Whether transformers has the model type itself.
    trusted
        Whether the code may run.

    Raises
    ------
    InputError
        See above.
    """
    names = own_code(raw)
    kind = raw.get("model_type")
    if names and not known and not trusted:
        raise InputError(
            f"{path} brings its own code for the model type {kind!r} ({', '.join(names)} in auto_map), which "
            "transformers does not have. Read that code, and pass --trust-remote-code if it may run; the model type "
            "must also be one that `lrc list architectures` names."
        )
    models = [name for name in names if name.startswith("AutoModelFor")]
    if models and known and trusted:
        raise InputError(
            f"{path} brings its own model class ({', '.join(models)} in auto_map) for {kind!r}, which "
            "--trust-remote-code would use in place of transformers' own. Leave that option out: transformers' own is "
            "what this program compresses."
        )


def refuse_absurd(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Refuse sizes that what is stored cannot have, before anything is built that takes time or memory.

    Raises
    ------
    CheckpointError
        A size is no whole number, less than one, or more than the stored tensors can have.
    """
    for name in _UNUSUAL:
        if raw.get(name) is not None:
            raise CheckpointError(
                f"{path / 'config.json'} sets {name}, which makes transformers load the weights in a way that this "
                "program does not. Load it with transformers and `save_pretrained` it without that entry."
            )
    elements = sum(stored.elements for stored in tensors.values())
    limits = {name: (len(tensors), "tensors are stored") for name in _LAYERS}
    limits |= {name: (elements, "elements are stored") for name in _WIDTHS}
    limits |= {name: (MANY_POSITIONS, "positions are supported") for name in _POSITIONS}
    for name, (limit, what) in limits.items():
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise CheckpointError(
                f"{path / 'config.json'} has {name} = {_short(value)}; expected a whole number from 1 to {limit:,}, as "
                f"no more {what}. The config belongs to another checkpoint, or is damaged."
            )
    labels = raw.get("label2id") or {}
    if not isinstance(labels, dict) or not all(str(number).isdecimal() for number in labels.values()):
        raise CheckpointError(f"{path / 'config.json'} has a malformed label2id; expected labels and their numbers.")
    if not isinstance(raw.get("id2label") or {}, dict):
        raise CheckpointError(f"{path / 'config.json'} has a malformed id2label; expected numbers and their labels.")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:120] + " …"
