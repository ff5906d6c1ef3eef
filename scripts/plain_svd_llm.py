"""SVD-LLM as research code does it, and `lrc compress --method svd-llm` beside it: the same model, data and ranks.

Plain: the whole model in memory in float32, a hook on every linear layer of the blocks that sums x xᵀ, and for each
weight a Cholesky factor R of its Gram matrix and an SVD of W R, all in float32 by LAPACK with all threads. Nothing is
shared between layers that read the same input, and nothing happens on the smaller side. Usage, from the root::

    python scripts/plain_svd_llm.py MODEL --calibration TEXT --out runs/plain
    python scripts/plain_svd_llm.py MODEL --calibration TEXT --out runs/plain --compare --perplexity OTHER.txt

With ``--compare`` both run in processes of their own, one after the other, each with cold files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from costs import evict, pin, resident, timed
from rich.console import Console
from rich.table import Table
from running import perplexity
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowrank_compress.calibration.windows import batches_hash
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.samples import calibration_batches

JITTERS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the mean diagonal
# What each side calls its work, in the rows of the comparison; other steps belong to the first row.
FIRST = "load, calibrate"
ROWS: Mapping[str, tuple[str, ...]] = {
    "decompose": ("decompose", "score"),
    "factors": ("factorize",),
    "write": ("write",),
}


class Stopwatch:
    """Seconds by stage: each stage lasts from the one before to its own `lap`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the head, by its name."""
    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if module is not head}


@torch.no_grad()
def gram_matrices(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Sum x xᵀ of every linear layer, (in, in) float32, in one pass over the data."""
    grams: dict[str, Tensor] = {}

    def hook(name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            if name not in grams:
                grams[name] = x.new_zeros(x.shape[1], x.shape[1])
            grams[name].addmm_(x.T, x)

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in linears(model).items()]
    for batch in batches:
        # Without the head, whose logits nobody needs.
        model.base_model(input_ids=batch.ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def cholesky(gram: Tensor) -> Tensor:
    """Lower R with R Rᵀ = gram + the least jitter that makes it positive definite.

    Raises
    ------
    RuntimeError
        None does.
    """
    scale = gram.diagonal().mean()
    for jitter in JITTERS:
        lower, info = torch.linalg.cholesky_ex(gram + jitter * scale * torch.eye(len(gram)))
        if int(info) == 0:
            return lower
    raise RuntimeError(f"A {len(gram)}x{len(gram)} Gram matrix is not positive definite at jitter {JITTERS[-1]:g}.")


def compress(recipe: Recipe, out: Path, merged: bool) -> dict[str, Any]:
    """Compress a checkpoint.

    Parameters
    ----------
    recipe
        The model, the calibration data and the ratio.
    out
        Gets ``factors.safetensors`` in the checkpoint's dtype.
    merged
        Write ``merged/`` too: a dense float32 checkpoint with the products of these factors. It is not timed.

    Returns
    -------
    dict
        ``cost`` with the seconds of each stage and bytes of memory, and ``reached_ratio``, as of `lrc compress`; the
        number of tokens and their hash.
    """
    out.mkdir(parents=True, exist_ok=True)
    plan = make_plan(recipe)
    start = resident()
    watch = Stopwatch()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plan.checkpoint.path, dtype=torch.float32)
    watch.lap("load")
    batches = calibration_batches(plan.calibrate, plan.checkpoint, "lm")
    watch.lap("tokenize")
    grams = gram_matrices(model, batches)
    watch.lap("calibrate")
    dtype = plan.checkpoint.dtype
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in linears(model).items():
        weight = module.weight.detach()
        m, n = weight.shape
        rank = max(int((1 - recipe.ratio) * m * n / (m + n)), 1)
        root = cholesky(grams[name])
        left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
        watch.lap("decompose")
        scale = values[:rank].sqrt()
        inner = torch.linalg.solve_triangular(root, scale[:, None] * right[:rank], upper=False, left=False)
        pairs[name] = (left[:, :rank] * scale).to(dtype), inner.to(dtype)
        watch.lap("factorize")
    whole = sum(tensor.numel() for name, tensor in tensors.items() if name.removesuffix(".weight") in pairs)
    stored = sum(outer.numel() + inner.numel() for outer, inner in pairs.values())
    for name, (outer, inner) in pairs.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.A": outer, f"{name}.B": inner}
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, out / "factors.safetensors")
    watch.lap("write")
    peak = resident(peak=True)
    if merged:
        for name, (outer, inner) in pairs.items():
            linears(model)[name].weight.data = outer.float() @ inner.float()
        model.save_pretrained(out / "merged")
        AutoTokenizer.from_pretrained(plan.checkpoint.path).save_pretrained(out / "merged")
    return {
        "cost": {"seconds": watch.seconds, "start_bytes": start, "peak_bytes": peak},
        "reached_ratio": 1 - stored / whole,
        "tokens": sum(batch.tokens for batch in batches),
        "tokens_sha256": batches_hash(batches),
    }


