"""Text that a model writes by itself: what it begins with, that it is drawn from its predictions, that it repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_compress.artifacts.hashes import cache_directory
from lowrank_compress.calibration import own
from lowrank_compress.calibration.own import bytes_to_write, own_windows, rows_of, sampled, start_of
from lowrank_compress.errors import InputError
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.stages import samples
from tests.runs import Tiny, done, refused, results
from tests.tiny import BOS, EOS, save_tiny, tiny_model, tiny_text, tiny_tokenizer

TEMPLATE = "{% for turn in messages %}the {{ turn.role }}, {{ turn.content }}.{% endfor %}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(model: Path, count: int, first: int = 0, **more: Any) -> torch.Tensor:
    given: dict[str, Any] = {"seq_len": 12, "seed": 0, "device": "cpu"} | more
    tokenizer = AutoTokenizer.from_pretrained(model)
    return own_windows(Checkpoint(model), tokenizer, "id", first=first, count=count, **given)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "gpt_bigcode"])
def test_each_token_is_drawn_from_what_the_model_predicts(model_type: str) -> None:
    """With the cache as without one."""
    model = tiny_model(model_type)
    ids = torch.full((3, 1), BOS)
    *_, found = sampled(model, ids, 10, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    while ids.shape[1] < 10:
        with torch.no_grad():
            chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    assert torch.equal(found, ids)


def test_frequencies_are_the_predictions() -> None:
    model = tiny_model("llama")
    *_, found = sampled(model, torch.full((20_000, 1), BOS), 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        chances = model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    shares = found[:, 1].bincount(minlength=len(chances)) / len(found)
    assert (shares - chances).abs().max() < 0.01


def test_windows_do_not_depend_on_how_many_are_asked_for(tiny: Tiny, cache: Path) -> None:
    all_of_them = written(tiny.model, 40)
    assert all_of_them.shape == (40, 12)
    assert (all_of_them[:, 0] == BOS).all()
    assert torch.equal(written(tiny.model, 3, first=31), all_of_them[31:34])
    assert len({tuple(row) for row in all_of_them.tolist()}) == 40
    assert not torch.equal(written(tiny.model, 3, seed=1), all_of_them[:3])


def test_as_many_windows_at_once_as_keys_and_values_have_room(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny.model)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(tiny.model)(torch.full((1, 12), BOS)).past_key_values
    weights = sum(tensor.numel() for tensor in load_file(tiny.model / "model.safetensors").values())
    window = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    for tokens, held, rows in ((48, 10 * window, 10), (48, 3 * window, 4), (0, window // 2, 1), (10**9, window, 32)):
        monkeypatch.setattr(own, "TOKENS", tokens)
        monkeypatch.setattr(own, "CACHED_BYTES", held)
        assert rows_of(checkpoint, 12) == rows
        assert bytes_to_write(checkpoint, 12) == 4 * weights + rows * window


def test_what_is_there_is_used_again_and_what_is_not_is_made_anew(
    tiny: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tiny.model, 40)
    directory = cache_directory()
    assert directory is not None
    files = sorted((directory / "own").iterdir())
    assert len(files) == 2  # of 32 windows each
    files[1].write_bytes(files[1].read_bytes()[:-4])  # as a crash of the machine may leave it
    told: list[tuple[str, int, int]] = []
    assert torch.equal(written(tiny.model, 40, advance=lambda *said: told.append(said)), whole)
    assert told == [("write text", number, 11) for number in range(1, 12)]
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert torch.equal(written(tiny.model, 40), whole)
    (cache / "elsewhere").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "elsewhere"))
    assert torch.equal(written(tiny.model, 40), whole)


def test_what_a_text_begins_with(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "model", bos=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert start_of(tokenizer, Checkpoint(path)) == [BOS]  # config.json has it
    tokenizer.chat_template = TEMPLATE
    begun = start_of(tokenizer, Checkpoint(path))
    assert tokenizer.decode(begun) == "the user, "
    with pytest.raises(InputError, match=f"the {len(begun)} tokens of its chat template; --seq-len {len(begun)}"):
        own_windows(Checkpoint(path), tokenizer, "", seq_len=len(begun), first=0, count=1, seed=0, device="cpu")
    with_bos = tiny_tokenizer(tmp_path / "with")
    with_bos.chat_template = TEMPLATE
    assert start_of(with_bos, Checkpoint(path)) == [BOS]
    other = save_tiny("llama", tmp_path / "other", bos=False, bos_token_id=None)
    plain = AutoTokenizer.from_pretrained(other, bos_token=None)
    assert start_of(plain, Checkpoint(other)) == [EOS]
    none = save_tiny("llama", tmp_path / "none", bos=False, bos_token_id=None, eos_token_id=None)
    bare = AutoTokenizer.from_pretrained(none, bos_token=None, eos_token=None)
    with pytest.raises(InputError, match="no bos or eos token and no chat template"):
        start_of(bare, Checkpoint(none))


def test_a_model_that_does_not_fit_is_refused(tiny: Tiny, cache: Path) -> None:
    with pytest.raises(InputError, match=r"has the whole model in memory, .* Name a text, which needs one block"):
        written(tiny.model, 1, memory=100_000)


@pytest.mark.slow
def test_from_end_to_end_alone_and_in_a_mixture(tiny: Tiny, tmp_path: Path, cache: Path) -> None:
    base = ["compress", tiny.model, "--ratio", "0.3", "--samples", "16", "--seq-len", "24"]
    own = ["--method", "kfac", "--calibration", "self"]
    first = done(*base, *own, "--out", tmp_path / "run")
    assert "write text: done (2" in first.text
    again = tmp_path / "again"
    done(*base, *own, "--out", again)
    assert results(again) == results(tmp_path / "run")
    (text,) = done("show", again, "--json").json["texts"]
    assert (text["text"], text["windows"], text["tokens"]) == ("self", 16, 16 * 24)
    mixed = tmp_path / "mixed"
    done(*base, "--calibration", f"{tiny.text}:3", "--calibration", "self", "--out", mixed)
    texts = done("show", mixed, "--json").json["texts"]
    assert [(each["text"], each["windows"]) for each in texts] == [("calibration.txt", 12), ("self", 4)]
    done("eval", mixed, "--perplexity", tiny.heldout)
    done("recover", mixed, "--steps", "1", "--lr", "1e-4")


def test_half_of_the_text_where_none_is_named(
    tiny: Tiny, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "PAPERS_DATA", str(tiny.text))  # in place of a data set of the hub
    run, again = tmp_path / "run", tmp_path / "again"
    asked = ["compress", tiny.model, "--method", "svd-llm", "--ratio", "0.3", "--samples", "16", "--seq-len", "24"]
    done(*asked, "--out", run)
    texts = done("show", run, "--json").json["texts"]
    assert [(each["text"], each["windows"]) for each in texts] == [("calibration.txt", 8), ("self", 8)]
    assert "is there already" in done(*asked, "--out", run, "-v").text
    # What the run says of itself repeats it, wherever the default changes.
    monkeypatch.setattr(samples, "PAPERS_DATA", "nothing")
    done("compress", "--config", run / "recipe.yaml", "--out", again)
    assert results(again) == results(run)


def test_a_classifier_writes_none(tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "model", "classification")
    (tmp_path / "text.txt").write_text(tiny_text(2000))
    for words in (["self"], [tmp_path / "text.txt", "--calibration", "self:2"]):
        options = ["--method", "svd-llm", "--calibration", *words, "--out", tmp_path / "run"]
        assert "samples text from a language model, and this model writes none" in refused("compress", model, *options)
    assert not (tmp_path / "run").exists()
