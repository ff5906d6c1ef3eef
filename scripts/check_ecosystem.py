r"""Try programs that know nothing of this package on compressed checkpoints, and write the table of docs/serving.md.

Each runs in a process of its own where the package cannot be imported (but where the row says otherwise), on
checkpoints of one model in every form: pairs, pivots, narrower heads and MLPs (modegpt), and a native export.
Programs may also lie in directories of PYTHONPATH. Usage, from the root of the repository::

    python scripts/check_ecosystem.py LLAMA TEXT --write docs/serving.md
    python scripts/check_ecosystem.py DIRECTORY/all-minilm-l6-v2 TEXT --embedding \
        --forms pair,pivot,modegpt --mark ecosystem:minilm --write docs/serving.md
    python scripts/check_ecosystem.py DIRECTORY/qwen2.5-coder-0.5b TEXT --checkpoint RUN/model --forms pivot \
        --mark ecosystem:qwen --write docs/serving.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from ecosystem_rows import EMBEDDING_ROWS, FORMS, NATIVE, OURS, ROWS, TASK
from running import write_between

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 540  # seconds a program
# Python finds this by PYTHONPATH before anything else: as if the package were not installed.
ABSENT = 'import sys\nsys.modules["lowrank_compress"] = None\n'


def run(words: Sequence[str], place: Path, *, installed: bool) -> str:
    """Run a program; return what went wrong, or nothing."""
    paths = [str(ROOT if installed else place / "absent"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", *words]
    try:
        done = subprocess.run(
            command, env=environment, cwd=place, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:200]


def made(form: str, model: Path, text: Path, place: Path, samples: int) -> Path:
    """Compress a model in one form, and return the checkpoint."""
    out = place / form
    options = [*map(str, ("compress", model, "--ratio", "0.2", "--calibration", text, "--out", out)), *FORMS[form]]
    sized = ["--samples", str(samples), "--seq-len", "128"]
    if problem := run(["-m", "lowrank_compress", *options, *sized], place, installed=True):
        raise SystemExit(f"{form} cannot be made: {problem}")
    if form != NATIVE:
        return out / "model"
    exported = place / "native-checkpoint"
    words = ["-m", "lowrank_compress", "export", str(out), "--native", str(exported)]
    if problem := run(words, place, installed=True):
        raise SystemExit(f"{form} cannot be exported: {problem}")
    return exported


def version_of(package: str) -> str:
    """Return the installed version of a package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(
    model: Annotated[Path, typer.Argument(help="A Llama, or a model like it; with --embedding one of embeddings.")],
    text: Annotated[Path, typer.Argument(help="Text to calibrate on.")],
    only: Annotated[str, typer.Option(help="Rows of programs whose names or commands hold one of these words.")] = "",
    embedding: Annotated[bool, typer.Option("--embedding", help="Try what embedding models are for.")] = False,
    forms: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(FORMS),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Of that model, compressed already: try it alone, in a column of the name FORMS."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of 128 tokens to calibrate on.")] = 32,
    mark: Annotated[str, typer.Option(help="Of the table in its file.")] = "ecosystem",
    write: Annotated[Path | None, typer.Option(help="File whose table is replaced.")] = None,
) -> None:
    """Print the table, and exit with 1 if a program that is installed fails."""
    asked = forms.split(",")
    lines = ["| tool | version | command | " + " | ".join(asked) + " |", "|---|---|---|" + "---|" * len(asked)]
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "absent").mkdir()
        (place / "absent" / "sitecustomize.py").write_text(ABSENT, encoding="utf-8")
        (place / "tasks").mkdir()
        documents = [{"query": "Once upon a", "choices": [" time", " frog"], "gold": 0} for _ in range(4)]
        data = place / "tasks" / "check.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
        (place / "tasks" / "check.yaml").write_text(TASK % data, encoding="utf-8")
        if checkpoint is not None:
            checkpoints = dict.fromkeys(asked, checkpoint.resolve())
        else:
            checkpoints = {form: made(form, model.resolve(), text.resolve(), place, samples) for form in asked}
        for form, path in checkpoints.items() if embedding else ():
            if problem := run(["-c", OURS, str(path), str(place / f"{form}.safetensors")], place, installed=True):
                raise SystemExit(f"{form} cannot be loaded: {problem}")
        rows = EMBEDDING_ROWS if embedding else ROWS
        for row in (row for row in rows if any(word in f"{row.package} {row.shown}" for word in only.split(","))):
            cells = []
            for form in asked:
                if row.stock and form != NATIVE:
                    cells.append("–")
                    continue
                if not version_of(row.package):
                    cells.append("not installed")
                    continue
                places = {"model": checkpoints[form], "tasks": place / "tasks", "ours": place / f"{form}.safetensors"}
                words = list(row.words)
                for name, path in places.items():
                    words = [word.replace(f"{{{name}}}", str(path)) for word in words]
                problem = run(words, place, installed=row.installed)
                cells.append("works" if not problem else "**fails**")
                if problem:
                    problems.append(f"{row.shown}, {form}: {problem}")
                typer.echo(f"{row.package} {form}: {problem or 'works'}", err=True)
            lines.append(f"| {row.package} | {version_of(row.package)} | {row.shown} | " + " | ".join(cells) + " |")
            if write is not None:
                # After each row, so that what was tried is kept if the rest takes too long.
                write_between(write, mark, "\n".join(lines))
    typer.echo("\n".join(lines))
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
