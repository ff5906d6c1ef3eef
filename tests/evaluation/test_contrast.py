"""Two models side by side, one block of each in memory, against both whole in memory with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_compress.calibration.windows import evaluation_windows, window_batches
from lowrank_compress.errors import NumericsError
from lowrank_compress.evaluation.contrast import contrast
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from tests.ordinary import load, padded, tokens
from tests.tiny import MODELS, tiny_model

CPU = torch.device("cpu")
TEXT = tokens(70, seed=7)[0]


def pair(case: str, place: Path) -> tuple[Path, Path]:
    """A model, and one that is near it."""
    model_type, task, fields = MODELS[case]
    model: Any = tiny_model(model_type, task, **fields)
    model.save_pretrained(place / "a")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(place / "b")
    return place / "a", place / "b"


def blocks_of(model: Any) -> list[Any]:
    (found,) = (
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.split(".")[-1] in ("layers", "layer", "h")
    )
    return list(found)


class Seen:
    """What a model's blocks are called with and return, and its logits."""

    def __init__(self, model: Any, **given: Tensor) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.out: list[Tensor] = []
        handles = []
        for block in blocks_of(model):
            handles.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
                )
            )
            handles.append(block.register_forward_hook(lambda _, args, out: self.out.append(out)))
        with torch.no_grad():
            self.logits = model(**given).logits
        for handle in handles:
            handle.remove()


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """‖h' − h‖ / ‖h‖ of all tokens of all windows."""
    one, other = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*pairs, strict=True))
    return float((other - one).norm() / one.norm())


@pytest.mark.parametrize("case", ["llama-lm", "gpt2-lm", "gemma2-lm"])
def test_equals_whole_models(case: str, tmp_path: Path) -> None:
    paths = pair(case, tmp_path)
    windows = evaluation_windows(TEXT, 20, 1)
    said: list[tuple[int, int]] = []
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in paths)
    found = contrast(one, other, window_batches(windows, 2), lambda *done: said.append(done), head_tokens=7)
    models = [load(path, "lm") for path in paths]
    seen = [
        [Seen(model, input_ids=window[None], use_cache=torch.tensor(False)) for model in models] for window in windows
    ]
    for number, block in enumerate(blocks_of(models[1])):
        assert found.blocks[number].error.relative == pytest.approx(
            relative([(a.out[number], b.out[number]) for a, b in seen]), rel=1e-10
        )
        alone = []
        for a, _ in seen:
            args, kwargs = a.calls[number]
            with torch.no_grad():
                alone.append((a.out[number], block(*args, **kwargs)))
        assert found.blocks[number].own.relative == pytest.approx(relative(alone), rel=1e-10)
        cosines = [torch.cosine_similarity(a.out[number], b.out[number], dim=-1).flatten() for a, b in seen]
        assert found.blocks[number].error.cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-10)
    entering = [(_first(a), _first(b)) for a, b in seen]
    assert found.embedding.relative == pytest.approx(relative(entering), rel=1e-10)
    assert found.blocks[0].own.relative != pytest.approx(found.blocks[0].error.relative, rel=1e-3)
    divergence, agreeing, count = 0.0, 0, 0
    for number, (window, (a, b)) in enumerate(zip(windows, seen, strict=True)):
        p, q = (each.logits[0, :-1].log_softmax(-1) for each in (a, b))
        divergence += float((p.exp() * (p - q)).sum())
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
        for model, logs in enumerate((p, q)):
            nats = -float(logs.gather(1, window[1:, None]).sum())
            assert found.nats[model][number] == pytest.approx(nats, rel=1e-10)
    assert found.divergence == pytest.approx(divergence, rel=1e-9)
    assert (found.agreeing, found.positions) == (agreeing, count)
    assert found.tokens == [len(window) - 1 for window in windows]
    blocks = len(blocks_of(models[0]))
    assert said == [(done, blocks) for done in range(1, blocks + 1)]


def _first(seen: Seen) -> Tensor:
    args, kwargs = seen.calls[0]
    return args[0] if args else kwargs["hidden_states"]


def test_several_passes_do_not_matter(tmp_path: Path) -> None:
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in pair("llama-lm", tmp_path))
    batches = window_batches(evaluation_windows(TEXT, 20, 1), 1)
    whole = contrast(one, other, batches)
    found = contrast(one, other, batches, carried=2 * 20 * 32 * 8)
    assert found.blocks[1].error.relative == pytest.approx(whole.blocks[1].error.relative, rel=1e-12)
    assert found.nats == (pytest.approx(whole.nats[0]), pytest.approx(whole.nats[1]))


def test_a_model_with_itself(tmp_path: Path) -> None:
    path, _ = pair("llama-lm", tmp_path)
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float32) for _ in range(2))
    found = contrast(one, other, [Batch(TEXT[None])])
    assert [block.error.relative for block in found.blocks] == [0.0, 0.0]
    assert (found.divergence, found.agreeing) == (0.0, found.positions)
    assert found.blocks[0].error.cosine == pytest.approx(1)


def test_padding_of_classifiers_counts_for_nothing(tmp_path: Path) -> None:
    paths = pair("bert-classification", tmp_path)
    sequences = tokens(9, 12, 7, 15, seed=3)
    labels = torch.tensor([0, 1, 2, 1])
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float64) for path in paths)
    ids, mask = padded(sequences)
    found = contrast(one, other, [Batch(ids, mask, labels)])
    models = [load(path, "classification") for path in paths]
    seen = [[Seen(model, input_ids=ids[None]) for model in models] for ids in sequences]
    for number in range(2):
        assert found.blocks[number].error.relative == pytest.approx(
            relative([(a.out[number], b.out[number]) for a, b in seen]), rel=1e-6
        )
    logs = [[each.logits[0].log_softmax(-1) for each in both] for both in seen]
    assert found.tokens == [1] * 4
    for model in (0, 1):
        assert found.right[model] == [
            bool(both[model].argmax() == label) for both, label in zip(logs, labels, strict=True)
        ]
        expected = [-float(both[model][label]) for both, label in zip(logs, labels, strict=True)]
        assert found.nats[model] == pytest.approx(expected, rel=1e-6)
    assert found.divergence == pytest.approx(sum(float((p.exp() * (p - q)).sum()) for p, q in logs), rel=1e-5)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    one, other = (Skeleton(Checkpoint(path), CPU, torch.float32) for path in pair("llama-lm", tmp_path))
    head: Any = other.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor(1), torch.inf))
    with pytest.raises(NumericsError, match="The second model gave NaN or infinite logits on the text"):
        contrast(one, other, [Batch(TEXT[None])])
