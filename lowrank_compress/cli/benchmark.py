"""`lrc bench`: resolve its targets, measure, and print tables and bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import filesize

from lowrank_compress.cli.terminal import TerminalReporter, console, number, print_json, table
from lowrank_compress.config import DTYPES
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation.contestant import PHASES, Settings
from lowrank_compress.evaluation.speed import benchmark
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.locate import locate
from lowrank_compress.model.tasks import task_of
from lowrank_compress.registry import unknown
from lowrank_compress.stages.environment import compute_device, environment
from lowrank_compress.stages.identity import display_name
from lowrank_compress.stages.run import Run

ATTENTIONS = ("sdpa", "eager")
NEW_TOKENS = 32
MOST = 1 << 20  # sequences, or tokens of one; no machine that this could be measured on holds more
PARTS = " ▏▎▍▌▋▊▉█"
WIDTH = 40


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas.

    Raises
    ------
    InputError
        It is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 9 and 0 < int(word) <= MOST for word in words):
        raise InputError(f"{option} {text!r} is no list of whole numbers from 1 to {MOST}; expected, for example, 1,8.")
    return tuple(dict.fromkeys(map(int, words)))


def measure(
    targets: Sequence[str],
    against: str | None,
    *,
    batch_size: str,
    prompt_tokens: str,
    new_tokens: int | None,
    rounds: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    compiled: bool,
    attention: str | None,
    threads: int | None,
    reporter: TerminalReporter,
) -> dict[str, Any]:
    """Measure targets against a base.

    Raises
    ------
    InputError
        An option cannot be used, or a target does not exist.
    """
    if attention is not None and attention not in ATTENTIONS:
        raise InputError(unknown("attention", attention, ATTENTIONS))
    if dtype is not None and dtype not in DTYPES:
        raise InputError(unknown("dtype", dtype, DTYPES))
    settings = Settings(
        batch_sizes=numbers(batch_size, "--batch-size"),
        prompt_tokens=numbers(prompt_tokens, "--prompt-tokens"),
        new_tokens=new_tokens or NEW_TOKENS,
        rounds=rounds,
        seed=seed,
        device=str(compute_device(device or "auto")),
        dtype=dtype,
        compile=compiled,
        attention=attention,
        threads=threads,
    )
    checkpoints = _named([_base(targets, against), *(_resolve(target) for target in targets)])
    for name, checkpoint in checkpoints.items():
        for warning in blueprint(checkpoint).warnings:
            reporter.warn(warning)
        if new_tokens is not None and task_of(checkpoint.config) != "lm":
            raise InputError(f"{name} is a classifier, which generates nothing; leave --new-tokens out.")
    found = benchmark(checkpoints, settings, reporter.advance)
    return found | {"environment": environment(settings.device) | {"threads": found.pop("threads")}}


def _resolve(target: str) -> tuple[str, Path]:
    """Name and checkpoint directory of a run or a checkpoint."""
    run = Run(Path(target))
    return display_name(target), run.finished().path if run.exists() else locate(target)


def _base(targets: Sequence[str], against: str | None) -> tuple[str, Path]:
    """Name and directory of what to measure against: what was asked for, or what all the runs were made from."""
    if against is not None:
        return _resolve(against)
    found: dict[tuple[str, str | None], str] = {}
    for target in targets:
        run = Run(Path(target))
        if not run.exists():
            locate(target)
            raise InputError(
                f"{target} is no run, so that its original is not known. Pass the checkpoint to compare with by "
                "--against."
            )
        index = run.finished().index
        found.setdefault((index.base, index.revision), target)
    if len(found) > 1:
        named = ", ".join(f"{target} from {base}" for (base, _), target in found.items())
        raise InputError(f"The runs were made from different checkpoints: {named}. Pass one of them by --against.")
    ((base, revision),) = found
    return display_name(base), locate(base, revision)


def _named(found: Sequence[tuple[str, Path]]) -> dict[str, Checkpoint]:
    """Give every checkpoint a name of its own, the base first.

    Raises
    ------
    InputError
        A checkpoint is there twice.
    """
    named: dict[str, Checkpoint] = {}
    for name, path in found:
        for other in named.values():
            if other.path.resolve() == path.resolve():
                raise InputError(
                    f"{path} is to be measured twice. Pass every checkpoint once, and another as --against."
                )
        free = name
        while free in named:
            free = f"{path.parent.name}/{name}" if free == name else f"{free}'"
        named[free] = Checkpoint(path)
    return named


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print_json(found)
        return
    out = console()
    base, models, phases = found["base"], found["models"], PHASES[found["task"]]
    settings, machine = found["settings"], found["environment"]
    where = (
        machine["device"]
        if machine["device"] != "cpu"
        else f"cpu, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    )
    if found["task"] == "classification":
        out.print("Classifiers generate nothing: only the forward pass is measured.")
    how = f"{where}, {settings['attention']}{', compiled' if settings['compile'] else ''}"
    rows = [
        [_shape(row), *(_cell(row["models"][name][phase], name == base) for name in models for phase in phases)]
        for row in found["measurements"]
    ]
    columns = ["batch × prompt", *(f"{name}\n{phase}" for name in models for phase in phases)]
    title = f"Tokens a second ({how}; medians of {settings['rounds']} rounds, ratios to {base} with their range)"
    out.print(table(title, columns, rows))
    peaks = {name: max(row["models"][name]["memory_bytes"] for row in found["measurements"]) for name in models}
    rows = [
        [
            name,
            filesize.decimal(model["weights_bytes"]),
            filesize.decimal(model["read_bytes_per_token"]),
            f"{model['kv_bytes_per_token']:,.0f}" if model["kv_bytes_per_token"] else "–",
            filesize.decimal(model["kv_bytes_4096"]) if model["kv_bytes_4096"] else "–",
            filesize.decimal(peaks[name]),
            f"{model['limit']:.2f}×",
        ]
        for name, model in models.items()
    ]
    columns = ["model", "weights", "read a token", "KV bytes a token", "KV at 4,096", "largest memory", "limit"]
    out.print(table(f"Memory ({found['memory']})", columns, rows))
    if "decode" in phases:
        out.print("limit: the ratio of decoding if reading weights were all that takes time.")
    _bars(found, phases)


def _shape(row: dict[str, Any]) -> str:
    return f"{row['batch_size']} × {row['prompt_tokens']}"


def _cell(values: dict[str, Any], is_base: bool) -> str:
    speed, ratio = values["tokens_per_second"], values["ratio"]
    rate = f"{speed:,.0f}" if speed >= 1000 else number(speed)
    return rate if is_base else f"{rate} = {ratio['median']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f})"


def _bars(found: dict[str, Any], phases: Sequence[str]) -> None:
    """Draw the ratios as bars, with marks at the base and at the limit."""
    out = console()
    base = found["base"]
    medians = [
        row["models"][name][phase]["ratio"]["median"]
        for row in found["measurements"]
        for name in found["models"]
        for phase in phases
    ]
    top = max(1.0, *medians, *(model["limit"] for model in found["models"].values()))
    for name, model in found["models"].items():
        if name == base:
            continue
        out.print(f"\n{name} against {base}", style="bold")
        for phase in phases:
            for row in found["measurements"]:
                values = row["models"][name][phase]
                ratio = values["ratio"]["median"]
                limit = model["limit"] if phase == "decode" else None
                note = f", {values['of_limit']:.0%} of the limit" if limit else ""
                drawn = bar(ratio / top, [mark / top for mark in (1.0, limit) if mark])
                out.print(f"{phase:<8}{_shape(row):>10}  {drawn} {ratio:.2f}×{note}")
    out.print(f"┊ marks the base{' and, for decode, the limit' if 'decode' in phases else ''}.", style="dim")


def bar(share: float, marks: Sequence[float] = (), width: int = WIDTH) -> str:
    """Draw a bar over a share of `width` characters; marks stand where the bar leaves room."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    cells = ["█"] * (eighths // 8) + [PARTS[eighths % 8]] * (eighths % 8 > 0)
    cells += [" "] * (width - len(cells))
    for mark in marks:
        place = min(width - 1, max(0, round(mark * width) - 1))
        if cells[place] == " ":
            cells[place] = "┊"
    return "".join(cells)
