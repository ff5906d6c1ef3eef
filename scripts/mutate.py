"""Try thousands of mutated checkpoints, runs, texts, options and outputs; compare what succeeds with the truth.

Every case happens in a forked process and a directory of its own, and can be repeated from its seed and name:

    python scripts/mutate.py --count 5000
    python scripts/mutate.py --only checkpoints:17

What must never happen: a traceback, a file with a crash, more than 20 seconds, an answer that is not transformers' own,
a lost file that was not ours, a temporary file left behind. Ends with exit code 1 if it did.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets  # noqa: F401  (before forking, so that no case pays for it)
import peft  # noqa: F401
import torch
import typer
from mutations import checkpoints, options, outputs, runs, texts
from mutations.place import HELDOUT, NOT_DENSE, RUNS, TABLE, TEXT, Mutation, Place, lrc
from mutations.trial import BAD, GOOD, SECONDS, SLOT, Result, attempt
from mutations.truth import logits
from rich.console import Console
from rich.table import Table

from tests.moe import save_moe
from tests.tiny import save_tiny, tiny_text

TABLES: dict[str, dict[str, Mutation]] = {
    "checkpoints": checkpoints.MUTATIONS,
    "runs": runs.MUTATIONS,
    "texts": texts.MUTATIONS,
    "options": options.MUTATIONS,
    "outputs": outputs.MUTATIONS,
}


def make_template(slot: Path) -> None:
    """Make pristine checkpoints, texts and runs, in a process of their own: nothing of them may be remembered here.

    Runs name what they were made from by its whole path: they are made in the directory where the cases will happen.
    """
    directory = slot / "work"
    directory.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ["XDG_CACHE_HOME"] = str(slot / "first-cache")
            os.chdir(directory)
            save_tiny("llama", "model")
            save_tiny("llama", "half", dtype=torch.bfloat16)
            save_tiny("llama", "tied", tie_word_embeddings=True)
            save_tiny("llama", "no-bos", bos=False)
            save_tiny("llama", "sharded", max_shard_size="30KB")
            save_tiny("gpt2", "gpt2")
            save_moe("mixtral", Path("mixture"), num_local_experts=3)
            save_tiny("bert", "bert", "classification")
            save_tiny("llama", "classifier", "classification")
            Path(TEXT).write_text(tiny_text(3000))
            Path(HELDOUT).write_text(tiny_text(400, seed=1))
            rows = [f'"{" ".join(tiny_text(60, seed=seed).split())}",{seed % 3}' for seed in range(12)]
            Path(TABLE).write_text("\n".join(["text,label", *rows, ""]))
            place = Place(directory, directory, directory, Random(0))
            for run in RUNS:
                said = lrc(*place.again(run, run))
                if said.code:
                    raise RuntimeError(said.err) from said.problem
                for name, words in (("metrics", place.eval(run)), ("show", ("show", run, "--json"))):
                    said = lrc(*words)
                    Path(f"{run}.{name}.json").write_text(said.out)
                if said.code == 0 and run not in NOT_DENSE:
                    said = lrc("export", run, "--dense", f"{run}.dense")
                said = lrc("verify", run, "--write", f"{run}.expected.json") if said.code == 0 else said
                if said.code:
                    raise RuntimeError(said.err) from said.problem
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("The pristine checkpoints could not be made.")
    directory.rename(slot / "template")


def cases(kinds: Sequence[str], count: int) -> Iterator[str]:
    """Name `count` cases, spread over the kinds."""
    for number in range(count):
        yield f"{kinds[number % len(kinds)]}:{number // len(kinds)}"


def mutation_of(case: str) -> tuple[str, Mutation]:
    """Which mutation a case tries: its name, and itself."""
    kind, _, number = case.partition(":")
    return list(TABLES[kind].items())[int(number) % len(TABLES[kind])]


def forked(case: str, seed: int, slot: Path) -> tuple[int, int]:
    """Start a case in a process of its own; its id, and the pipe that its result will come through."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    try:
        with open(slot / "noise.log", "ab") as noise:
            os.dup2(noise.fileno(), 1)
            os.dup2(noise.fileno(), 2)
        faulthandler.enable()
        resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
        os.fsync = lambda descriptor: None  # it is not the disk that is tried here
        result = attempt(case, *mutation_of(case), seed, slot)
        os.write(writer, json.dumps(asdict(result)).encode("utf-8", "surrogatepass"))
    finally:
        os._exit(0)


