"""`lrc sweep`: its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_compress.cli.terminal import console, number, print_json, table
from lowrank_compress.errors import ArtifactError, InputError
from lowrank_compress.stages.reporting import Reporter


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print the result of a sweep: one row a combination, or with a single measure a row a method.

    Raises
    ------
    ArtifactError
        Combinations failed; after the table.
    """
    rows, failed = found["rows"], [row for row in found["rows"] if row["state"] == "failed"]
    if as_json:
        print_json(found)
    else:
        measures = _measures(rows)
        dense = ["dense", "", "", "", *(number(_dense(rows, *measure)) for measure in measures)]
        body = [dense] if measures else []
        for row in rows:
            if row["state"] == "failed":
                body.append([row["name"], "failed", "", "", *("–" for _ in measures)])
                continue
            body.append(
                [
                    row["name"],
                    f"{row['asked_ratio']:.0%}",
                    f"{row['reached_ratio']:.2%}",
                    f"{row['reached_ratio_bytes']:.2%}" if "reached_ratio_bytes" in row else "–",
                    *(number(_value(row, "compressed", *measure)) for measure in measures),
                ]
            )
        columns = [
            "run",
            "asked",
            "reached",
            "of bytes",
            *(f"{title} · {Path(name).name}" for _, name, title in measures),
        ]
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


def page_of(found: dict[str, Any], place: Path, reporter: Reporter) -> str | None:
    """Write the page about all runs that are finished; None where there is none, or its libraries are missing."""
    from lowrank_compress.pages.page import report

    runs = [row["run"] for row in found["rows"] if row["state"] == "finished"]
    try:
        return str(report(runs, place / "report.html", overwrite=True, reporter=reporter)) if runs else None
    except InputError as problem:
        reporter.warn(f"There is no report: {problem}")
        return None


def _measures(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name what was measured: kind, name of the text, table or task, and what it is called."""
    found: dict[tuple[str, str, str], None] = {}
    for row in rows:
        measured = row.get("measured", {})
        for kind, title in (("perplexity", "perplexity"), ("classification", "accuracy")):
            found |= {(kind, name, title): None for name in measured.get(kind, {})}
        for name, values in measured.get("tasks", {}).items():
            metrics = [metric for metric in values.get("compressed", {}) if "stderr" not in metric]
            found |= {("tasks", name, metric): None for metric in metrics}
    return list(found)


def _value(row: dict[str, Any], role: str, kind: str, name: str, title: str) -> float | None:
    value = row.get("measured", {}).get(kind, {}).get(name, {}).get(role)
    return value.get(title) if isinstance(value, dict) else value


def _dense(rows: list[dict[str, Any]], kind: str, name: str, title: str) -> float | None:
    return next((found for row in rows if (found := _value(row, "dense", kind, name, title)) is not None), None)
