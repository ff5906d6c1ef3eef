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
from typing import Annotated, Any, NamedTuple

import typer
from costs import LARGEST_EIGH, apart, eigh_unit, evict, machine_rates, pin, size_of, timed
from random_llama import DTYPES, SHAPES, Shape, make_config, write
from rich.console import Console
from rich.table import Table

from lowrank_compress.allocation.storage import STORAGES, largest_rank
from lowrank_compress.artifacts.manifest import read_manifest
from lowrank_compress.calibration.capture import needs_gradient
from lowrank_compress.calibration.moments import STATISTICS, statistic_key
from lowrank_compress.config import Recipe
from lowrank_compress.demo import text as demo_text
from lowrank_compress.methods.units import MatrixUnit, ModuleUnit, needed, stored_elements
from lowrank_compress.model.blueprint import Blueprint
from lowrank_compress.model.states import free_memory
from lowrank_compress.stages.bases import Bases
from lowrank_compress.stages.common import Run
from lowrank_compress.stages.plan import Plan, make_plan
from lowrank_compress.stages.ranks import RANKS, Choice, read_ranks

REST = "start and end"
MOVED = ("read", "written", "from_disk", "to_disk")
STEPS = ("tokenize", "forward", "loss", "backward", "decompose", "score", "factorize", "write")
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#444444", "#994455")


class Work(NamedTuple):
    """A part of what a step must do; `unit` is what there is a rate for."""

    step: str
    what: str
    unit: str


