"""`lrc sweep`: its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_compress.cli.terminal import console, number, print_json, table
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.stages.card import measurements
from lowrank_compress.stages.reporting import Reporter


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print the result of a sweep, one row a combination.

    Raises
    ------
    ArtifactError
        Combinations failed; after the table.
    """
    rows, failed = found["rows"], [row for row in found["rows"] if row["state"] == "failed"]
    if as_json:
        print_json(found)
    else:
        values = [_values(row) for row in rows]
        measures = list(dict.fromkeys(measure for each in values for measure in each))
        dense = [next((each[m].get("dense") for each in values if m in each), None) for m in measures]
        body = [["dense", "", "", "", *map(number, dense)]] if measures else []
        for row, own in zip(rows, values, strict=True):
            if row["state"] == "failed":
                body.append([row["name"], "failed", "", "", *("–" for _ in measures)])
                continue
            body.append(
                [
                    row["name"],
                    f"{100 * row['asked_ratio']:.4g}%",
                    f"{row['reached_ratio']:.2%}",
                    f"{row['reached_ratio_bytes']:.2%}" if "reached_ratio_bytes" in row else "–",
                    *(number(own.get(measure, {}).get("compressed")) for measure in measures),
                ]
            )
        columns = ["run", "asked", "reached", "of bytes", *(f"{metric} · {name}" for metric, name, _ in measures)]
        console().print(table(f"{found['sweep']}: {len(rows)} runs", columns, body))
        if found.get("report"):
            console().print(f"Report: {found['report']}", soft_wrap=True)
        for row in failed:
            console().print(f"{row['name']}: {row['problem']}", soft_wrap=True)
    if failed:
        raise ArtifactError(
            f"{len(failed)} of {len(rows)} runs failed ({', '.join(row['name'] for row in failed[:4])}); the others "
            f"are finished. Mend what is said of them and give the same command again. First: {failed[0]['problem']}"
        )


def _values(row: Mapping[str, Any]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Look up what was measured of a run: metric, name, amount -> values."""
    measured = row.get("measured")
    found = measurements({"evaluations": {"": measured}}) if measured else ()
    return {(each["metric"], each["name"], each["amount"]): each for each in found}


def page_of(found: dict[str, Any], place: Path, reporter: Reporter) -> str | None:
    """Write the page about all runs that are finished; None where there is none, or its libraries are missing."""
    from lowrank_compress.pages.page import report

    runs = [row["run"] for row in found["rows"] if row["state"] == "finished"]
    try:
        return str(report(runs, place / "report.html", overwrite=True, reporter=reporter)) if runs else None
    except InputError as problem:
        reporter.warn(f"There is no report: {problem}")
        return None
