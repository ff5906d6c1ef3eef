"""How long `lrc compress` takes on Llamas of several sizes, step by step, and how near that is to what it must take.

For every size: write a random checkpoint (`random_llama.py`), compress it in a process of its own, with cold files,
and compare each step with its floor: operations over the rate of a matrix product, decompositions over the time of one,
bytes over the disk's rate, all measured on the same machine with as many threads. Usage, from the root::

    python scripts/bench_scale.py --parameters 0.3B,1.1B --threads 2 --chart runs/scale.png --json runs/scale.json
    python scripts/bench_scale.py --parameters 7B --depth 4 --method svd-llm --keep
    python scripts/bench_scale.py --parameters 1.1B --processes 2 --threads 1
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from costs import LARGEST_EIGH, apart, evict, machine_rates, pin, size_of, timed
from floor import work_of
from random_llama import DTYPES, SHAPES, Shape, make_config, write
from rich.console import Console
from rich.table import Table

from lowrank_compress.demo import text as demo_text
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run

REST = "start and end"
MOVED = ("read", "written", "from_disk", "to_disk")
STEPS = ("tokenize", "forward", "loss", "backward", "decompose", "score", "factorize", "write")
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#444444", "#994455")


def make_checkpoint(directory: Path, shape: Shape, dtype: str) -> None:
    """Write a random checkpoint, unless the very one is there."""
    config = directory / "config.json"
    if config.exists():
        there, asked = json.loads(config.read_text()), json.loads(json.dumps(make_config(shape, dtype).to_dict()))
        if there == asked:
            return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write(directory, shape, dtype, seed=0)


def make_text(path: Path, size: int) -> None:
    """Write at least so many bytes of the demo's text, over and over if it is shorter."""
    text = demo_text.part("calibration").encode()
    whole = (text * (size // len(text) + 1))[: size + 8]
    path.write_bytes(whole.decode(errors="ignore").encode())


def measure(
    recipe: Recipe, name: str, out: Path, launcher: Sequence[object], options: Sequence[object], threads: int
) -> dict[str, Any]:
    """Compress in a fresh process, then measure the machine and count the floor.

    Parameters
    ----------
    launcher
        What runs the package, after the name of the interpreter.
    options
        More arguments of ``compress``.
    threads
        Of all processes together, for the floor.

    Returns
    -------
    dict
        All that is printed, as JSON.
    """
    plan = make_plan(recipe)
    evict(plan.checkpoint.path.iterdir())
    given = recipe.model_dump(mode="json", exclude={"model"}, exclude_defaults=True)
    words = [word for option, value in given.items() for word in (f"--{option.replace('_', '-')}", value)]
    command = [sys.executable, *launcher, "compress", recipe.model, *words, *options]
    ran = timed([*command, "--out", out, "--overwrite", "--json"], out)
    floor = work_of(plan, Run(out))
    each = os.environ["OMP_NUM_THREADS"]
    pin(threads)
    rates = apart(machine_rates, plan.device, sorted(floor.eighs), out)
    pin(int(each))
    cost = ran.answer["cost"]
    seconds = {step: float(taken) for step, taken in cost["seconds"].items()}
    least = floor.seconds(rates)
    return {
        "size": name,
        "blocks": len(floor.blueprint.resolved.blocks),
        "tokens": floor.tokens,
        "reached_ratio": ran.answer["reached_ratio"],
        "wall": ran.wall,
        "cpu": ran.cpu,
        "seconds": seconds | {REST: max(ran.wall - sum(seconds.values()), 0.0)},
        "floor": [work._asdict() | {"amount": floor.amounts[work], "seconds": s} for work, s in least.items()],
        "rates": rates,
        "extrapolated": sorted({size for size, _ in floor.eighs if size > LARGEST_EIGH}),
        "memory": {entry: value for entry, value in cost.items() if entry != "seconds"},
        "moved": ran.moved,
        "disk": {"run": size_of(out), "largest": ran.largest},
    }


def floors(found: Mapping[str, Any]) -> dict[str, float]:
    """Least seconds of each step."""
    steps: dict[str, float] = {}
    for part in found["floor"]:
        steps[part["step"]] = steps.get(part["step"], 0.0) + part["seconds"]
    return steps


def steps_of(found: Mapping[str, Any]) -> list[str]:
    """Steps that were measured or have a floor, in the order of the pipeline."""
    names = [*STEPS, *(step for step in found["seconds"] if step not in STEPS)]
    least = floors(found)
    return [step for step in names if step in found["seconds"] or step in least]


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print the steps, the parts of the floor, and memory and bytes."""
    table = Table("step", title=f"{found['size']}, {found['blocks']} blocks, {found['tokens']:,} tokens")
    for column in ("seconds", "ms a token", "floor, seconds", "ratio"):
        table.add_column(column, justify="right")
    least, tokens = floors(found), found["tokens"]

    def row(name: str, taken: float, floor: float | None) -> None:
        each = f"{1000 * taken / tokens:.3f}" if tokens else "–"
        table.add_row(
            name, f"{taken:.2f}", each, f"{floor:.2f}" if floor else "–", f"{taken / floor:.2f}" if floor else "–"
        )

    for step in steps_of(found):
        row(step, found["seconds"].get(step, 0.0), least.get(step))
    table.add_section()
    whole = sum(least.values())
    row("all steps", sum(found["seconds"].values()) - found["seconds"][REST], whole)
    row("the process", found["wall"], whole)
    console.print(table)

    parts = Table("step", "what it must do", title="The floor")
    for column in ("amount", "rate", "seconds"):
        parts.add_column(column, justify="right")
    for part in sorted(found["floor"], key=lambda part: steps_of(found).index(part["step"])):
        unit, rate = part["unit"], found["rates"][part["unit"]]
        if unit.startswith("float"):
            amount, speed = f"{part['amount'] / 1e12:.3f} T operations", f"{rate / 1e9:.1f} G/s in {unit}"
        elif unit in ("read", "write"):
            amount, speed = f"{part['amount'] / 1e9:.3f} GB", f"{rate / 1e6:.0f} MB/s {unit}"
        else:
            amount, speed = f"{part['amount']:.0f}", f"{1 / rate:.3f} s each"
        parts.add_row(part["step"], part["what"], amount, speed, f"{part['seconds']:.2f}")
    console.print(parts)
    if found["extrapolated"]:
        sizes = ", ".join(map(str, found["extrapolated"]))
        console.print(f"Decompositions of size {sizes}: by the cube from one of {LARGEST_EIGH}.")
    memory = found["memory"]
    above = (memory["peak_bytes"] - memory["start_bytes"]) / 1e6
    device = f", {memory['peak_device_bytes'] / 1e6:.0f} MB on the GPU" if "peak_device_bytes" in memory else ""
    console.print(
        f"Peak memory: {above:.0f} MB above the {memory['start_bytes'] / 1e6:.0f} MB at the start "
        f"(in {memory['peak_step']}){device}. CPU time: {found['cpu']:.1f} s in {found['wall']:.1f} s."
    )
    moved = found["moved"] or {}
    shown = {name: f"{moved[name] / 1e6:.0f} MB" if moved else "–" for name in MOVED}
    scratch = ", ".join(f"{folder}/ {size / 1e6:.0f} MB" for folder, size in found["disk"]["largest"].items())
    console.print(
        f"Read: {shown['read']} by calls, {shown['from_disk']} from the disk. Written: {shown['written']} by calls, "
        f"{shown['to_disk']} to the disk. The run takes {found['disk']['run'] / 1e6:.0f} MB; at the most: {scratch}."
    )


def draw(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Save a chart: for every size the measured seconds by step, and the floor beside them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.2 + 2.4 * len(results), 4.8), layout="constrained")
    names = list(dict.fromkeys(step for found in results for step in steps_of(found)))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    for axes, found in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        least = floors(found)
        tops = [0.0, 0.0]
        for name in names:
            for place, value in enumerate((found["seconds"].get(name, 0.0), least.get(name, 0.0))):
                axes.bar(place, value, 0.7, bottom=tops[place], color=colours[name], edgecolor="white", linewidth=0.8)
                tops[place] += value
        for place, top in enumerate(tops):
            axes.text(place, top, f"{top:.3g} s", ha="center", va="bottom")
        axes.set_xticks([0, 1], ["measured", "floor"])
        axes.set_title(f"{found['size']}, {found['blocks']} blocks: {tops[0] / tops[1]:.2f} ×")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.08 * max(tops))
    figure.axes[0].set_ylabel("seconds")
    handles = [Patch(color=colours[name], label=name) for name in reversed(names)]
    figure.axes[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    parameters: Annotated[str, typer.Option(help=f"Sizes, separated by commas: {', '.join(SHAPES)}.")] = "0.3B",
    method: Annotated[str, typer.Option(help="As of `lrc compress`.")] = "auto",
    ratio: Annotated[float, typer.Option(help="As of `lrc compress`.")] = 0.3,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a process. [default: the cores, shared]")] = None,
    processes: Annotated[int, typer.Option(help="Processes; more than one by torch.distributed.run.")] = 1,
    memory_budget: Annotated[str | None, typer.Option(help="As of `lrc compress`.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the checkpoint: {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="As of `lrc compress`.")] = "cpu",
    depth: Annotated[int | None, typer.Option(help="Number of blocks. [default: the size's own]")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text. [default: the demo's, repeated]")] = None,
    workdir: Annotated[Path, typer.Option(help="For checkpoints and runs.")] = Path("runs/scale"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep checkpoints and runs.")] = False,
    chart: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for all figures.")] = None,
) -> None:
    """Measure every size, and print and save what was found."""
    names = parameters.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    if chart is not None and not find_spec("matplotlib"):
        raise typer.BadParameter("--chart needs matplotlib: pip install matplotlib")
    each = threads or max((os.cpu_count() or 1) // processes, 1)
    pin(each)
    launcher = ["-m", "lowrank_compress"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *launcher]
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=140)
    results = []
    for name in names:
        shape = SHAPES[name] if depth is None else replace(SHAPES[name], num_hidden_layers=depth)
        place = workdir / f"llama-{name}-{shape.num_hidden_layers}-{dtype}"
        apart(make_checkpoint, place / "dense", shape, dtype)
        text = calibration or place / "calibration.txt"
        if calibration is None:
            make_text(text, samples * seq_len)
        run = place / "run"
        shutil.rmtree(run, ignore_errors=True)
        recipe = Recipe(
            model=str(place / "dense"),
            method=method,
            ratio=ratio,
            samples=samples,
            seq_len=seq_len,
            calibration=str(text),
            device=device,
        )
        options = [] if memory_budget is None else ["--memory-budget", memory_budget]
        results.append(measure(recipe, name, run, launcher, options, each * processes))
        show(console, results[-1])
        if not keep:
            shutil.rmtree(place)
        title = f"lrc compress --method {method} --ratio {ratio:g}\n{samples} windows of {seq_len} tokens"
        title += f", {processes} × {each} threads" if device == "cpu" else f", {processes} × {device}"
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"title": title, "results": results}, indent=2) + "\n", encoding="utf-8")
        if chart is not None:
            draw(results, chart, title)


if __name__ == "__main__":
    typer.run(main)
