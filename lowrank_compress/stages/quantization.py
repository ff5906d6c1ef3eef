"""`quantize`, as Python programs call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_compress.artifacts.directories import refuse_unsafe
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.errors import InputError
from lowrank_compress.model.locate import locate
from lowrank_compress.recipe import load_recipe
from lowrank_compress.stages.chain import beside, extend
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.index import read_index
from lowrank_compress.stages.quantizeconfig import QuantizeConfig, options_of
from lowrank_compress.stages.reporting import Reporter
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.table import STAGES
from lowrank_compress.strict import stage_config
from lowrank_compress.texts import Place

DATA = ("text_column", "label_column", "samples", "seq_len", "seed")


def quantize(
    target: Place,
    bits: float | None = 4,
    *,
    calibration: Place | None = None,
    out: Place | None = None,
    rounding: str = "kfac",
    device: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Store the linear layers of a checkpoint in a few bits a weight, as ``lrc quantize`` does, with the same bytes.

    Parameters
    ----------
    target
        A run, a compressed checkpoint or a dense one.
    bits
        Of every weight; a fraction for so many on average; None where ``bytes`` is given.
    calibration
        A text; None for that of the run's recipe, or for the rounding that needs none.
    out
        A new directory; None, for a run, for its own.
    rounding, device, overwrite
        As the options of the command.
    reporter
        Told about progress and warnings; None for silence, and Python warnings.
    fields
        Any other field of `QuantizeConfig`.

    Returns
    -------
    dict
        ``model``, where the checkpoint is, ``id``, and ``quantize``: what was asked for and reached.

    Raises
    ------
    LrcError
        The input is not what it must be; the message says what to do.
    """
    run, stage = Run(Path(target)), STAGES["quantize"]
    data = {name: fields.pop(name, None) for name in DATA}
    data["source"] = None if calibration is None else str(calibration)
    recipe = load_recipe(run.recipe, {}) if run.exists() else None
    said = {"bits": None if bits is None else float(bits), "rounding": rounding, **fields}
    options = options_of(data, recipe, said, str(compute_device(device)))
    config = stage_config(QuantizeConfig, "The call of quantize", options | said)
    if run.exists() and out is None:
        with locked(run.path):
            manifest = extend(run, stage, config, reporter, overwrite=overwrite)
        place = run.path / read_index(run.index).directory(stage.name, stage.directory)
    elif out is None:
        raise InputError(f"{target} is no run, so that the place of the result must be named: pass out.")
    else:
        place = Path(out)
        source = run.finished().path if run.exists() else locate(str(target))
        refuse_unsafe(place, "out", the_checkpoint=source)
        manifest = beside(source, stage, config, place, reporter, overwrite=overwrite)
    return {"model": str(place), "id": manifest.id, **manifest.report}
