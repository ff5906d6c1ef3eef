"""`lrc diagnose`: the spectra that it prints, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_compress
from lowrank_compress.linalg.spectra import (
    effective_rank,
    matrix_entropy,
    matrix_nuclear_norm,
    singular_values,
    stable_rank,
)
from tests.runs import Tiny, contents, done, refused
from tests.tiny import save_tiny

Finished = Callable[[str], Path]


def test_every_matrix_of_a_dense_model(tiny: Tiny) -> None:
    found = done("diagnose", tiny.model, "--json").json
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert len(found["matrices"]) == 14
    for name, said in found["matrices"].items():
        weight = model.get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(weight.double())
        assert said["shape"] == list(weight.shape)
        assert said["rank"] == min(weight.shape)
        assert said["spectral_norm"] == pytest.approx(float(values[0]))
        assert said["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert said["stable_rank"] == pytest.approx(stable_rank(values))
        assert said["effective_rank"] == pytest.approx(effective_rank(values))
    assert found["blocks"] == []
    assert lowrank_compress.diagnose(tiny.model) == found


def test_a_compressed_model_is_multiplied_out(pristine: Finished, tiny: Tiny) -> None:
    run = pristine("svd")
    before = contents(run)
    found = done("diagnose", run, "--base", tiny.model, "--top", 3, "--json").json
    report = done("show", run, "--json").json["matrices"]
    for name, said in found["matrices"].items():
        if report[name]["rank"] is not None:
            assert said["rank"] == report[name]["rank"]
        # A plain truncated SVD keeps the leading vectors: there is no intruder.
        assert said["intruders"] == []
        assert min(said["cosines"]) > 1 - 1e-5
    assert contents(run) == before
    said = done("diagnose", run, "--base", tiny.model, "--top", 3)
    assert "0 of 3" in said.out
    assert "Intruders: of the leading 3 left singular vectors" in said.out


def test_another_model_as_its_base_has_intruders(tiny: Tiny, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=5)
    found = done("diagnose", other, "--base", tiny.model, "--epsilon", 0.99, "--json").json
    assert all(len(said["intruders"]) == 10 for said in found["matrices"].values())


def test_representations_are_those_of_the_whole_model(tiny: Tiny) -> None:
    options = ("--text", tiny.heldout, "--seq-len", 24, "--limit", 3)
    found = done("diagnose", tiny.model, *options, "--json").json["blocks"]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    ids = tokenizer(tiny.heldout.read_text(), add_special_tokens=False)["input_ids"]
    windows = [[tokenizer.bos_token_id, *ids[start : start + 23]] for start in (0, 23, 46)]
    seen: list[list[torch.Tensor]] = [[], []]
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, args, out, number=number: seen[number].append(out[0]))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for number, said in enumerate(found):
        entropies = [matrix_entropy(states) for states in seen[number]]
        assert said["block"] == number
        assert said["matrix_entropy"] == pytest.approx(sum(entropies) / 3, rel=1e-4)
        norms = [matrix_nuclear_norm(states) for states in seen[number]]
        assert said["matrix_nuclear_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4)
        exact = [matrix_nuclear_norm(states, exact=True) for states in seen[number]]
        assert said["nuclear_norm"] == pytest.approx(sum(exact) / 3, rel=1e-4)
        stable = [stable_rank(singular_values(states - states.mean(0))) for states in seen[number]]
        assert said["stable_rank"] == pytest.approx(sum(stable) / 3, rel=1e-4)
    assert "Matrix Nuclear-Norm" in done("diagnose", tiny.model, *options).out


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_heads_that_talk_loudest(model_type: str, tmp_path: Path) -> None:
    """Against whole products of every pair of heads of the two blocks."""
    path = save_tiny(model_type, tmp_path / "model")
    found = done("diagnose", path, "--channels", 3, "--json").json["channels"]
    model: Any = AutoModelForCausalLM.from_pretrained(path).double()
    heads = []
    for block in range(2):
        if model_type == "llama":
            attention = model.model.layers[block].self_attn
            q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
            keys = 2
        else:
            attention = model.transformer.h[block].attn
            q, k, v = attention.c_attn.weight.T.split(32)
            o, keys = attention.c_proj.weight.T, 4
        parts = []
        for head in range(4):
            shared = head // (4 // keys)
            rows, own = slice(8 * shared, 8 * shared + 8), slice(8 * head, 8 * head + 8)
            parts.append((q[own].T @ k[rows], o[:, own] @ v[rows]))
        heads.append(parts)
    scores = {}
    for a in range(4):
        for b in range(4):
            written = heads[0][a][1]
            for reads, form in (("q", heads[1][b][0].T), ("k", heads[1][b][0]), ("v", heads[1][b][1])):
                scores[a, b, reads] = float((form @ written).norm() / (form.norm() * written.norm()))
    best = sorted(scores.items(), key=lambda entry: -entry[1])[:3]
    assert [(each["from"]["head"], each["to"]["head"], each["to"]["reads"]) for each in found["pairs"]] == [
        place for place, _ in best
    ]
    assert [each["score"] for each in found["pairs"]] == pytest.approx([score for _, score in best], rel=1e-4)
    assert all(each["from"]["block"] == 0 and each["to"]["block"] == 1 for each in found["pairs"])
    ends = found["channels"][0]
    u = torch.linalg.svd(heads[0][ends["from"]["head"]][1])[0][:, ends["from"]["direction"]]
    form = heads[1][ends["to"]["head"]][ends["to"]["reads"] == "v"]
    left, _, right = torch.linalg.svd(form)
    reads = left[:, ends["to"]["direction"]] if ends["to"]["reads"] == "q" else right[ends["to"]["direction"]]
    assert abs(float(u @ reads)) == pytest.approx(ends["cosine"], rel=1e-4)
    assert found["unrelated"] == pytest.approx(32**-0.5)
    assert done("diagnose", path, "--channels", 0, "--json").json["channels"] is None


def test_what_cannot_be_diagnosed(tiny: Tiny, tmp_path: Path) -> None:
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=3)
    assert "have different numbers of blocks" in refused("diagnose", tiny.model, "--base", deeper)
    assert "--seq-len 161 is more than" in refused("diagnose", tiny.model, "--text", tiny.heldout, "--seq-len", 161)
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert "too few tokens to look at" in refused("diagnose", tiny.model, "--text", short)
    assert "epsilon" in refused("diagnose", tiny.model, "--epsilon", 2)
