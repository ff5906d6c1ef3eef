"""Whether a run would be measured on the very text that it was calibrated on."""

from __future__ import annotations

from pathlib import Path

from lowrank_compress.artifacts.files import sha256
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import CalibrationError
from lowrank_compress.recipe import load_recipe
from lowrank_compress.stages.run import Run
from lowrank_compress.texts import SELF


def refuse_calibration_text(target: Path, config: EvaluateConfig) -> None:
    """Refuse to measure a run, or the checkpoint inside one, on a text of its calibration, under whatever name.

    Raises
    ------
    CalibrationError
        A text is the same, by name or by content.
    """
    for run in (Run(target), Run(target.parent)):
        if not (run.exists() and run.index.exists()):
            continue
        recipe, calibrated = load_recipe(run.recipe, {}), read_manifest(run.statistics)
        read = recipe.calibration if calibrated is not None and calibrated.report["tokens"] else None
        texts = [read] if isinstance(read, str) else [part.text for part in read or ()]
        used = [text for text in texts if text != SELF]
        for name in (*config.perplexity, *([config.classification] if config.classification else []), *config.sts):
            if any(text == name or _same_content(Path(text), Path(name)) for text in used):
                raise CalibrationError(
                    f"{name} is the text that this run was calibrated on: measured on it, the compressed model looks "
                    "better than it is. Evaluate on another text, or pass --force."
                )


def _same_content(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and sha256(one) == sha256(other)
