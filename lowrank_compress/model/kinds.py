"""What people pass for a checkpoint that is none: named, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
EXPECTED = "expected a Hugging Face checkpoint (config.json, *.safetensors, tokenizer files)"
# Where else weights may be: what they are for, and how their files end.
_OTHERS = (
    ("GGUF", ".gguf"), ("ONNX", ".onnx"), ("TensorFlow", ".h5"), ("Flax", ".msgpack"), ("Core ML", ".mlmodel"),
    ("OpenVINO", "openvino_model.xml"),
)  # fmt: skip


def names_in(directory: Path) -> list[str]:
    """Relative paths of the files in a directory and those directly below it."""
    found = []
    for path in sorted(directory.iterdir()):
        found.append(path.name)
        if path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{child.name}" for child in sorted(path.iterdir())]
    return found


def no_config(where: object, names: Collection[str]) -> str:
    """Say what a place without config.json is.

    Parameters
    ----------
    where
        The place: a path, or words.
    names
        The files in it.
    """
    if not names:
        return f"{where} has no config.json, nor anything else; {EXPECTED}."
    if "run.json" in names or ("recipe.yaml" in names and {"model", "scores", "stats", "work"} & set(names)):
        return (
            f"{where} is a run of this program, and has no config.json at its top. Its compressed checkpoint is "
            f"{where}/model; to compress anew, pass the original checkpoint that its recipe.yaml names."
        )
    if "model_index.json" in names:
        return f"{where} is a diffusers pipeline (model_index.json) and has no config.json; {EXPECTED}."
    if "modules.json" in names:
        inside = [name.rpartition("/")[0] for name in names if name.endswith("/config.json")]
        return f"{where} is a sentence-transformers model and has no config.json at its top; {EXPECTED}" + (
            f", and {where}/{inside[0]} has a config.json." if inside else "."
        )
    if "params.json" in names or any(name.startswith("consolidated") for name in names):
        return (
            f"{where} is in the format of the model's authors (params.json, consolidated.*) and has no config.json; "
            f"{EXPECTED}. Convert it with transformers, or get the version of it for transformers."
        )
    if any(name.startswith("adapter_model") for name in names):
        return f"{where} has adapter weights without adapter_config.json; expected both. Download the adapter again."
    if other := _other_weights(names):
        return f"{where} has no config.json; {EXPECTED}. It has {other}: pass the checkpoint that they were made from."
    return f"{where} has no config.json; {EXPECTED}. It has {few(names)}."


def no_weights(where: object, names: Collection[str]) -> str:
    """Say what a place with config.json has in place of weights that transformers would load safely."""
    if others := [name for name in names if name.endswith(".safetensors") and "/" not in name]:
        return (
            f"{where} has {few(others)}, but neither model.safetensors nor model.safetensors.index.json; transformers "
            "loads no others. Rename a single file to model.safetensors; for several, download the index too."
        )
    if pickled := [name for name in names if name.endswith(PICKLED) and "/" not in name]:
        return (
            f"{where} has pickled weights only ({few(pickled)}); loading a pickle can run any code. Convert it first: "
            "load it with transformers where you trust it and `save_pretrained` it, which writes safetensors."
        )
    if other := _other_weights(names):
        return f"{where} has {other} only; expected safetensors. Get the original checkpoint that they were made from."
    return (
        f"{where} has no weights; expected model.safetensors or shards with model.safetensors.index.json. Download the "
        "checkpoint again."
    )


def _other_weights(names: Collection[str]) -> str | None:
    for kind, suffix in _OTHERS:
        if found := [name for name in names if name.endswith(suffix)]:
            return f"weights for {kind} ({few(found)})"
    if found := [name for name in names if name.endswith(PICKLED)]:
        return f"pickled weights ({few(found)})"
    return None


def few(names: Sequence[str] | Collection[str]) -> str:
    """Name three of them."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
