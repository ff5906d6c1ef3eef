"""What models are for, by their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from lowrank_compress.errors import CheckpointError, UnsupportedError

Task = Literal["lm", "classification", "embedding", "scores", "labels", "tokens", "answers", "masked"]
AUTO: Mapping[Task, Any] = {
    "lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "embedding": AutoModel,
    "scores": AutoModelForSequenceClassification,
    "labels": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "masked": AutoModelForMaskedLM,
}
"""The class of transformers that loads a model for each."""
NEED_EXAMPLES: tuple[Task, ...] = ("classification", "tokens", "answers", "scores", "labels")
"""Tasks whose loss is of examples, most against labels; what has another head makes its loss of plain text."""
_UNITS: Mapping[Task, str] = {
    "lm": "nats a token",
    "masked": "nats a token",
    "classification": "nats an example",
    "tokens": "nats a word",
    "answers": "nats an answer",
    "labels": "nats a label",
    "scores": "½(Δs)² a score",
    "embedding": "½‖Δe‖² a text",
}
_HEADS: Mapping[str, Task] = {
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "answers",
    "ForMaskedLM": "masked",
    "Model": "embedding",
}
_KINDS: Mapping[str, Task] = {
    "single_label_classification": "classification",
    "multi_label_classification": "labels",
    "regression": "scores",
}


def unit_of_loss(task: Task, paired: bool = False) -> str:
    """Name what losses and divergences of a head are measured in, and of what.

    Parameters
    ----------
    paired
        Whether scores are of pairs of texts, of which one is preferred.
    """
    return "nats a pair" if paired and task == "scores" else _UNITS[task]


def task_of(config: PretrainedConfig) -> Task:
    """Tell models by their heads, which `architectures` names.

    What has no head is an embedding model: its hidden states are its result. A sequence classifier may be for one class
    of several, for any number of labels, or give scores, as a regression and a reward model do.

    Raises
    ------
    UnsupportedError
        It is none of them.
    """
    listed = getattr(config, "architectures", None)
    named = str(listed[0]) if isinstance(listed, list | tuple) and listed else str(listed or "(none)")
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "lm"
    if named.endswith("ForSequenceClassification"):
        # As transformers decides: a single label is a regression.
        usual = "regression" if len(config.id2label or {}) < 2 else "single_label_classification"
        kind = getattr(config, "problem_type", None) or usual
        if getattr(config, "pad_token_id", None) is None:
            raise CheckpointError(
                "The classifier's config.json has no pad_token_id, without which batches of texts cannot be told from "
                "padding. Set it to the tokenizer's padding token."
            )
        return _KINDS[kind]
    for ending, task in _HEADS.items():
        if named.endswith(ending):
            return task
    raise UnsupportedError(
        f"The checkpoint's head is {named}; supported are causal language models (…ForCausalLM, …LMHeadModel), "
        "sequence and token classifiers (…ForSequenceClassification, …ForTokenClassification), …ForQuestionAnswering, "
        "…ForMaskedLM and models without a head (…Model), as `architectures` of config.json names them."
    )