class Floor:
    """The least work of a run, from shapes: operations, decompositions and bytes.

    A multiplication and an addition are two operations. Nothing is counted that another way of computing the same
    result would not need: second moments and products with triangles are half of a full product, and δ = g W of
    ``in_fisher`` is a part of the input's gradient anyway.

    Parameters
    ----------
    plan, bases
        The recipe, and its units and largest ranks.
    tokens
        Of the calibration set; 0 for methods without data.
    """

    def __init__(self, plan: Plan, bases: Bases, tokens: int) -> None:
        self.plan, self.bases, self.tokens = plan, bases, tokens
        self.blueprint: Blueprint = bases.blueprint
        self.wanted = needed(bases.units)
        self.gradient = needs_gradient(self.wanted)
        self.amounts: dict[Work, float] = {}
        self.eighs: set[tuple[int, int]] = set()

    def add(self, step: str, what: str, unit: str, amount: float) -> None:
        """Add work: operations in a precision, bytes read or written, or a number of decompositions."""
        if amount:
            work = Work(step, what, unit)
            self.amounts[work] = self.amounts.get(work, 0) + amount

    def eigh(self, step: str, size: int, keep: int, count: int = 1) -> None:
        """Add eigendecompositions."""
        self.eighs.add((size, keep))
        unit = eigh_unit(size, keep)
        self.add(step, unit.replace("eigh", "eigendecompositions of size"), unit, count)

    def calibrate(self) -> None:
        """Sweeps over the blocks, the head's loss, and statistics, all in float32."""
        resolved = self.blueprint.resolved
        if not self.tokens:
            return
        matrices = sum(target.elements for target in resolved.targets)
        width = resolved.heads.query * resolved.heads.size
        products = 2 * matrices * self.tokens
        attention = 4 * self.tokens * self.plan.seq_len * width * len(resolved.blocks)
        self.add("forward", "products with the weights", "float32", products)
        self.add("forward", "attention", "float32", attention)
        if self.gradient:
            config = self.blueprint.model.config
            logits = 2 * config.vocab_size * config.hidden_size * self.tokens
            self.add("loss", "logits and their gradient", "float32", 2 * logits)
            self.add("backward", "products with the weights, again", "float32", products)
            self.add("backward", "attention, again", "float32", attention)
            self.add("backward", "gradients of inputs", "float32", products)
            self.add("backward", "gradient of attention", "float32", 2 * attention)
        seen = set()
        for target in resolved.targets:
            for name in self.wanted.get(target.name, ()):
                key = (target.block, statistic_key(target, name))
                if key not in seen:
                    seen.add(key)
                    (m, n), length = target.shape, self.plan.seq_len
                    each = min(2 * length * (m + n), 2 * m * n) if name == "row_fisher" else None
                    amount = self.tokens * (each or STATISTICS[name].elements(target))
                    self.add("backward" if self.gradient else "forward", "statistics", "float32", amount)

    def decompose(self) -> None:
        """Bases of all units, in float64."""
        for unit in self.bases.units:
            if isinstance(unit, MatrixUnit):
                self._decompose_matrix(unit, self.bases.keep[unit.name])
            elif isinstance(unit, ModuleUnit) and unit.method.group == "mlp":
                self._decompose_mlp(unit)
            elif isinstance(unit, ModuleUnit) and unit.method.group == "vo":
                self._decompose_values(unit)
        if self.bases.allocator.needs_spectrum:
            for unit in self.bases.units:
                k, far = min(unit.shape), max(unit.shape)
                self.add("score", "products with the metrics", "float64", far * k**2)
                self.eigh("score", k, k)

    def _decompose_matrix(self, unit: MatrixUnit, keep: int) -> None:
        k, far_size = min(unit.shape), max(unit.shape)
        near, far = unit.method.sides(unit.target)
        if not far.far or far.diagonal:
            self.add("decompose", "products with the metrics", "float64", far_size * k**2)
        self.eigh("decompose", k, keep)
        if near.near and not near.diagonal:
            self.add("decompose", "Cholesky factors", "float64", k**3 / 3)
            self.add("decompose", "products with the metrics", "float64", 2 * k**3)
            self.add("decompose", "projectors", "float64", 2 * k**2 * keep)

    def _decompose_mlp(self, unit: ModuleUnit) -> None:
        """Two Cholesky factors, an inverse and the images under the root; the order of the units by elimination."""
        m, n = unit.roles["down"].shape
        self.add("decompose", "Cholesky factors", "float64", 2 * n**3 / 3)
        self.add("decompose", "inverses", "float64", 2 * n**3 / 3)
        self.add("decompose", "losses of narrower MLPs", "float64", m * n**2)
        if unit.method.fisher:
            self.add("decompose", "losses of narrower MLPs", "float64", 2 * m**2 * n)
            # Each unit that goes changes the weights, their measured images and the inverse, over those that are left.
            self.add("decompose", "elimination of hidden units", "float64", 2 * m * n**2 + 2 * n**3 / 3)
            self.add("decompose", "elimination of hidden units", "float64", 2 * m**2 * n)

    def _decompose_values(self, unit: ModuleUnit) -> None:
        heads = self.blueprint.resolved.heads
        outputs = unit.roles["o"].elements
        if not unit.method.fisher:
            self.add("decompose", "products with the metrics", "float64", outputs * heads.size)
        self.add("decompose", "products with the metrics", "float64", 2 * heads.key * heads.size**3)
        scaling = 2 * heads.size * (outputs + unit.roles["v"].elements)
        self.add("decompose", "projectors", "float64", 2 * heads.key * heads.size**3 + scaling)
        self.eigh("decompose", heads.size, heads.size, heads.key)

    def factorize(self, choices: Mapping[str, Choice]) -> None:
        """Factors at the chosen ranks, in float64."""
        for unit in self.bases.units:
            choice = choices.get(unit.name)
            if choice is None or choice.rank is None:
                continue
            if isinstance(unit, MatrixUnit):
                self._factorize_matrix(unit, choice)
            elif isinstance(unit, ModuleUnit) and unit.method.group == "mlp":
                (m, n), width = unit.roles["down"].shape, choice.rank
                down = 2 * m * (n - width) * width + m * width**2
                self.add("factorize", "weights of narrower modules", "float64", down)
            elif isinstance(unit, ModuleUnit) and unit.method.group == "vo":
                both = sum(target.elements for target in unit.targets)
                self.add("factorize", "weights of narrower modules", "float64", 2 * choice.rank * both)

    def _factorize_matrix(self, unit: MatrixUnit, choice: Choice) -> None:
        """The factors; pivot rows of them; where both formats are tried, what rounding does to each."""
        assert choice.rank is not None
        m, n = unit.shape
        stored = stored_elements(unit, choice.format, choice.rank)
        limit = min(unit.shape) - 1
        formats = STORAGES[:2] if choice.format == "auto" else (choice.format,)
        ranks = {form: min(largest_rank(form, unit.shape, stored), limit) for form in formats}
        self.add("factorize", "factors", "float64", 2 * max(ranks.values()) * m * n)
        if "pivot" in ranks:
            r = ranks["pivot"]
            # Two QR decompositions, the coefficients and the rows.
            self.add("factorize", "pivots", "float64", 2 * n * r**2 + 2 * m * r**2 + (m - r) * r**2 + 2 * n * r**2)
        if len(ranks) > 1:
            tried = sum(ranks.values())
            self.add("factorize", "rounding losses of both formats", "float64", 4 * m * n * tried)

    def transfer(self, run: Run) -> None:
        """Bytes: the checkpoint, from the disk once, or once a sweep if the memory cannot hold it; what is kept."""
        size = sum(path.stat().st_size for path in set(self.plan.checkpoint.files.values()))
        first = ("forward", "backward") if self.gradient else ("forward",) if self.tokens else ("decompose",)
        cached = size < free_memory() // 2
        for step in first[:1] if cached else (*first, "factorize"):
            self.add(step, "the checkpoint", "read", size)
        self.add("decompose", "bases", "write", size_of(run.scores))
        self.add("write", "the compressed checkpoint", "write", size_of(run.model))

    def seconds(self, rates: Mapping[str, float]) -> dict[Work, float]:
        """Least seconds of each part."""
        return {work: amount / rates[work.unit] for work, amount in self.amounts.items()}


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


def work_of(plan: Plan, run: Run) -> Floor:
    """Count the work of a finished run."""
    calibrated = read_manifest(run.statistics)
    bases = Bases(plan.score, plan.checkpoint, "", run.scores)
    floor = Floor(plan, bases, calibrated.report["tokens"] if calibrated else 0)
    floor.calibrate()
    floor.decompose()
    floor.factorize(read_ranks(run.scores / RANKS, bases.sites))
    floor.transfer(run)
    return floor


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
