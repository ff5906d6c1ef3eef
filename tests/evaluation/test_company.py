"""An example's result does not depend on the examples that it is evaluated with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowrank_compress.calibration.sources import Examples
from lowrank_compress.calibration.tokens import example_batches
from lowrank_compress.evaluation.replayed import _passes
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from tests.tiny import CASES, save_tiny

CLASSIFIERS = [model_type for model_type, task in CASES if task == "classification"]
EXAMPLES = Examples(
    ["the fox", "a lazy dog jumps over it again and again", "dog", "the quick brown fox", "so", "the dog"], None
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_logits_are_those_of_each_example_alone(model_type: str, side: str, pad: int | None, tmp_path: Path) -> None:
    overrides = {} if pad is None else {"pad_token_id": pad}  # another than the tokenizer's
    path = save_tiny(model_type, tmp_path / "model", "classification", **overrides)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.padding_side = side
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    skeleton = Skeleton(Checkpoint(path), torch.device("cpu"), torch.float32)
    labels = [str(number % 3) for number in range(len(EXAMPLES.texts))]
    for size in (1, 2, 6):
        found = {}
        batches = example_batches(tokenizer, Examples(EXAMPLES.texts, labels), {"0": 0, "1": 1, "2": 2}, 64, size)
        for part, replay, states in _passes(skeleton, batches, lambda done, total: None):
            for batch, state in zip(part, states, strict=True):
                with torch.no_grad():
                    logits = replay.head(batch, replay.load(state))
                found |= dict(zip(map(tuple, batch.ids.tolist()), logits, strict=True))
        for text in EXAMPLES.texts:
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                expected = stock(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(found[tuple(ids)], expected, rtol=1e-4, atol=1e-5)


def test_pairs_tell_their_sentences_apart(tmp_path: Path) -> None:
    path = save_tiny("bert", tmp_path / "model", "classification")
    tokenizer = AutoTokenizer.from_pretrained(path, model_input_names=["input_ids", "token_type_ids"])
    pairs = Examples(["the fox", "a dog"], ["0", "1"], ["jumps over", "it is lazy"])
    batches = example_batches(tokenizer, pairs, {"0": 0, "1": 1}, 64, 2)
    assert all(batch.kinds is not None for batch in batches)
    skeleton = Skeleton(Checkpoint(path), torch.device("cpu"), torch.float32)
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for part, replay, states in _passes(skeleton, batches, lambda done, total: None):
        for batch, state in zip(part, states, strict=True):
            with torch.no_grad():
                logits = replay.head(batch, replay.load(state))
                expected = stock(batch.ids, token_type_ids=batch.kinds).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
