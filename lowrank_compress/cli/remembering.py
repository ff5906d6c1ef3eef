"""Body of `lrc cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_compress.cli.commands import device_name, followed, recipe_beside
from lowrank_compress.cli.terminal import TerminalReporter
from lowrank_compress.stages.cacheconfig import CacheConfig, options_of
from lowrank_compress.strict import COMMAND_LINE, stage_config


def cache(
    target: str,
    data: dict[str, Any],
    how: dict[str, Any],
    device: str | None,
    out: Path | None,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Let a checkpoint cache latents; what is not said of the data is as the run's recipe has it."""
    recipe = recipe_beside(target)
    options = options_of(data, recipe, device_name(device)) | how
    config = stage_config(CacheConfig, COMMAND_LINE, options)
    return followed("cache", target, config, out, overwrite, reporter)
