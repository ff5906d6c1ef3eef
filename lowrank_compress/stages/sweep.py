"""A grid of runs over one model: statistics and decompositions are computed once for all that can share them.

Each combination is an ordinary run of its own in ``OUT/runs/NAME``, with the bytes that `lrc compress` gives. Those
whose calibration has one key share its statistics, which are kept in ``OUT/statistics`` until all of them are scored;
those whose bases have one identity share these too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lowrank_compress.artifacts.directories import link, remove_listed
from lowrank_compress.artifacts.documents import read_json, read_sealed, write_sealed
from lowrank_compress.artifacts.lock import locked
from lowrank_compress.artifacts.manifest import Key, commit, committed, listed, read_manifest
from lowrank_compress.config import EvaluateConfig
from lowrank_compress.errors import ArtifactError, InputError, LrcError
from lowrank_compress.resources.cost import Meter
from lowrank_compress.resources.workers import Workers, workers_of
from lowrank_compress.stages import calibrate, evaluate, pipeline, score
from lowrank_compress.stages.contamination import refuse_calibration_text
from lowrank_compress.stages.cost import keep_cost
from lowrank_compress.stages.decompose import Bases
from lowrank_compress.stages.environment import compute_device
from lowrank_compress.stages.inputs import inputs_of_score
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.presenting import report_of
from lowrank_compress.stages.reach import check_ratio
from lowrank_compress.stages.report import REPORT
from lowrank_compress.stages.reporting import Reporter, Silent
from lowrank_compress.stages.run import Run
from lowrank_compress.stages.sweepconfig import Point, SweepConfig, make_sweep, read_sweep
from lowrank_compress.texts import Place

SWEEP = "sweep.json"
log = logging.getLogger(__name__)


class Told:
    """Hands on warnings, with the name of what they are about, and no progress: that of the sweep is enough."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        self._name, self._reporter = name, reporter

    def advance(self, step: str, done: int, total: int) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Hand on."""
        self._reporter.warn(f"{self._name}: {text}")


@dataclass(frozen=True)
class Job:
    """A combination that can be made: its plan, its run, and the key of the calibration that it needs."""

    point: Point
    plan: Plan
    run: Run
    calibration: Key


def sweep(
    config: Place | Mapping[str, Any],
    out: Place,
    *,
    overwrite: bool = False,
    keep_statistics: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Make a grid of runs, as ``lrc sweep`` does; what is finished already is not made again.

    A combination that fails is listed, and the others go on.

    Parameters
    ----------
    config
        A file, or what stands in one; see `sweepconfig.SweepConfig`.
    out
        Directory for all runs.
    overwrite
        Replace runs of other recipes of the same names.
    keep_statistics
        Keep shared statistics, for ratios that are added later.
    reporter
        Told about progress and warnings.

    Returns
    -------
    dict
        ``rows``, one a combination, in the order of the grid: ``name``, ``label`` (its row of the grid), ``state``,
        ``run``, ratios and sizes, ``measured``; or ``problem``, where it failed.

    Raises
    ------
    LrcError
        The file is no sweep, or the directory holds something else.
    """
    where = "The call of sweep" if isinstance(config, Mapping) else f"The sweep {config}"
    asked = make_sweep(config, where) if isinstance(config, Mapping) else read_sweep(Path(config))
    place, reporter = Path(out), reporter or Silent()
    points = asked.points(where)
    device = str(compute_device(points[0].recipe.device))
    measured = asked.evaluation(where, device)
    _refuse_foreign(place)
    with workers_of() as workers:
        workers.once(lambda: _begin(place, asked))
        found = _all(points, place, measured, reporter, workers, overwrite, keep_statistics)
        rows = _gathered(points, found, workers)
        result = {"sweep": str(place), "model": asked.model, "rows": rows}
        workers.once(lambda: write_sealed(place / SWEEP, {"config": asked.model_dump(mode="json"), "rows": rows}))
    return result


def _refuse_foreign(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise InputError(f"--out {place} is a file; expected a directory, existing or not.")
    if not place.is_dir() or not any(place.iterdir()):
        return
    try:
        read_sealed(place / SWEEP)
    except (ArtifactError, OSError):
        raise ArtifactError(
            f"{place} is not empty and holds no sweep of this program ({SWEEP}). Choose another directory with --out."
        ) from None


def _begin(place: Path, config: SweepConfig) -> None:
    place.mkdir(parents=True, exist_ok=True)
    rows = read_json(place / SWEEP).get("rows", []) if (place / SWEEP).exists() else []
    write_sealed(place / SWEEP, {"config": config.model_dump(mode="json"), "rows": rows})


def _gathered(points: Sequence[Point], found: Mapping[str, dict[str, Any]], workers: Workers) -> list[dict[str, Any]]:
    """Put the rows of all processes together, in the order of the grid."""
    parts: list[Any] = [found]
    if workers.count > 1:
        parts = [None] * workers.count
        dist.all_gather_object(parts, found)
    rows = {name: row for part in parts for name, row in part.items()}
    return [rows[point.name] for point in points]


def _all(
    points: Sequence[Point],
    place: Path,
    measured: EvaluateConfig | None,
    reporter: Reporter,
    workers: Workers,
    overwrite: bool,
    keep_statistics: bool,
) -> dict[str, dict[str, Any]]:
    """Make this process's share of the combinations, those that share statistics together; rows by name."""
    rows: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[Job]] = {}
    for point in points:
        try:
            plan, run = make_plan(point.recipe), Run(place / "runs" / point.name)
            check_ratio(plan.score, plan.subject)
            key = inputs_of_score(plan, run).calibration
            groups.setdefault(key.id, []).append(Job(point, plan, run, key))
        except Exception as problem:  # none stops the others
            if workers.is_first:  # all find the same
                rows[point.name] = _failed(point, place, problem)
    own, known, done = workers.share(list(groups.values())), dict[str, Any](), 0
    for jobs in own:
        shared = place / "statistics" / jobs[0].calibration.id[:16]
        for job in jobs:
            told = Meter(Told(job.point.name, reporter))
            try:
                with locked(job.run.path):
                    _make(job, jobs, shared, told, overwrite)
                    keep_cost(job.run, "compress", told.cost())
                    found = {} if measured is None else _measure(job.run, measured, told, known)
                rows[job.point.name] = _finished(job, found)
            except Exception as problem:
                rows[job.point.name] = _failed(job.point, place, problem)
            done += 1
            reporter.advance("sweep", done, sum(map(len, own)))
        if not keep_statistics:
            _drop(shared)
    return rows


