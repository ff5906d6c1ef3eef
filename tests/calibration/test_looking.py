"""What a module sees in a block, and where what it emits is added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lowrank_compress.calibration.looking import look, place_of
from lowrank_compress.calibration.pairs import PairSums
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.model.walk.step import Step
from lowrank_compress.model.walk.walk import Walk
from tests.tiny import MODELS, save_tiny

# Of attention's output and of the MLP's: below a block, "" for what leaves it.
PLACES = {
    "llama-lm": ("post_attention_layernorm", ""),
    "gpt2-lm": ("ln_2", ""),
    "gpt_neox-lm": ("", ""),  # parallel
    "gpt_neox-sequential": ("post_attention_layernorm", ""),
    "opt-lm": ("final_layer_norm", ""),
    "opt-norm-after": ("self_attn_layer_norm", "final_layer_norm"),
    "bert-classification": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert-classification": ("sa_layer_norm", "output_layer_norm"),
    # Normalised before it is added: what enters that norm is the output alone.
    "gemma2-lm": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def batches() -> list[Batch]:
    ids = torch.randint(4, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    return [Batch(ids[:2]), Batch(ids[2:], first=2)]


@contextmanager
def step_of(name: str, place: Path) -> Iterator[tuple[Skeleton, Step]]:
    kind, task, overrides = MODELS[name]
    skeleton = Skeleton(Checkpoint(save_tiny(kind, place, task, **overrides)), torch.device("cpu"), torch.float32)
    walk = Walk([skeleton], batches()).forwards()
    next(walk)
    yield skeleton, next(walk)
    walk.close()


@pytest.mark.parametrize("name", PLACES)
def test_the_stream_is_found_and_its_parts_add_up(name: str, tmp_path: Path):
    with step_of(name, tmp_path) as (skeleton, step):
        prefix = f"{skeleton.resolved.blocks[1]}."
        modules = {t.role: t.module.removeprefix(prefix) for t in skeleton.resolved.of_block(1)}
        assert tuple(place_of(step, 0, 0, modules[role]) for role in ("o", "down")) == PLACES[name]
        seen = look(step, 0, 0, modules["o"], PLACES[name][0])
        assert seen.y is not None
        assert seen.total is not None
        rest = seen.total - seen.y
        if name == "gemma2-lm":
            assert not rest.any()
        elif name != "gpt_neox-lm":  # there the MLP's output is a part of it
            torch.testing.assert_close(rest, step.entering(0))


def test_a_look_sees_what_hooks_on_a_whole_run_see(tmp_path: Path):
    with step_of("llama-lm", tmp_path) as (_, step):
        block = step.blocks[0]
        seen = {}
        handle = block.get_submodule("mlp.down_proj").register_forward_hook(
            lambda _, args, out: seen.update(x=args[0], y=out)
        )
        leaving = step.call(1, step.entering(1))
        handle.remove()
        alone, whole = (look(step, 1, 0, "mlp.down_proj", place) for place in (None, ""))
        assert look(step, 1, 0, "mlp.down_proj", outputs=False).y is None
        for found in (alone, whole):
            torch.testing.assert_close(found.x, seen["x"])
            torch.testing.assert_close(found.y, seen["y"])
        assert alone.total is None
        torch.testing.assert_close(whole.total, leaving)
        ran = look(step, 1, 0, "mlp.down_proj", None, run=True)
        torch.testing.assert_close(ran.x, seen["x"])
        with pytest.raises(ValueError, match="has left block 1"):
            step.entering(1)


def test_sums_over_halves_leave_padding_out_and_do_not_depend_on_batches():
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(5, 4, size, generator=generator) for size in (3, 2))
    mask = torch.ones(5, 4, dtype=torch.int64)
    mask[3, 2:] = 0
    ids = torch.zeros(5, 4, dtype=torch.int64)
    found = []
    for cuts in ([5], [2, 3], [1, 1, 1, 1, 1]):
        sums, start = PairSums(), 0
        for size in cuts:
            part = slice(start, start + size)
            sums.add(Batch(ids[part], mask[part], first=start), x[part], t[part])
            start += size
        found.append(sums.samples())
    for half in range(2):
        real = mask[half::2].bool()
        rows, wanted = x[half::2][real].double(), t[half::2][real].double()
        for samples in found:
            sample = samples[half]
            assert sample.count == len(rows)
            torch.testing.assert_close(sample.gram, rows.mT @ rows, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample.cross, wanted.mT @ rows, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample.inputs, rows.sum(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sample.targets, wanted.sum(0), rtol=1e-5, atol=1e-5)
