"""Write lm-eval tasks for multiple-choice questions in local files, so that `lrc eval --tasks` runs without a network.

Each ``NAME.jsonl`` with lines of ``{"query": …, "choices": […], "gold": …}`` becomes the task ``NAME_local``
(`openbook_qa` is called ``openbookqa_local``, as its built-in task). Usage, from the root of the repository::

    python scripts/local_tasks.py runs/tasks
    lrc eval RUN --tasks arc_easy_local,openbookqa_local --include-path runs/tasks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml
from running import ASSETS

FIELDS = {"query", "choices", "gold"}
# The form in which each data set's built-in task asks; {{query}} alone where it is not one of these.
PROMPTS = {"arc_easy": "{{query}}\nAnswer:"}
NAMES = {"openbook_qa": "openbookqa_local"}


def task_name(path: Path) -> str:
    """Name of the task made of a file."""
    return NAMES.get(path.stem, f"{path.stem}_local")


def task(path: Path) -> dict[str, object]:
    """The lm-eval configuration for one file.

    Raises
    ------
    ValueError
        The first line has other fields.
    """
    with path.open(encoding="utf-8") as file:
        found = set(json.loads(file.readline()))
    if found != FIELDS:
        raise ValueError(f"{path} has the fields {sorted(found)}; expected {sorted(FIELDS)}")
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": task_name(path),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": PROMPTS.get(path.stem, "{{query}}"),
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def main(
    directory: Annotated[Path, typer.Argument(help="Where the YAML files go; give it to --include-path.")],
    data: Annotated[Path, typer.Option(help="Directory of the .jsonl files.")] = ASSETS / "tasks",
) -> None:
    """Write a YAML file a task."""
    files = sorted(data.glob("*.jsonl"))
    if not files:
        typer.echo(f"{data} holds no .jsonl file; expected questions to make tasks of.", err=True)
        raise typer.Exit(2)
    directory.mkdir(parents=True, exist_ok=True)
    for path in files:
        made = directory / f"{task_name(path)}.yaml"
        made.write_text(yaml.safe_dump(task(path), sort_keys=False, allow_unicode=True), encoding="utf-8")
        typer.echo(task_name(path))


if __name__ == "__main__":
    typer.run(main)
