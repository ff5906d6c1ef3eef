"""Measure what fine-tuning costs: of a dense model, of a compressed one, of its low-rank matrices alone.

Each way is a process of its own, on the same random batches. Its memory is what it had resident (on a GPU: allocated)
at most, above what loading the libraries takes; its speed is per second of CPU time (on a GPU: of wall time). WeLore
(arXiv 2407.11239, section 4) reports about 3 times the throughput and 0.6 of the memory of full fine-tuning for the
low-rank part of a half-compressed Llama 2. Usage, from the root of the repository::

    python scripts/finetune_cost.py                            # a random Llama, half of its blocks' elements removed
    python scripts/finetune_cost.py --run runs/mine            # a run of one's own, against its dense model
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_llama import SHAPES, write
from rich.console import Console
from rich.table import Table
from running import lrc
from torch import nn

import lowrank_compress  # noqa: F401  registers the format
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.resources.cost import peak_memory
from lowrank_compress.training.loss import from_text
from lowrank_compress.training.student import Student, Train
from lowrank_compress.training.trainer import Trainer

WARM = 1  # steps before the clock starts


@dataclass(frozen=True)
class Way:
    """What is trained, of which checkpoint."""

    title: str
    checkpoint: Path
    train: Train


@dataclass(frozen=True)
class Cost:
    """What a way costs: trained parameters, tokens a second, bytes."""

    trained: int
    speed: float
    memory: int


def measure(way: Way, batch: int, length: int, steps: int, device: str, threads: int) -> Cost:
    """Make steps of AdamW in float32 on random tokens."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    before = peak_memory()
    opened = Checkpoint(way.checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(way.checkpoint, dtype=torch.float32, use_cache=False)
    model.to(device).train()
    student = Student(
        model, (opened.quantization or {}).get("modules", {}), blueprint(opened).resolved.blocks, way.train
    )
    trainer = Trainer(student.learning, from_text(model), 1e-4)
    generator, start = torch.Generator().manual_seed(0), 0.0
    clock = time.perf_counter if device == "cuda" else time.process_time
    for step in range(WARM + steps):
        if step == WARM:
            _wait(device)
            start = clock()
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
        trainer.step([Batch(ids)], WARM + steps)
    _wait(device)
    speed = batch * length * steps / (clock() - start)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory() - before
    return Cost(_count(student.learning), speed, memory)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _count(learning: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in learning.values())


def main(
    run: Annotated[Path | None, typer.Option(help="A run. [default: a random Llama, compressed by plain SVD]")] = None,
    parameters: Annotated[str, typer.Option(help=f"Of the random Llama: {', '.join(SHAPES)}.")] = "0.05B",
    ratio: Annotated[float, typer.Option(help="Share of its blocks' elements that is removed.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print throughput and memory of each way, and what they are of the first one's."""
    with tempfile.TemporaryDirectory() as temporary:
        if run is None:
            run, dense = Path(temporary) / "run", Path(temporary) / "dense"
            dense.mkdir()
            write(dense, SHAPES[parameters], "float32", 0)
            lrc("compress", dense, "--method", "svd", "--ratio", ratio, "--storage", "pair", "--out", run)
        else:
            dense = Path(lrc("show", run)["model"])
        compressed = run / "model"
        ways = (
            Way("all of the dense model's blocks", dense, "all"),
            Way("all of the compressed blocks", compressed, "all"),
            Way("low-rank matrices alone", compressed, "low-rank"),
        )
        table = Table("trained", "parameters", "tokens/s", "memory", "speed ÷ dense", "memory ÷ dense")
        first: Cost | None = None
        for way in ways:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, way, batch, length, steps, device, threads).result()
            first = first or found
            table.add_row(
                way.title,
                f"{found.trained:,}",
                f"{found.speed:.0f}",
                f"{found.memory / 1e6:.0f} MB",
                f"{found.speed / first.speed:.2f}",
                f"{found.memory / first.memory:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