def _make(job: Job, jobs: Iterable[Job], shared: Path, reporter: Reporter, overwrite: bool) -> None:
    """Make one run, with what others have computed already."""
    plan, run = job.plan, job.run
    for note in plan.notes:
        reporter.warn(note)
    pipeline.claim(run, plan, overwrite=overwrite)
    inputs = inputs_of_score(plan, run)
    identity = score.key(plan.score, inputs)
    if score.committed_scores(run.scores, identity, overwrite=overwrite) is None:
        bases = Bases(plan.chooser, job.calibration.id, run.scores)
        _borrow(bases, jobs, job)
        if not all(bases.finished(block) for block in plan.subject.scopes):
            calibrate.run(plan.calibrate, calibrate.Inputs(plan.subject), shared, reporter, overwrite=True)
        _note_calibration(job, jobs, shared, reporter, overwrite)
        score.run(
            plan.score, replace(inputs, statistics=shared), run.scores, reporter, bases=bases, overwrite=overwrite
        )
    pipeline.finish(plan, run, reporter, statistics=shared, overwrite=overwrite)


def _borrow(bases: Bases, jobs: Iterable[Job], job: Job) -> None:
    """Give the files of bases that another run has, if they are the very same, a second name in this one."""
    wanted = bases.names(job.plan.subject.scopes)
    for other in jobs:
        for name in wanted if other is not job else ():
            there, here = other.run.scores / name, job.run.scores / name
            if there.is_file() and not there.is_symlink() and not here.exists():
                here.parent.mkdir(parents=True, exist_ok=True)
                link(there, here)


def _note_calibration(job: Job, jobs: Iterable[Job], shared: Path, reporter: Reporter, overwrite: bool) -> None:
    """Leave in a run what `lrc compress` leaves of its calibration: a manifest that says that it is not kept."""
    if committed(job.run.statistics, job.calibration, overwrite=overwrite) is not None:
        return
    places = [shared, *(other.run.statistics for other in jobs if other is not job)]
    there = (read_manifest(place) for place in places)
    made = next((found for found in there if found is not None and found.key == job.calibration), None)
    if made is None:
        made = calibrate.run(job.plan.calibrate, calibrate.Inputs(job.plan.subject), shared, reporter, overwrite=True)
    commit(job.run.statistics, made.key, [], {**made.report, "kept": False}, made.environment)


def _measure(
    run: Run, config: EvaluateConfig, reporter: Reporter, known: MutableMapping[str, Any]
) -> Mapping[str, Any]:
    """Evaluate a run and, once for all runs, the dense original."""
    refuse_calibration_text(run.path, config)
    inputs, out_dir = pipeline.evaluation_inputs(str(run.path), config.trust_remote_code)
    return evaluate.run(config, inputs, out_dir, reporter, known=known).report


def _finished(job: Job, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a run that is made."""
    final = job.run.finished(names=(REPORT,))
    report = report_of(final)
    facts = ("asked_ratio", "reached_ratio", "ratio_of", "claimed_bytes", "stored_bytes", "reached_ratio_bytes")
    return {
        **_named(job.point),
        "state": "finished",
        "run": str(job.run.path),
        "id": final.manifest.id,
        **{name: report[name] for name in facts if name in report},
        "measured": dict(measured),
    }


def _named(point: Point) -> dict[str, Any]:
    recipe = point.recipe
    return {
        "name": point.name,
        "label": point.label,
        "method": recipe.method,
        "ratio": recipe.ratio,
        "seed": recipe.seed,
        "calibration": recipe.model_dump(mode="json")["calibration"],
    }


def _failed(point: Point, place: Path, problem: BaseException) -> dict[str, Any]:
    text = str(problem) if isinstance(problem, LrcError) else f"{type(problem).__name__}: {problem}"
    log.info("%s failed", point.name, exc_info=problem)
    return {
        **_named(point),
        "state": "failed",
        "run": str(place / "runs" / point.name),
        "problem": " ".join(text.split()),
    }


def _drop(shared: Path) -> None:
    """Remove shared statistics, and the directories that held nothing else."""
    if shared.is_dir():
        remove_listed(shared, listed(shared))
    if shared.parent.is_dir() and not any(shared.parent.iterdir()):
        shared.parent.rmdir()
