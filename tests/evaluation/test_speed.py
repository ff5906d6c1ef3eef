from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_compress.errors import InputError
from lowrank_compress.evaluation import speed
from lowrank_compress.evaluation.contestant import Settings, random_prompts
from lowrank_compress.evaluation.rounds import alternate, compare, orders
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.evaluation.speed import benchmark
from lowrank_compress.model.checkpoint import Checkpoint
from tests.tiny import MODELS, save_tiny

pytestmark = pytest.mark.versions

FEW = Settings(batch_sizes=(1, 2), prompt_tokens=(3, 6), new_tokens=2, rounds=2)


def clock() -> Callable[[], float]:
    """A clock by which everything takes a second."""
    ticks = count()
    return lambda: float(next(ticks))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    place = tmp_path_factory.mktemp("pair")
    dense = Checkpoint(save_tiny("llama", place / "dense"))
    return {"dense": dense, "small": Checkpoint(save_tiny("llama", place / "small", intermediate_size=24))}


@pytest.fixture(scope="module")
def result(pair: dict[str, Checkpoint]) -> dict[str, Any]:
    return benchmark(pair, FEW, clock=clock())


def test_every_round_begins_with_the_next_model():
    assert orders("abc", 4) == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_models_are_measured_in_turn_and_the_first_round_does_not_count():
    asked: list[str] = []
    steps: list[tuple[int, int]] = []

    def measure(name: str) -> dict[str, float]:
        asked.append(name)
        return {"decode": float(len(asked))}

    samples = alternate(["a", "b"], 2, measure, lambda done, total: steps.append((done, total)))
    assert asked == list("abbaab")
    assert samples == {"a": [{"decode": 4.0}, {"decode": 5.0}], "b": [{"decode": 3.0}, {"decode": 6.0}]}
    assert steps == [(done, 6) for done in range(1, 7)]


def test_ratios_are_of_the_same_round():
    # The machine slows down tenfold after the first round: medians of each model alone would give 10 / 20.
    rates = {"base": [{"decode": 100.0}, {"decode": 10.0}, {"decode": 20.0}]}
    rates["target"] = [{"decode": 150.0}, {"decode": 20.0}, {"decode": 10.0}]
    found = compare(rates, "base")
    assert found["target"]["decode"]["ratio"] == {"median": 1.5, "min": 0.5, "max": 2.0}
    assert found["target"]["decode"]["tokens_per_second"] == 20.0
    assert found["target"]["decode"]["samples"] == [150.0, 20.0, 10.0]
    assert found["base"]["decode"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_structure(result: dict[str, Any], pair: dict[str, Checkpoint]):
    assert result["task"] == "lm"
    assert result["base"] == "dense"
    assert result["threads"] == torch.get_num_threads()
    assert result["memory"] == "weights and KV cache, computed"
    assert [(row["batch_size"], row["prompt_tokens"]) for row in result["measurements"]] == [
        (1, 3), (1, 6), (2, 3), (2, 6),
    ]  # fmt: skip
    for row in result["measurements"]:
        for name, values in row["models"].items():
            # Every phase takes a second by this clock.
            assert values["prefill"]["samples"] == [row["batch_size"] * row["prompt_tokens"]] * 2
            assert values["decode"]["samples"] == [row["batch_size"] * 2] * 2
            assert values["decode"]["of_limit"] == 1 / result["models"][name]["limit"]
            model = result["models"][name]
            tokens = row["batch_size"] * (row["prompt_tokens"] + 2)
            assert values["memory_bytes"] == model["weights_bytes"] + tokens * model["kv_bytes_per_token"]
    assert result["models"]["dense"]["path"] == str(pair["dense"].path)


def test_a_token_reads_everything_but_the_embedding(result: dict[str, Any], pair: dict[str, Checkpoint]):
    for name, checkpoint in pair.items():
        size, found = measure_size(checkpoint), result["models"][name]
        assert found["weights_bytes"] == size.bytes
        assert found["read_bytes_per_token"] == size.bytes - 96 * 32 * 4
    dense, small = (result["models"][name]["read_bytes_per_token"] for name in ("dense", "small"))
    assert result["models"]["small"]["limit"] == dense / small
    assert result["models"]["dense"]["limit"] == 1


@pytest.mark.parametrize("case", [case for case, (_, task, _) in MODELS.items() if task == "lm"])
def test_every_language_model(case: str, tmp_path: Path):
    model_type, _, overrides = MODELS[case]
    checkpoint = Checkpoint(save_tiny(model_type, tmp_path, **overrides))
    settings = Settings(batch_sizes=(2,), prompt_tokens=(5,), new_tokens=2, rounds=1)
    found = benchmark({"model": checkpoint}, settings)["models"]["model"]
    size = measure_size(checkpoint)
    assert found["kv_bytes_per_token"] == size.kv_bytes_per_token
    assert found["weights_bytes"] == size.bytes
    tied = bool(checkpoint.config.tie_word_embeddings)
    if model_type == "llama":
        assert (found["read_bytes_per_token"] == size.bytes) == tied


def test_the_cache_is_that_of_a_config_with_grouped_keys(tmp_path: Path):
    checkpoint = Checkpoint(save_tiny("llama", tmp_path, dtype=torch.bfloat16))
    found = benchmark({"model": checkpoint}, FEW, clock=clock())["models"]["model"]
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes


def test_all_models_get_the_same_prompts(pair: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch):
    seen: dict[int, list[torch.Tensor]] = {}
    original = speed.Contestant.measure

    def measure(self: speed.Contestant, ids: torch.Tensor) -> dict[str, float]:
        seen.setdefault(id(self), []).append(ids)
        return original(self, ids)

    monkeypatch.setattr(speed.Contestant, "measure", measure)
    benchmark(pair, FEW)
    first, second = seen.values()
    assert len(first) == len(second) == 4 * (1 + 1 + FEW.rounds)  # preparing, warming up, rounds
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_prompts_depend_on_the_seed_and_stay_within_the_vocabulary():
    one = random_prompts(96, 8, 64, seed=0)
    assert one.shape == (8, 64)
    assert 0 <= one.min() < one.max() < 96
    assert torch.equal(one, random_prompts(96, 8, 64, seed=0))
    assert not torch.equal(one, random_prompts(96, 8, 64, seed=1))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic cache", "static cache"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_that_of_generate(
    pair: dict[str, Checkpoint], batch: int, static: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)  # takes minutes, and changes no token
    contestant = speed.Contestant(pair["dense"], "lm", Settings(new_tokens=6, compile=static, attention="sdpa"))
    ids = random_prompts(96, batch, 9, seed=3)
    with torch.inference_mode():
        contestant.prepare(ids)
    taken: list[torch.Tensor] = []
    original = contestant._next
    contestant._next = lambda *arguments: taken.append(original(*arguments)) or taken[-1]
    with torch.inference_mode():
        contestant.measure(ids)
        # With a mask of ones: `generate` takes random ids that happen to be the padding token for padding.
        expected = contestant.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7, min_new_tokens=7
        )
    assert torch.equal(torch.cat(taken, 1), expected[:, 9:])