def words(recipe: Recipe, *left_out: str) -> list[object]:
    """A recipe as a command line, both sides' options having the same names."""
    given = recipe.model_dump(mode="json", exclude={"model", *left_out}, exclude_defaults=True)
    return [recipe.model, *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value))]


def run_both(recipe: Recipe, out: Path, merged: bool, threads: int, processes: int) -> dict[str, dict[str, Any]]:
    """Run the plain way and `lrc compress`, one after the other, each with cold files and with all threads."""
    checkpoint = make_plan(recipe).checkpoint.path
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    commands = {
        "plain": [__file__, *words(recipe, "method", "device"), *(["--merged"] if merged else [])],
        "lrc": [*launcher, "-m", "lowrank_compress", "compress", *words(recipe), "--overwrite"],
    }
    found = {}
    for name, command in commands.items():
        shutil.rmtree(out / name, ignore_errors=True)
        evict(checkpoint.iterdir())
        pin(threads if name == "plain" else max(threads // processes, 1))
        ran = timed([sys.executable, *command, "--out", out / name, "--json"])
        cost = ran.answer["cost"]
        found[name] = {
            "seconds": cost["seconds"],
            "total": sum(cost["seconds"].values()),
            "wall": ran.wall,
            "cpu": ran.cpu,
            "peak_bytes": cost["peak_bytes"],
            "start_bytes": cost["start_bytes"],
            "reached_ratio": ran.answer["reached_ratio"],
        }
    return found


def compare(
    recipe: Recipe, out: Path, text: Path | None, rounds: int, threads: int, processes: int
) -> dict[str, dict[str, Any]]:
    """Run both, each round anew, and keep of each side the fastest round; evaluate both checkpoints."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, measured in run_both(recipe, out, text is not None and number == 0, threads, processes).items():
            if name not in found or measured["total"] < found[name]["total"]:
                found[name] = measured | {"perplexity": found.get(name, {}).get("perplexity")}
        if text is not None and number == 0:
            for name, checkpoint in (("plain", out / "plain" / "merged"), ("lrc", out / "lrc" / "model")):
                found[name]["perplexity"] = perplexity(checkpoint, text, "--seq-len", recipe.seq_len or 512)
    return found


def show(found: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Print both side by side."""
    console = Console(highlight=False)
    table = Table("", title=title)
    for column in ("plain", "lrc", "plain / lrc"):
        table.add_column(column, justify="right")
    plain, lrc = found["plain"], found["lrc"]

    def row(name: str, first: float, second: float, form: str = "{:.2f} s") -> None:
        table.add_row(name, form.format(first), form.format(second), f"{first / second:.2f}" if second else "–")

    def taken(side: Mapping[str, Any], name: str) -> float:
        named = [step for steps in ROWS.values() for step in steps]
        steps = ROWS.get(name) or [step for step in side["seconds"] if step not in named]
        return sum(side["seconds"].get(step, 0.0) for step in steps)

    for name in (FIRST, *ROWS):
        row(name, taken(plain, name), taken(lrc, name))
    table.add_section()
    both = ("decompose", "factors")
    row("decompose and factors", sum(taken(plain, name) for name in both), sum(taken(lrc, name) for name in both))
    row("all steps", plain["total"], lrc["total"])
    row("the process, with imports", plain["wall"], lrc["wall"])
    row("its CPU time", plain["cpu"], lrc["cpu"])
    table.add_section()
    above = [(side["peak_bytes"] - side["start_bytes"]) / 1e6 for side in (plain, lrc)]
    row("memory above the start", above[0], above[1], "{:.0f} MB")
    row("peak memory", plain["peak_bytes"] / 1e6, lrc["peak_bytes"] / 1e6, "{:.0f} MB")
    row("share removed", plain["reached_ratio"], lrc["reached_ratio"], "{:.4f}")
    if lrc["perplexity"] is not None:
        row("perplexity", plain["perplexity"], lrc["perplexity"], "{:.4f}")
    console.print(table)


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint of a Llama or the like.")],
    calibration: Annotated[Path, typer.Option(help="Calibration text.")],
    out: Annotated[Path, typer.Option(help="Directory for the results.")],
    ratio: Annotated[float, typer.Option(help="Share of parameters to remove.")] = 0.3,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the shuffle of windows.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    comparing: Annotated[bool, typer.Option("--compare", help="Run `lrc compress` too, and compare.")] = False,
    processes: Annotated[int, typer.Option(help="With --compare: of lrc, which share the threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="With --compare: take each side's fastest of so many.")] = 1,
    text: Annotated[Path | None, typer.Option("--perplexity", help="With --compare: held-out text.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write a dense float32 checkpoint of the products.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress by plain SVD-LLM, and perhaps compare."""
    recipe = Recipe(
        model=str(model),
        method="svd-llm",
        ratio=ratio,
        calibration=str(calibration),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device="cpu",
    )
    if comparing:
        found: Mapping[str, Any] = compare(recipe, out, text, rounds, threads or os.cpu_count() or 1, processes)
        if not as_json:
            show(found, f"{model.name}, svd-llm, ratio {ratio:g}, {samples} windows of {seq_len} tokens")
            return
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        found = compress(recipe, out, merged)
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
