"""What a run has come to, for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowrank_compress.artifacts.documents import read_json
from lowrank_compress.artifacts.manifest import altered, read_manifest
from lowrank_compress.errors import ArtifactError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages.card import model_card
from lowrank_compress.stages.evaluate import merged
from lowrank_compress.stages.identity import checkpoint_id
from lowrank_compress.stages.report import REPORT
from lowrank_compress.stages.run import Finished, Run


def card_of(path: Path) -> str:
    """Make the model card of a run's final checkpoint, with what was measured of it.

    Raises
    ------
    ArtifactError
        It is no finished run.
    """
    run = Run(path)
    run.require()
    final = run.finished(names=(REPORT,))
    return model_card(report_of(final), evaluations_of(run, final))


def report_of(final: Finished) -> dict[str, Any]:
    """Read lowrank.json of a final checkpoint.

    Raises
    ------
    ArtifactError
        It has none.
    """
    if not (final.path / REPORT).is_file():
        raise ArtifactError(f"{final.path} has no {REPORT}. Repeat `lrc factorize` on this run.")
    return read_json(final.path / REPORT)


def evaluations_of(run: Run, final: Finished) -> dict[str, Any]:
    """Gather what was measured of the final checkpoint itself, not of one before it."""
    found, id = merged(run.evaluations), checkpoint_id(Checkpoint(final.path))
    kept = {name: each for name, each in found["evaluations"].items() if each["inputs"].get("checkpoint") == id}
    return {**found, "evaluations": kept}


def spectra_of(run: Run) -> dict[str, list[float]]:
    """Squared singular values in the method's metric, by matrix; of bases that are as they were written."""
    spectra: dict[str, list[float]] = {}
    manifest = read_manifest(run.scores)
    prefix = "" if manifest is None else f"{manifest.report['bases_prefix']}-"
    names = [] if manifest is None else [name for name in manifest.outputs if name.startswith(prefix)]
    changed = [] if manifest is None else altered(run.scores, manifest, names=names)
    for file in sorted(set(names) - set(changed)):
        with safe_open(run.scores / file, framework="np") as handle:
            for name in sorted(handle.keys()):
                if name.endswith("/values"):
                    spectra[name.removesuffix("/values")] = handle.get_tensor(name).tolist()
    return spectra