def warm(directory: Path) -> None:
    """Do once, elsewhere, what every command does first (imports, tables of the libraries), so that no case does."""
    directory.mkdir(parents=True)
    with chdir(directory):
        save_tiny("llama", "warm")
        Path(TEXT).write_text(tiny_text(1000))
        place = Place(directory, directory, directory, Random(0))
        for words in (
            place.compress("warm", "auto", "warm-run"),
            place.eval("warm-run", TEXT, "--force"),
            ("export", "warm-run", "--dense", "warm-dense"),
            ("show", "warm-run"),
            ("verify", "warm-run"),
            ("eval", "warm", "--tasks", "none"),  # imports lm-eval
        ):
            lrc(*words)
        logits("warm-dense")
    gc.collect()
    gc.freeze()  # what is here is shared with the forked processes; a collection would copy it


@contextmanager
def chdir(directory: Path) -> Iterator[None]:
    """Work in a directory."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def all_results(names: Sequence[str], seed: int, root: Path, workers: int, keep: bool) -> Iterator[Result]:
    """Try cases, a few at a time, each in a slot of its own that is emptied after it."""
    warm(root / "warm")
    free = [root / f"slot-{number}" for number in range(workers)]
    for slot in free:
        make_template(slot)
    waiting = list(reversed(names))
    running: dict[int, tuple[int, str, Path, float, bytearray]] = {}
    while waiting or running:
        while waiting and free:
            slot, case = free.pop(), waiting.pop()
            pid, pipe = forked(case, seed, slot)
            running[pipe] = (pid, case, slot, time.monotonic(), bytearray())
        for pipe in select.select(list(running), [], [], 1)[0]:
            pid, case, slot, _, data = running[pipe]
            part = os.read(pipe, 1 << 20)
            data += part
            if not part:
                os.close(pipe)
                del running[pipe]
                status = os.waitpid(pid, 0)[1]
                for name in SLOT:
                    if keep and (slot / name).exists():
                        (slot / f"{case.replace(':', '-')}").mkdir(exist_ok=True)
                        (slot / name).rename(slot / f"{case.replace(':', '-')}" / name)
                    shutil.rmtree(slot / name, ignore_errors=True)
                free.append(slot)
                yield (
                    Result(**json.loads(data))
                    if data
                    else Result(case, mutation_of(case)[0], "died", f"status {status}")
                )
        for pid, _, _, started, _ in running.values():
            if time.monotonic() - started > 20 * SECONDS:
                os.kill(pid, signal.SIGKILL)


def tally(results: Sequence[Result], console: Console) -> None:
    """Print how often what happened, by kind of mutation."""
    seen = [outcome for outcome in (*GOOD, *BAD) if any(result.outcome == outcome for result in results)]
    rows: dict[str, Counter[str]] = {}
    for result in results:
        name = f"{result.case.partition(':')[0]} · {result.mutation.replace(' again', '')}"
        rows.setdefault(name, Counter())[result.outcome] += 1
    table = Table(title=f"{len(results)} mutations")
    for name in ("mutation", *seen):
        table.add_column(name, justify="left" if name == "mutation" else "right")
    for name, counts in sorted(rows.items()):
        table.add_row(name, *(str(counts[outcome] or "") for outcome in seen))
    table.add_section()
    table.add_row("together", *(str(sum(counts[outcome] for counts in rows.values())) for outcome in seen))
    console.print(table)


def main(
    count: Annotated[int, typer.Option(help="How many cases.")] = 500,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(TABLES)}.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these cases, such as checkpoints:17; all is told of them.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results there.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the directories of the cases.")] = False,
) -> None:
    """Try mutations, and print a tally by kind."""
    console = Console(width=200, highlight=False, markup=False)
    root = Path(tempfile.mkdtemp(prefix="mutate-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        names = list(only or cases(kind or list(TABLES), count))
        results = run(names, seed, root, workers, keep, console, loud=bool(only))
        tally(results, console)
        if json_path is not None:
            json_path.write_text(
                json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8", errors="surrogatepass"
            )
    finally:
        if keep:
            console.print(f"All is in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    if any(result.outcome in BAD for result in results):
        raise typer.Exit(1)


def run(
    names: Sequence[str], seed: int, root: Path, workers: int, keep: bool, console: Console, loud: bool
) -> list[Result]:
    """Make the template, try the cases, and tell of what is bad as it comes."""
    results = []
    found = all_results(names, seed, root, workers, keep)
    while (result := _next(found)) is not None:
        results.append(result)
        if result.outcome in BAD or loud:
            told = f"{result.case} ({result.mutation}): {result.outcome}: {result.note[:400]}"
            console.print(printable(told + "".join(f"\n    {words[:200]}" for words in result.commands)))
        if loud:
            console.print(printable("\n".join(result.said)))
    return results


def _next(found: Iterator[Result]) -> Result | None:
    """The next result; None after the last, or where the user has had enough."""
    try:
        return next(found, None)
    except KeyboardInterrupt:
        return None


def printable(text: str) -> str:
    """Replace what cannot be printed."""
    return text.encode("utf-8", "replace").decode()


if __name__ == "__main__":
    typer.run(main)
