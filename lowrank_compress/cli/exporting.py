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


def export(target: str, dense: Path | None, native: Path | None, overwrite: bool, reporter: TerminalReporter) -> Path:
    """Write compressed weights as a checkpoint of transformers' own: dense, or as small as it is; return where.

    Raises
    ------
    LrcError
        Not one of both is asked for, or the target cannot be exported so.
    """
    places = [place for place in (dense, native) if place is not None]
    if len(places) != 1:
        raise InputError(f"Expected either --dense PATH or --native PATH, got {'both' if places else 'none'}.")
    run = Run(Path(target))
    final = run.finished() if run.exists() else None
    source = Checkpoint(final.path if final else locate(target))
    option = "--native" if dense is None else "--dense"
    refuse_unsafe(places[0], option, **precious(source.path, run, final))
    if dense is None:
        write_native(source, places[0], overwrite=overwrite)
    else:
        if any(
            entry.get("latent", {}).get("window") for entry in (source.quantization or {}).get("attention", {}).values()
        ):
            reporter.warn(
                "The checkpoint's cache keeps exact keys and values of its last tokens alone. A stock model keeps them "
                "of all, and so does this export: it is the model without a smaller cache."
            )
        write_dense(source, dense, lambda done, total: reporter.advance("export", done, total), overwrite=overwrite)
    console().print(f"{'Native' if dense is None else 'Dense'} checkpoint: {places[0]}")
    return places[0]
