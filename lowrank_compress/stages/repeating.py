"""The commands that make a run again: its recipe, and each stage that was added to it since."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from lowrank_compress.artifacts.manifest import Manifest, read_manifest
from lowrank_compress.config import CalibrationSet
from lowrank_compress.errors import ArtifactError
from lowrank_compress.recipe import Recipe, load_recipe
from lowrank_compress.stages.index import Index
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.table import STAGES

RECIPE, AGAIN = "recipe.yaml", "AGAIN"
# Settings of stages that commands say in another way, find in the recipe, or cannot be told.
_ELSEWHERE = {*CalibrationSet.model_fields, "device", "shard_bytes", "block", "towards", "clip", "drawn", "lambdas"}
_OF_RECIPE = {"refine": {"damping_fisher"}, "cache": {"damping_fisher", "damping_gram"}}
# Names of options that are not those of settings.
_FLAGS = {"inside": "residual-inside"}
# Those of a stage that reads a text; by default they are the recipe's.
OF_TEXT = {"refine": ("samples", "seq_len", "seed"), "recover": ("seq_len", "seed")}
OF_TEXT["quantize"] = OF_TEXT["cache"] = OF_TEXT["refine"]


def commands_of(run: Run, index: Index) -> list[str]:
    """Say how to make a finished run again in a directory ``AGAIN``, of a copy of its recipe.

    A text that is not the recipe's is called TEXT, since a run knows it by its hash alone.

    Raises
    ------
    ArtifactError
        A stage of its chain has left no manifest.
    """
    recipe = load_recipe(run.recipe, {})
    calibrated = _manifest_or_none(run, run.statistics.name)
    text = None if calibrated is None else calibrated.key.inputs.get("text")
    found = [["lrc", "compress", "--config", RECIPE, "--out", AGAIN]]
    for link in index.chain:
        if link.directory in (run.model.name, run.unrefined.name, run.unquantized.name):
            continue  # `lrc compress` makes it
        if (made := _manifest_or_none(run, link.directory)) is None:
            raise ArtifactError(f"{run.path / link.directory} has no manifest. Repeat `lrc {link.stage}` on this run.")
        found.append(["lrc", STAGES[link.stage].command, AGAIN, *_options(made, recipe, text)])
    return [shlex.join(words) for words in found]


def _manifest_or_none(run: Run, directory: str) -> Manifest | None:
    try:
        return read_manifest(run.path / directory)
    except ArtifactError:
        return None


def _options(made: Manifest, recipe: Recipe, text: str | None) -> Iterator[str]:
    """Write out what a stage was told that is neither its default nor the recipe's."""
    stage, config, own = made.key.stage, made.key.config, made.key.inputs.get("text")
    if config.get("block") is not None:
        yield from ("--block", "--block-steps", str(config["block"]))
    defaults = {name: field.default for name, field in STAGES[stage].config.model_fields.items()}
    for name in told(stage):
        # What is at its default may not be said, so that what was made before there was such an option is the same.
        if config.get(name) is not None and config[name] != defaults[name]:
            yield from _option(name, config[name])
    if own is None:
        return
    for name in OF_TEXT.get(stage, ()):
        if config[name] != getattr(recipe, name):
            yield from _option(name, config[name])
    if config.get("towards") == "text":
        yield from ("--text", "TEXT")
    elif own != text:
        yield from ("--calibration", "TEXT")


def told(stage: str) -> list[str]:
    """Name the settings of a stage that its command has options for."""
    elsewhere = _ELSEWHERE | _OF_RECIPE.get(stage, set())
    return [name for name in STAGES[stage].config.model_fields if name not in elsewhere]


def _option(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("--asymmetric",) if name == "symmetric" else (flag_of(name),)  # as no default
    return (flag_of(name), str(value).removesuffix(".0"))


def flag_of(name: str) -> str:
    """Spell the option of a setting."""
    return f"--{_FLAGS.get(name, name.replace('_', '-'))}"
