"""`lrc compress --check` and `lrc verify --write`: make a run again, compare, and say what differs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_compress.artifacts.files import read_bytes, write_text
from lowrank_compress.cli.comparing import as_lines, as_markdown, headline
from lowrank_compress.cli.saying import hint, is_first
from lowrank_compress.cli.terminal import TerminalReporter, console, print_json
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.workers import started
from lowrank_compress.stages.changes import environment_changes, require_recipe
from lowrank_compress.stages.comparison import Comparison, compare
from lowrank_compress.stages.description import expect
from lowrank_compress.stages.differences import Reference
from lowrank_compress.stages.environment import environment
from lowrank_compress.stages.expectation import Expectation, is_expectation, read_expectation, write_expectation
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run

# The first bytes of a report, by which it is known as one that may be replaced.
_MARKDOWN, _JSON = "<!-- lrc check -->", '{\n  "kind": "lrc check"'


def refuse_options(check: Path | None, *, dry_run: bool, overwrite: bool, other: tuple[object, ...]) -> None:
    """Refuse options that have no meaning with, or without, ``--check``.

    Raises
    ------
    InputError
        There are such.
    """
    if check is None and any(option is not None for option in other):
        raise InputError("--tolerance, --against and --report are about --check EXPECTED.json; pass that too.")
    if check is not None and (dry_run or overwrite):
        name = "--dry-run" if dry_run else "--overwrite"
        raise InputError(f"--check makes the run anew and replaces nothing; leave {name} out.")


def write(run: Path, path: Path, overwrite: bool) -> None:
    """Write the expectation of a run.

    Raises
    ------
    InputError
        It would be in the way of the run's own files.
    """
    real = path.resolve()
    inside = real.relative_to(run.resolve()) if real.is_relative_to(run.resolve()) else None
    if inside is not None and (len(inside.parts) > 1 or (path.exists() and not is_expectation(path))):
        raise InputError(f"--write {path} is among the files of the run itself. Choose another place.")
    write_expectation(path, expect(run, path.parent), overwrite=overwrite)
    hint(f"Expectation: {path}")


def check(
    recipe: Recipe,
    expected: Path,
    out: Path | None,
    *,
    tolerance: float | None,
    against: Path | None,
    report: Path | None,
    compress: Callable[[Path], object],
    reporter: TerminalReporter,
) -> Comparison:
    """Make a run again and compare it.

    Parameters
    ----------
    recipe
        What to make.
    expected
        EXPECTED.json.
    out
        Where to make it; a run that is there already is left alone, and counts for nothing.
    tolerance
        See `stages.comparison.compare`.
    against
        The expected run or checkpoint; by default the one that the expectation names, if it is there.
    report
        A file to write the result to, .json or else Markdown.
    compress
        Makes the run in a directory.
    reporter
        Told about progress and warnings.

    Raises
    ------
    LrcError
        The expectation cannot be read or is of another recipe, or the run cannot be made.
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"--tolerance {tolerance} is not between 0 and 1; expected a distance like 1e-4.")
    expectation = read_expectation(expected)
    reference = _reference(expectation, expected, against)
    if report is not None:
        _refuse_foreign(report)
    plan = make_plan(recipe)
    require_recipe(expectation, plan.resolved())
    now = environment(plan.device)
    if changes := environment_changes(expectation.model.environment, now | {"processes": started()}):
        told = "; ".join(f"{change.what} {change.expected} → {change.found}" for change in changes)
        reporter.warn(
            f"The environment differs from that of {expected}, so other last bits are to be expected: {told}."
        )
    with _place(out, reporter) as place:
        compress(place)
        found = compare(expectation, place, plan.resolved(), plan.checkpoint, tolerance=tolerance, reference=reference)
    if report is not None:
        text = as_markdown(found, expected.name) if report.suffix != ".json" else _dumped(found)
        write_text(report, f"{_MARKDOWN}\n{text}" if report.suffix != ".json" else text)
    return found


def _reference(expectation: Expectation, expected: Path, against: Path | None) -> Reference:
    if against is not None:
        usable = Reference.at(against).usable(expectation)
        if not usable.directories:
            raise InputError(
                f"--against {against} does not hold what {expected} expects. Pass the run that it was written of, or "
                "its model/ directory."
            )
        return usable
    there = None if expectation.checkpoint is None else expected.parent / expectation.checkpoint
    return Reference({}) if there is None or not there.is_dir() else Reference.at(there).usable(expectation)


def _refuse_foreign(report: Path) -> None:
    """Refuse to write a report over something that is none."""
    if not report.exists() and not report.is_symlink():
        return
    if not report.is_file() or not read_bytes(report).startswith((_MARKDOWN.encode(), _JSON.encode())):
        raise InputError(f"--report {report} exists and is no report of a check. Choose another name.")


@contextmanager
def _place(out: Path | None, reporter: TerminalReporter) -> Iterator[Path]:
    """Yield a directory in which nothing is yet, so that all is made again."""
    together = started() > 1
    if out is not None and ((together and not is_first()) or not Run(out).exists()):
        yield out
        return
    if together:
        raise InputError("A check by several processes needs a directory they share: pass a new one with --out.")
    if out is not None:
        reporter.warn(
            f"{out} holds a run already: it is left as it is, and all is made again in a temporary directory."
        )
    with tempfile.TemporaryDirectory(prefix="lrc-check-") as temporary:
        yield Path(temporary) / "run"


def show(found: Comparison, expected: Path, as_json: bool) -> None:
    """Print what a comparison found.

    Raises
    ------
    ArtifactError
        It differs.
    """
    if as_json:
        print_json(found.report())
    else:
        for line in as_lines(found):
            console().print(line, soft_wrap=True)
    if found.exit_code == 2:
        raise ArtifactError(headline(found, expected.name))


def _dumped(found: Comparison) -> str:
    return json.dumps({"kind": "lrc check", **found.report()}, indent=2, ensure_ascii=False) + "\n"
