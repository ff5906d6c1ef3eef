"""Say, from shapes alone, what calibrating large mixtures of experts takes: bytes in memory, and operations.

Usage, from the root of the repository::

    python scripts/moe_on_paper.py --samples 128 --seq-len 512 --tflops 40
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from lowrank_compress.arch.resolve import resolve, separate_experts
from lowrank_compress.config import Scheme
from lowrank_compress.methods.candidates import all_groups, candidates_of
from lowrank_compress.methods.groups import statistics_bytes

SINGLE = 4
# One sparse block of each, how many such blocks there are, and to how many experts a token goes.
MODELS: dict[str, tuple[Any, int, int]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            hidden_size=2048,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,  # pyright: ignore[reportCallIssue]
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=1,
            vocab_size=8,
            **{"head_dim": 128},
        ),
        48,
        8,
    ),
    "DeepSeek-V3": (
        DeepseekV3Config(num_hidden_layers=1, first_k_dense_replace=0, vocab_size=8),
        58,
        8,
    ),
}
METHODS = ("camera", "merge", "svd-llm", "kfac")


def main(
    samples: Annotated[int, typer.Option(help="Windows of the calibration set.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Their length.")] = 512,
    tflops: Annotated[float, typer.Option(help="Operations a second that the machine does, in 10¹².")] = 40.0,
) -> None:
    """Print a table in markdown."""
    tokens = samples * seq_len
    typer.echo(
        "| model | method | experts of a block | one of them | statistics of a block | hidden states | seconds |"
    )
    typer.echo("|---|---|---:|---:|---:|---:|---:|")
    for name, (config, blocks, chosen) in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        separate_experts(model)
        resolved = resolve(model)
        own = [target for target in resolved.targets if target.expert is not None]
        experts = sum(target.elements for target in own)
        one = experts // own[0].experts
        rest = sum(target.elements for target in resolved.targets) - experts
        for method in METHODS:
            groups = all_groups(candidates_of(resolved, Scheme(methods={"experts": method}, metric="gram")))
            gradients = method == "kfac"
            # A multiplication and an addition for each element that a token meets; thrice where gradients go back too.
            met = own[0].experts + chosen if method == "merge" else chosen  # it runs every expert on every token
            work = 2 * tokens * (rest + met * one) * blocks * (3 if gradients else 1)
            states = tokens * config.hidden_size * SINGLE * (2 if gradients else 1)
            sizes = [
                f"{size / 1e9:.2g} GB" for size in (experts * SINGLE, one * SINGLE, statistics_bytes(groups), states)
            ]
            typer.echo(f"| {name} | `{method}` | {' | '.join(sizes)} | {work / tflops / 1e12:,.0f} |")


if __name__ == "__main__":
    typer.run(main)
