"""Train a small Mixtral, on the text of the demo model, for the table of methods for experts.

It begins with that model's embeddings, norms and attention; routers and experts are drawn at random. Two are of use: a
balanced one, whose loss asks every router to share the tokens out, and a skewed one, whose loss hardly does. Usage,
from the root of the repository (two minutes each, on one CPU thread)::

    python scripts/train_moe_model.py runs/balanced
    python scripts/train_moe_model.py runs/skewed --balance 0.0005
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from torch.nn import functional
from train_demo_model import Recipe, batches, optimizer_of, perplexity, save
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lowrank_compress.demo import MODEL_DIRECTORY
from lowrank_compress.demo.text import part

CHARACTERS = 100_000
"""Of the held-out text that the result is measured on."""


def new_model() -> Any:
    """Return a Mixtral in float32: 4 blocks, 8 experts of 64 hidden units of which a token goes to 2."""
    begun = LlamaForCausalLM.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    own = begun.config.to_dict()
    same = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "rms_norm_eps", "rope_parameters"),
    )
    config = MixtralConfig(
        **{name: own[name] for name in same},
        intermediate_size=64,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    found = model.load_state_dict(begun.state_dict(), strict=False)
    if any(".mlp." not in name for name in (*found.missing_keys, *found.unexpected_keys)):
        raise RuntimeError(f"The demo model lacks more than experts: {found}")
    return model


def imbalance(model: Any, logits: Sequence[Tensor]) -> Tensor:
    """Return the mean over blocks of the loss that asks for balance, () float32; 2 where all experts get the same.

    The model's own takes all blocks together, in which what one has too much of another may lack.
    """
    config = model.config
    each = [load_balancing_loss_func((one,), config.num_local_experts, config.num_experts_per_tok) for one in logits]
    return torch.stack([torch.as_tensor(loss) for loss in each]).mean()


@torch.no_grad()
def shares(model: Any, windows: Tensor) -> list[list[float]]:
    """Return which share of the tokens of windows (w, n) each expert gets, block by block."""
    found = model(input_ids=windows, output_router_logits=True, use_cache=False).router_logits
    chosen = [logits.topk(model.config.num_experts_per_tok).indices.flatten() for logits in found]
    count = model.config.num_local_experts
    return [[round(float((each == n).sum() / windows.numel()), 3) for n in range(count)] for each in chosen]


def main(
    out: Annotated[Path, typer.Argument(help="Directory of the checkpoint.")],
    balance: Annotated[float, typer.Option(help="Weight of the loss that asks for balance.")] = 0.05,
    steps: Annotated[int, typer.Option(help="Length of the learning-rate schedule.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the windows.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="At the peak.")] = 3e-3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train a small mixture of experts and write it as an ordinary Hugging Face checkpoint."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(steps, seed, batch_size, learning_rate, weight_decay=0.0, warmup_steps=20, evaluate_every=steps)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_DIRECTORY)
    tokens = {
        name: torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        for name, text in (("train", part("train")), ("heldout", part("heldout")[:CHARACTERS]))
    }
    bos = tokenizer.bos_token_id
    model = new_model()
    optimizer, started = optimizer_of(model, recipe), time.monotonic()
    for step, batch in enumerate(islice(batches(tokens["train"], bos, batch_size, seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step / steps, step)
        found = model(input_ids=batch, output_router_logits=True, use_cache=False)
        loss = functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        (loss + balance * imbalance(model, found.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            minutes = (time.monotonic() - started) / 60
            typer.echo(f"step {step:5d}  {minutes:5.1f} min  loss {loss.item():.4f}")
    reached = perplexity(model, tokens["heldout"], bos, torch.device("cpu"))
    info: dict[str, object] = {
        "text": "pydoc topics and docstrings of the standard library, extracted by lowrank_compress.demo.text",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heldout_perplexity": round(reached, 4),
        "shares": shares(model, next(batches(tokens["heldout"], bos, 32, seed))),
        "balance": balance,
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save(model, tokenizer, info, out)
    typer.echo(f"held-out perplexity {reached:.4f}; tokens by expert {info['shares']}; wrote {out}")


if __name__ == "__main__":
    typer.run(main)
