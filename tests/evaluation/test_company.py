"""An example's result does not depend on the examples that it is evaluated with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowrank_compress.calibration.examples import example_batches
from lowrank_compress.calibration.sources import Examples
from lowrank_compress.evaluation.replayed import walked
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from tests.tiny import BOS, CASES, save_tiny

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
        for walk in walked(skeleton, batches):
            for number, batch in enumerate(walk.batches):
                with torch.no_grad():
                    logits = walk.head(number, walk.leaving(number))
                found |= dict(zip(map(tuple, batch.ids.tolist()), logits, strict=True))
        for text in EXAMPLES.texts:
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                expected = stock(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(found[tuple(ids)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_pairs_are_what_transformers_makes_of_them(model_type: str, tmp_path: Path) -> None:
    """BERT tells the sentences of a pair apart by token types; decoders have none, whatever the tokenizer says."""
    path = save_tiny(model_type, tmp_path / "model", "classification")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(path, model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", BOS)]
    )
    pairs = Examples(["the fox", "a dog", "the fox"], ["0", "1", "2"], ["jumps over", "it is lazy", "jumps"])
    found = {}
    batches = example_batches(tokenizer, pairs, {"0": 0, "1": 1, "2": 2}, 64, 2)
    skeleton = Skeleton(Checkpoint(path), torch.device("cpu"), torch.float32)
    for walk in walked(skeleton, batches):
        for number, batch in enumerate(walk.batches):
            with torch.no_grad():
                logits = walk.head(number, walk.leaving(number))
            found |= dict(zip(map(tuple, batch.ids.tolist()), logits, strict=True))
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for first, second in zip(pairs.texts, pairs.seconds or (), strict=True):
        given = tokenizer(first, second, return_tensors="pt")
        assert given["token_type_ids"].max() == 1
        if model_type not in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
            del given["token_type_ids"]
        with torch.no_grad():
            expected = stock(**given).logits[0]
        torch.testing.assert_close(found[tuple(given["input_ids"][0].tolist())], expected, rtol=1e-4, atol=1e-5)
