"""Train the demo model: a byte-level BPE tokenizer and a small Llama, on text that every Python installation carries.

The text is extracted at run time (`lowrank_compress.demo.text`). The tokenizer and the weights see its train part only;
the held-out part decides when to stop and which weights are kept. Usage, from the root of the repository::

    python scripts/train_demo_model.py --device cpu --minutes 13
    python scripts/train_demo_model.py --device cuda --steps 2000
"""

import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_compress.demo import MODEL_DIRECTORY
from lowrank_compress.demo.text import part

BOS, EOS = "<s>", "</s>"
VOCABULARY = 1024
SEQ_LEN = 256
HIDDEN = 128


@dataclass(frozen=True)
class Recipe:
    """What changes the result, apart from the text and the device."""

    steps: int
    seed: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int = 100
    final_share: float = 0.02
    clip_norm: float = 1.0
    evaluate_every: int = 100
    patience: int = 6

    def rate(self, progress: float, step: int) -> float:
        """Return the learning rate: a linear warm-up, then a cosine from the peak to `final_share` of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        share = self.final_share + (1 - self.final_share) * cosine
        return self.learning_rate * share * min(1.0, (step + 1) / self.warmup_steps)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens that adds `BOS` where special tokens are asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=SEQ_LEN,
        clean_up_tokenization_spaces=False,
    )


def new_model(vocabulary: int, bos: int, eos: int) -> LlamaForCausalLM:
    """Return a randomly initialised Llama in float32: grouped queries (8 heads over 4), tied embeddings.

    The initial weights keep the variance (0.02, the default, is for models ten times as wide). Without weight decay
    they stay in directions that the activations hardly use: plain SVD spends its ranks there, and methods that look at
    the activations do not.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN,
        initializer_range=HIDDEN**-0.5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def windows(tokens: Tensor, bos: int, offset: int = 0) -> Tensor:
    """Cut `tokens` (n,) from `offset` on into windows (count, SEQ_LEN), each `bos` and SEQ_LEN - 1 tokens of text."""
    body = SEQ_LEN - 1
    count = (len(tokens) - offset) // body
    cut = tokens[offset : offset + count * body].view(count, body)
    return torch.cat([cut.new_full((count, 1), bos), cut], dim=1)


def batches(tokens: Tensor, bos: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches (batch_size, SEQ_LEN) for ever; every epoch cuts at another offset and shuffles anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQ_LEN - 1, (1,), generator=generator))
        epoch = windows(tokens, bos, offset)
        order = torch.randperm(len(epoch), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield epoch[order[start : start + batch_size]]


def negative_log_likelihood(model: LlamaForCausalLM, batch: Tensor, reduction: str) -> Tensor:
    """Return the loss of every token of `batch` (b, n) but the first of each row, by `reduction`; a scalar, in nats."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, bos: int, device: torch.device) -> float:
    """Return exp(mean loss) over all of `tokens` (n,), each scored once, the last, short window included."""
    model.eval()
    full = windows(tokens, bos)
    rest = tokens[full.shape[0] * (SEQ_LEN - 1) :]
    pieces = list(full.split(32))
    if len(rest):
        pieces.append(torch.cat([rest.new_tensor([bos]), rest])[None])
    total = sum(float(negative_log_likelihood(model, piece.to(device), "sum")) for piece in pieces)
    model.train()
    return math.exp(total / len(tokens))


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def train(
    model: LlamaForCausalLM,
    tokens: dict[str, Tensor],
    bos: int,
    recipe: Recipe,
    device: torch.device,
    minutes: float | None,
) -> dict[str, float]:
    """Train `model` in place, leave the weights of least held-out perplexity in it, and return what happened.

    A limit in minutes shortens the schedule as a whole: the learning rate still decays to its end.
    """
    optimizer = optimizer_of(model, recipe)
    started = time.monotonic()
    best, best_step, best_weights = math.inf, 0, model.state_dict()
    tokens_seen = step = 0
    for step, batch in enumerate(batches(tokens["train"], bos, recipe.batch_size, recipe.seed)):
        elapsed = (time.monotonic() - started) / 60
        progress = max(step / recipe.steps, elapsed / minutes if minutes else 0.0)
        last = progress >= 1
        if step % recipe.evaluate_every == 0 or last:
            reached = perplexity(model, tokens["heldout"], bos, device)
            typer.echo(
                f"step {step:6d}  {elapsed:6.1f} min  progress {progress:.3f}  held-out perplexity {reached:.4f}"
            )
            if reached < best:
                best, best_step = reached, step
                best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if last or step - best_step >= recipe.patience * recipe.evaluate_every:
                break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(progress, step)
        loss = negative_log_likelihood(model, batch.to(device), "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += batch.shape[0] * (SEQ_LEN - 1)
    model.load_state_dict(best_weights)
    model.eval()
    return {
        "steps_done": step,
        "best_step": best_step,
        "epochs": round(tokens_seen / len(tokens["train"]), 1),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, info: dict[str, object], out: Path) -> None:
    """Write the checkpoint, its tokenizer and ``training_info.json`` to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the writer leaves it unreadable to others
    tokenizer.save_pretrained(out)
    config = out / "tokenizer_config.json"
    # transformers 5 writes a class name that 4 does not know; both know this one.
    written = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(written, indent=2) + "\n")
    (out / "training_info.json").write_text(json.dumps(info, indent=2) + "\n")


def main(
    device: Annotated[str, typer.Option(help="Any torch device: cpu, cuda, mps.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Length of the learning-rate schedule.")] = 2000,
    minutes: Annotated[float | None, typer.Option(help="Shorten the schedule to fit this time.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the windows.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")] = MODEL_DIRECTORY,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At the peak.")] = 2.5e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.")] = 0.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train the demo model and write it as an ordinary Hugging Face checkpoint."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(steps, seed, batch_size, learning_rate, weight_decay)
    train_text, heldout_text = part("train"), part("heldout")
    tokenizer = train_tokenizer(train_text)
    tokens = {
        name: torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        for name, text in (("train", train_text), ("heldout", heldout_text))
    }
    bos, eos = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS))
    target = torch.device(device)
    model = new_model(len(tokenizer), bos, eos)
    cast(torch.nn.Module, model).to(target)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(
        f"{parameters:,} parameters; {len(tokens['train']):,} tokens to train on, {len(tokens['heldout']):,} held out"
    )
    outcome = train(model, tokens, bos, recipe, target, minutes)
    reached = perplexity(model, tokens["heldout"], bos, target)
    info: dict[str, object] = {
        "text": "pydoc topics and docstrings of the standard library, extracted by lowrank_compress.demo.text",
        "parameters": parameters,
        "train_tokens": len(tokens["train"]),
        "heldout_tokens": len(tokens["heldout"]),
        "heldout_perplexity": round(reached, 4),
        **outcome,
        "limit_minutes": minutes,
        "recipe": asdict(recipe),
        "device": target.type,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save(model, tokenizer, info, out)
    typer.echo(f"held-out perplexity {reached:.4f}; wrote {out}")


if __name__ == "__main__":
    typer.run(main)
