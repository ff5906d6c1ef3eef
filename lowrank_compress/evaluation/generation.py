"""What a language model writes after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_compress.errors import InputError


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    chat: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Continue prompts greedily, each by itself: the new tokens, the end of the text among them.

    Parameters
    ----------
    model, tokenizer
        A causal language model in memory.
    prompts
        Texts; special tokens are put before them as the tokenizer does.
    new_tokens
        At most so many are written.
    chat
        Put each prompt into the tokenizer's chat template, as what a user says.
    advance
        Called with (prompts done, prompts in all).

    Raises
    ------
    InputError
        A prompt has no token, or too many; or a chat template is asked for and the tokenizer has none.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "--apply-chat-template: expected a tokenizer with a chat template; this has none. Leave it out."
        )
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    # What is asked of generation is all here: settings of the checkpoint may ask for sampling.
    ending, filling = model.generation_config.eos_token_id, tokenizer.pad_token_id
    first_end = ending[0] if isinstance(ending, list) else ending
    found: list[list[int]] = []
    generating: Any = model
    for number, prompt in enumerate(prompts, 1):
        given = _tokens(tokenizer, prompt, chat).to(model.device)
        if not given.numel():
            raise InputError(f"--prompt {prompt!r} has no token; expected a text.")
        if given.shape[1] + new_tokens > longest:
            raise InputError(
                f"--prompt {prompt[:40]!r} has {given.shape[1]} tokens, and with --new-tokens {new_tokens} more than "
                f"the models' {longest} positions. Pass a shorter one, or fewer new tokens."
            )
        made = generating.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=new_tokens,
            pad_token_id=filling if filling is not None else first_end,
        )
        found.append(made[0, given.shape[1] :].tolist())
        advance(number, len(prompts))
    return found


def _tokens(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids of a prompt, (1, length) int64."""
    if chat:
        said = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    return torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
