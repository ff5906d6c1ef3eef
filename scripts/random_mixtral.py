"""Write a Mixtral checkpoint with random weights, and say how much memory compressing it takes.

Its widths are those of Mixtral 8x7B, its experts as many as asked for; matrices repeat a few random ones, scaled, as
nothing here depends on their values. Usage, from the root of the repository::

    python scripts/random_mixtral.py runs/wide --experts 16 --blocks 1
    python scripts/random_mixtral.py runs/wide --measure camera --memory-budget 3GB
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from random_llama import STD, written
from torch import Tensor
from transformers import MixtralConfig

from lowrank_compress.demo.text import part

HIDDEN, INNER, KEYS, VOCABULARY = 4096, 14336, 1024, 259
RATIO = 0.3


def make_config(experts: int, blocks: int) -> MixtralConfig:
    """Return the configuration."""
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_local_experts=experts,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def tensors(experts: int, blocks: int) -> Iterator[tuple[str, Tensor]]:
    """Make the weights one by one."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(INNER, HIDDEN, generator=generator) * STD).to(torch.bfloat16)

    def matrix(rows: int, columns: int, number: int) -> Tensor:
        turned = drawn.roll(number, 0) if rows <= INNER and columns <= HIDDEN else drawn.roll(number, 0).T
        return turned[:rows, :columns].contiguous()

    yield "model.embed_tokens.weight", matrix(VOCABULARY, HIDDEN, 1)
    for block in range(blocks):
        path = f"model.layers.{block}"
        for name, rows in (("q_proj", HIDDEN), ("k_proj", KEYS), ("v_proj", KEYS), ("o_proj", HIDDEN)):
            yield f"{path}.self_attn.{name}.weight", matrix(rows, HIDDEN, block)
        yield f"{path}.block_sparse_moe.gate.weight", matrix(experts, HIDDEN, 7 + block)
        for expert in range(experts):
            for name, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
                yield f"{path}.block_sparse_moe.experts.{expert}.{name}.weight", matrix(*shape, 37 * expert + block)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "lm_head.weight", matrix(VOCABULARY, HIDDEN, 2)


def write(directory: Path, experts: int, blocks: int) -> int:
    """Write the whole checkpoint into an empty directory and return the number of its parameters."""
    directory.mkdir(parents=True)
    return written(directory, tensors(experts, blocks), make_config(experts, blocks))


def measure(directory: Path, method: str, budget: str, samples: int) -> str:
    """Compress the experts in a process of its own, and say what that took."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as place:
        text = Path(place) / "text.txt"
        text.write_text(part("calibration")[:20_000], encoding="utf-8")
        command = [sys.executable, "-m", "lowrank_compress", "compress", directory, "--method", method]
        command += ["--calibration", text, "--samples", samples, "--seq-len", 64, "--ratio", RATIO]
        command += ["--attention", "dense", "--memory-budget", budget, "--out", Path(place) / "run", "--json"]
        said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
    cost = json.loads(said)["cost"]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    whole = 3 * HIDDEN * INNER * 4 * config["num_local_experts"]
    above = cost["peak_bytes"] - cost["start_bytes"]
    return (
        f"{method}, {config['num_local_experts']} experts of Mixtral's widths, {samples} × 64 tokens, --memory-budget "
        f"{budget}: a peak of {above / 1e6:,.0f} MB above the start (in {cost['peak_step']}); a block's experts in "
        f"single precision are {whole / 1e6:,.0f} MB, one {whole / 1e6 / config['num_local_experts']:,.0f} MB; "
        f"{sum(cost['seconds'].values()):,.0f} s"
    )


def main(
    directory: Annotated[Path, typer.Argument(help="Of the checkpoint; written unless it is there.")],
    experts: Annotated[int, typer.Option(min=2, help="Of a block.")] = 16,
    blocks: Annotated[int, typer.Option(min=1, help="Number of blocks.")] = 1,
    method: Annotated[str, typer.Option("--measure", help="Method to compress by; nothing for none.")] = "",
    memory_budget: Annotated[str, typer.Option(help="That of `lrc compress`.")] = "3GB",
    samples: Annotated[int, typer.Option(help="Windows of 64 tokens.")] = 4,
) -> None:
    """Write a random checkpoint, or measure what compressing it takes."""
    if not directory.exists():
        typer.echo(f"{directory}: {write(directory, experts, blocks):,} parameters in bfloat16")
    if method:
        typer.echo(measure(directory, method, memory_budget, samples))


if __name__ == "__main__":
    typer.run(main)