def test_classifiers_are_read_only(tmp_path: Path):
    checkpoint = Checkpoint(save_tiny("bert", tmp_path, "classification"))
    found = benchmark({"bert": checkpoint}, FEW, clock=clock())
    assert found["task"] == "classification"
    assert found["settings"]["new_tokens"] == 0
    assert found["models"]["bert"]["kv_bytes_per_token"] == 0
    for row in found["measurements"]:
        assert set(row["models"]["bert"]) == {"forward", "memory_bytes"}


def test_lengths_are_checked_before_any_work(pair: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "Contestant", None)
    with pytest.raises(InputError, match="150 prompt tokens and 11 new ones are more than the 160 positions of dense"):
        benchmark(pair, Settings(prompt_tokens=(8, 150), new_tokens=11))


def test_models_without_sdpa(pair: dict[str, Checkpoint], tmp_path: Path):
    models = pair | {"other": Checkpoint(save_tiny("gemma2", tmp_path))}
    settings = Settings(batch_sizes=(1,), prompt_tokens=(3,), new_tokens=1, rounds=1)
    assert benchmark(models, settings)["settings"]["attention"] == "eager"
    assert speed.check(pair, settings)[1].attention == "sdpa"
    with pytest.raises(InputError, match="no sdpa attention for other"):
        benchmark(models, replace(settings, attention="sdpa"))


def test_kinds_do_not_mix(pair: dict[str, Checkpoint], tmp_path: Path):
    other = Checkpoint(save_tiny("llama", tmp_path, "classification"))
    with pytest.raises(InputError, match=r"dense \(lm\), other \(classification\)"):
        benchmark({"dense": pair["dense"], "other": other}, FEW)


def test_threads_are_pinned_and_put_back(pair: dict[str, Checkpoint]):
    before = torch.get_num_threads()
    found = benchmark(pair, Settings(batch_sizes=(1,), prompt_tokens=(3,), new_tokens=1, rounds=1, threads=2))
    assert found["threads"] == 2
    assert torch.get_num_threads() == before
