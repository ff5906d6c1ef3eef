"""Body of `lrc recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_compress.cli.commands import device_name, followed, recipe_beside
from lowrank_compress.cli.terminal import TerminalReporter
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.stages.recoverconfig import RecoverConfig, options_of
from lowrank_compress.strict import COMMAND_LINE, stage_config


def recover(
    target: str,
    data: dict[str, Any],
    how: dict[str, Any],
    device: str | None,
    dense: str | None,
    out: Path | None,
    overwrite: bool,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Train a compressed checkpoint; what is not said of the data is as the run's recipe has it."""
    recipe = recipe_beside(target)
    options = options_of(data, recipe, device_name(device)) | how
    config = stage_config(RecoverConfig, COMMAND_LINE, options)
    original = None if dense is None else Checkpoint(locate(dense))
    return followed("recover", target, config, out, overwrite, reporter, original)
