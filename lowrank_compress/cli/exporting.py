"""Body of `lrc export`: compressed weights as checkpoints that need nothing of this package."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.directories import refuse_unsafe
from lowrank_compress.cli.commands import precious
from lowrank_compress.cli.terminal import TerminalReporter, console
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import write_dense
from lowrank_compress.model.locate import locate
from lowrank_compress.model.native import write_native
from lowrank_compress.stages.run import Run


def export(target: str, dense: Path | None, native: Path | None, overwrite: bool, reporter: TerminalReporter) -> None:
    """Write compressed weights as a checkpoint of transformers' own: dense, or as small as it is.

    Raises
    ------
    LrcError
        Not one of both is asked for, or the target cannot be exported so.
    """
    if (dense is None) == (native is None):
        raise InputError(
            "Expected either --dense PATH or --native PATH, got " + ("none." if dense is None else "both.")
        )
    run = Run(Path(target))
    final = run.finished() if run.exists() else None
    source = Checkpoint(final.path if final else locate(target))
    if native is not None:
        refuse_unsafe(native, "--native", **precious(source.path, run, final))
        write_native(source, native, overwrite=overwrite)
        console().print(f"Native checkpoint: {native}")
    elif dense is not None:
        refuse_unsafe(dense, "--dense", **precious(source.path, run, final))
        write_dense(source, dense, lambda done, total: reporter.advance("export", done, total), overwrite=overwrite)
        console().print(f"Dense checkpoint: {dense}")
