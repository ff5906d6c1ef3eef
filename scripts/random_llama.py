"""Write a Llama checkpoint with random weights, of any size, for timing; in memory is one shard at a time.

The tokenizer knows the 256 bytes, so that any text calibrates. Usage, from the root of the repository::

    python scripts/random_llama.py runs/llama-0.3B --parameters 0.3B
    lrc compress runs/llama-0.3B --method svd --out runs/llama-0.3B-svd
    lrc bench runs/llama-0.3B-svd
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from lowrank_compress.model.export import ShardWriter

SPECIAL = ("<unk>", "<s>", "</s>")
DTYPES = ("bfloat16", "float16", "float32")
STD = 0.02
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, by the names of its config."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000


SHAPES = {
    "0.05B": Shape(512, 8, 1408, 8, 4),
    "0.3B": Shape(1024, 20, 2816, 16, 8),
    "1.1B": Shape(2048, 22, 5632, 32, 4),  # TinyLlama
    "3B": Shape(3200, 26, 8640, 32, 32),  # OpenLLaMA
    "7B": Shape(4096, 32, 11008, 32, 32),  # Llama 2
}


def make_config(shape: Shape, dtype: str) -> LlamaConfig:
    """Return the configuration of a shape."""
    return LlamaConfig(
        **asdict(shape),
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=4096,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        dtype=dtype,
    )


def tensors(shape: Shape, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Make the weights one by one: normal, and narrower where a block adds to the hidden states, as when training."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = hidden // shape.num_attention_heads * shape.num_key_value_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    residual = STD / math.sqrt(2 * shape.num_hidden_layers)

    def normal(size: tuple[int, int], std: float = STD) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(dtype)

    yield "model.embed_tokens.weight", normal((shape.vocab_size, hidden))
    for layer in range(shape.num_hidden_layers):
        block = f"model.layers.{layer}"
        for name, size in matrices.items():
            std = residual if name.endswith(("o_proj", "down_proj")) else STD
            yield f"{block}.{name}.weight", normal(size, std)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{norm}.weight", torch.ones(hidden, dtype=dtype)
    yield "model.norm.weight", torch.ones(hidden, dtype=dtype)
    yield "lm_head.weight", normal((shape.vocab_size, hidden))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes, and which puts <s> before a text."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def write(directory: Path, shape: Shape, dtype: str, seed: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the whole checkpoint into an empty directory and return the number of its parameters."""
    return written(directory, tensors(shape, getattr(torch, dtype), seed), make_config(shape, dtype), shard_bytes)


def written(
    directory: Path, weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write weights, a tokenizer and a configuration into an empty directory; return the number of parameters."""
    writer = ShardWriter(directory, shard_bytes)
    count = 0
    for name, tensor in weights:
        writer.add(name, tensor)
        count += tensor.numel()
    writer.close()
    make_tokenizer().save_pretrained(directory)
    # The config comes last: a directory without it is no checkpoint.
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    (directory / "config.json").write_text(f"{text}\n", encoding="utf-8")
    return count


def main(
    directory: Annotated[Path, typer.Argument(help="Where to write; new or empty.")],
    parameters: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "0.3B",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    depth: Annotated[int | None, typer.Option(min=1, help="Number of blocks. [default: the size's own]")] = None,
) -> None:
    """Write a random checkpoint."""
    if parameters not in SHAPES:
        raise typer.BadParameter(f"{parameters!r} is none of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise typer.BadParameter(f"{directory} is there already and not an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[parameters] if depth is None else replace(SHAPES[parameters], num_hidden_layers=depth)
    count = write(directory, shape, dtype, seed)
    typer.echo(f"{directory}: {count:,} parameters in {dtype}")


if __name__ == "__main__":
    typer.run(main)
