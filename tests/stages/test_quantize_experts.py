"""`lrc quantize` of mixtures: every matrix of every routed expert, by what that expert sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_compress.calibration.layers import LayerMoments, layer_moments
from lowrank_compress.evaluation.size import measure_size
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.skeleton import Skeleton
from lowrank_compress.model.walk.batch import Batch
from lowrank_compress.shipped.packed import PackedLinear
from lowrank_compress.stages.layers import Layer, layers_of
from lowrank_compress.stages.quantizeconfig import QuantizeConfig
from lowrank_compress.stages.thin import made_up, thin_experts
from tests.moe import MOE, Watched, expert_statistics, save_choosy, save_moe
from tests.ordinary import padded, tokens
from tests.runs import FEW, Tiny, contents, cut_after_a_block, done, lrc, refused
from tests.stages.test_quantize import logits, logits_by_remote_code, quantize, require_saved_and_loaded

FAMILIES = [family for family in MOE if family != "gpt_oss"]  # whose experts have biases, and lie otherwise
ROLES = {"lr_gating": "gate", "lr_up": "up", "lr_down": "down"}


def made(target: Path, out: Path, tiny: Tiny, *options: object) -> dict[str, Any]:
    return quantize(target, *options, "--calibration", tiny.text, *FEW, "--out", out)["quantize"]


def with_weights_of(other: PreTrainedModel, packed: PreTrainedModel) -> PreTrainedModel:
    """Put what packed layers stand for into another model, where experts may lie in the tensors of all of a block."""
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            place, _, leaf = path.rpartition(".")
            experts: Any = other.get_submodule(place.rpartition(".")[0]) if leaf in ROLES else None
            if not isinstance(getattr(experts, "down_proj", None), nn.Parameter):
                other.get_submodule(path).get_parameter("weight").data.copy_(module.dense())
                continue
            width, number = experts.down_proj.shape[2], int(place.rpartition(".")[2])
            rows = {"lr_gating": slice(width), "lr_up": slice(width, None)}
            whole = experts.gate_up_proj[number][rows[leaf]] if leaf in rows else experts.down_proj[number]
            whole.data.copy_(module.dense())
    return other


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_computes_what_the_dense_one_does_with_the_same_weights(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    source, out = save_moe(family, tmp_path / family), tmp_path / "four"
    said = made(source, out, tiny, "--bits", 4, "--asymmetric")
    size, before = measure_size(Checkpoint(out)), measure_size(Checkpoint(source))
    assert size.block_bytes == said["stored_bytes"] == said["layer_bytes"] + before.block_bytes - 4 * said["weights"]
    assert size.blocks == before.blocks
    assert said["stored_bytes"] < 0.25 * said["original_bytes"]
    assert size.bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    packed, dense = (AutoModelForCausalLM.from_pretrained(each) for each in (out, source))
    report = json.loads((out / "lowrank.json").read_text())["quantize"]
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(report["layers"])
    unlike = logits(dense)
    assert torch.allclose(logits(with_weights_of(dense, packed)), logits(packed), atol=1e-5)
    assert 1e-3 < (logits(packed) - unlike).norm() / unlike.norm() < 0.5
    done("export", out, "--dense", tmp_path / "dense")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(packed), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_symmetric_ones_are_stock_checkpoints(tmp_path: Path, family: str) -> None:
    """With groups of 8 that all columns of these experts have; and one scale for each row."""
    source = save_moe(family, tmp_path / family, torch.bfloat16)
    for group in (8, 0):
        out, dense = tmp_path / f"out-{group}", tmp_path / f"dense-{group}"
        said = done("quantize", source, "--rounding", "rtn", "--group", group, "--bits", 5, "--out", out, "--json").json
        settings = json.loads((out / "config.json").read_text())
        assert settings["quantization_config"]["quant_method"] == said["quantize"]["format"] == "compressed-tensors"
        before = set(load_file(source / "model.safetensors"))
        assert {name.replace("weight_packed", "weight") for name in load_file(out / "model.safetensors")} >= before
        assert measure_size(Checkpoint(out)).block_bytes == said["quantize"]["stored_bytes"]
        done("export", out, "--dense", dense)
        expected = AutoModelForCausalLM.from_pretrained(dense)
        assert set(load_file(dense / "model.safetensors")) == before
        pytest.importorskip("compressed_tensors")
        stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(stock), logits(expected))


def test_gpt_oss_is_taken_out_of_its_tensors(tmp_path: Path) -> None:
    """Its experts have biases, lie transposed and by turns, and are stored in one tensor."""
    source, out = save_moe("gpt_oss", tmp_path / "source"), tmp_path / "out"
    said = done("quantize", source, "--rounding", "rtn", "--group", 8, "--out", out, "--json").json["quantize"]
    assert said["format"] == "lowrank"
    assert measure_size(Checkpoint(out)).block_bytes == said["stored_bytes"]
    done("export", out, "--dense", tmp_path / "dense")
    dense, packed, other = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "dense", out, source))
    assert torch.allclose(logits(dense), logits(packed), atol=1e-5)
    assert 1e-3 < (logits(packed) - logits(other)).norm() / logits(other).norm() < 0.5


def test_what_stock_code_would_load_as_something_else_is_ours(tmp_path: Path) -> None:
    """Two kinds of groups, and numbers of more digits than scales have."""
    for dtype, group in ((torch.bfloat16, 16), (torch.float32, 8)):
        source, out = save_moe("olmoe", tmp_path / f"{dtype}", dtype), tmp_path / f"out-{group}"
        done("quantize", source, "--rounding", "rtn", "--group", group, "--out", out)
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        assert (settings["quant_method"], settings["version"]) == ("lowrank", 5)
        assert settings["experts"] == {f"model.layers.{block}.mlp.experts": 4 for block in range(2)}


def moments_of(path: Path, sequences: list[Tensor], *, gradients: bool) -> tuple[list[Layer], dict[str, LayerMoments]]:
    """Those of all layers of all experts, of sequences that are padded if they are of unlike lengths."""
    skeleton = Skeleton(Checkpoint(path), torch.device("cpu"), torch.float64)
    layers = [layer for layer in layers_of(skeleton.blueprint)[0] if layer.expert is not None]
    ids, mask = padded(sequences)
    parts = [(0, 2), (2, len(ids))]
    batches = [Batch(ids[a:b], None if mask.all() else mask[a:b], first=a) for a, b in parts]
    own = [[each.path for each in layers if each.block == block] for block in range(len(skeleton.resolved.blocks))]
    found: dict[str, LayerMoments] = {}
    for _, moments in layer_moments(skeleton, batches, own, gradients=gradients, single=True):
        found |= moments
    return layers, found


@pytest.mark.parametrize(("gradients", "lengths"), [(True, (12, 12, 12)), (False, (11, 16, 5))])
def test_moments_are_those_of_each_experts_own_tokens(
    tmp_path: Path, gradients: bool, lengths: tuple[int, ...]
) -> None:
    source, sequences, total = save_moe("qwen3_moe", tmp_path / "mixture"), tokens(*lengths), sum(lengths)
    traces = Watched(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)).traces(sequences)
    layers, moments = moments_of(source, sequences, gradients=gradients)
    assert len(layers) == 18
    for layer in layers:
        seen, found = traces[layer.path], moments[layer.path]
        x, w = torch.cat([part[0] for part in seen]), torch.cat([part[3] for part in seen])[:, None]
        assert found.tokens == len(x)
        assert found.given == pytest.approx(float(w.sum()) / total)
        if len(x):
            assert found.seen is not None
            assert torch.allclose(found.seen.peaks, x.abs().amax(0), atol=1e-12)
            assert torch.allclose(found.seen.rows.T @ found.seen.rows / len(x), found.gram, atol=1e-12)
        if not gradients:
            assert torch.allclose(found.gram, (w * x).T @ (w * x) / total, atol=1e-12)
            assert found.fisher is None
            continue
        expected = expert_statistics(seen, torch.zeros(layer.shape).double(), ROLES[layer.role], total, total)
        assert found.fisher is not None
        if len(x):
            assert torch.allclose(found.gram, expected["in_gram"], atol=1e-12)
            assert torch.allclose(found.fisher, expected["out_fisher"], atol=1e-12)
        else:
            assert not found.gram.any()


def test_merged_and_factored_experts_see_the_tokens_that_come_to_them(tiny: Tiny, tmp_path: Path) -> None:
    source, sequences = save_moe("mixtral", tmp_path / "mixture"), tokens(12, 12, 12)
    text = ("--calibration", tiny.text, *FEW, "--out")
    done("compress", source, "--method", "svd", "--ratio", 0.5, *text, tmp_path / "svd")
    done("compress", source, "--method", "merge", "--ratio", 0.3, *text, tmp_path / "merge")
    for run in ("svd", "merge"):
        path = tmp_path / run / "model"
        layers, moments = moments_of(path, sequences, gradients=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        seen: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
        for name, own in seen.items():
            model.get_submodule(name).register_forward_hook(lambda _, args, out, own=own: own.append(args[0]))
        for ids in sequences:
            with torch.no_grad():
                model(ids[None])
        for name, each in seen.items():
            x = torch.cat(each)
            assert moments[name].tokens == len(x)
            assert torch.allclose(moments[name].gram, x.T @ x / sum(map(len, sequences)), atol=1e-12)


RUNS = {
    "factored": ("mixtral", ("--ratio", 0.6)),
    "narrowed": ("deepseek_v2", ("--method", "nystrom", "--ratio", 0.3)),
    "pruned": ("mixtral", ("--method", "reap", "--ratio", 0.2)),
    "merged": ("olmoe", ("--method", "merge", "--ratio", 0.3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_experts_of_a_run_are_quantized_as_they_are(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    family, options = RUNS[kind]
    source, run = save_moe(family, tmp_path / family), tmp_path / "run"
    done("compress", source, "--calibration", tiny.text, *FEW, *options, "--out", run)
    said = quantize(run, "--bits", 4)["quantize"]
    out = run / "quantize"
    assert measure_size(Checkpoint(out)).block_bytes == said["stored_bytes"] < 0.3 * said["original_bytes"]
    packed, other = (AutoModelForCausalLM.from_pretrained(each) for each in (out, run / "model"))
    experts = [path for path, each in packed.named_modules() if isinstance(each, PackedLinear) and ".lr_" in path]
    assert len(experts) >= 6
    assert torch.allclose(logits(with_weights_of(other, packed)), logits(packed), atol=1e-5)
    require_saved_and_loaded(packed, tmp_path)
    assert packed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert torch.equal(logits_by_remote_code(out, tmp_path), logits(packed))
    assert done("verify", run, "--json").json["ok"]
    if kind != "pruned":
        assert torch.allclose(logits(packed.dequantize()), logits(other), atol=1e-5)


@pytest.mark.slow
def test_killed_and_repeated_it_ends_in_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source = save_moe("mixtral", tmp_path / "mixture")
    made(source, tmp_path / "whole", tiny, "--bits", 3)
    assert cut_after_a_block(lambda: made(source, tmp_path / "cut", tiny, "--bits", 3))
    assert len(list((tmp_path / "cut.work").iterdir())) == 1
    made(source, tmp_path / "cut", tiny, "--bits", 3)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.fixture
def choosy(tmp_path: Path) -> Path:
    return save_choosy(tmp_path / "choosy")


def experts_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "lowrank.json").read_text())["quantize"]["experts"]


def test_experts_that_saw_nothing_are_rounded_to_the_nearest_and_named(
    choosy: Path, tiny: Tiny, tmp_path: Path
) -> None:
    nearest = tmp_path / "rtn"
    made(choosy, nearest, tiny, "--rounding", "rtn", "--bits", 3)
    assert experts_in(nearest) == {"count": 8, "thin": {}}
    place = "model.layers.1.mlp.experts"
    for rounding in ("gptq", "quantease"):
        out = tmp_path / rounding
        text = ("--group", 16, "--bits", 3, "--calibration", tiny.text, *FEW, "--out", out)
        told = done("quantize", choosy, "--rounding", rounding, *text).err
        assert "Experts that saw fewer tokens than their matrices have columns: 6 (" in " ".join(told.split())
        assert experts_in(out)["thin"] == {f"{place}.{number}": 0 for number in (0, 3, 4, 5, 6, 7)}
        found, plain = (load_file(path / "model.safetensors") for path in (out, nearest))
        for role in ROLES:
            names = [f"{place}.{number}.{role}.weight_packed" for number in (0, 1)]
            assert torch.equal(found[names[0]], plain[names[0]])
            assert not torch.equal(found[names[1]], plain[names[1]])
    assert "columns: 6 of 8, 6 of them none" in " ".join(done("show", out).out.split())


@pytest.mark.slow
def test_losses_of_experts_count_as_much_as_the_router_gives_them(choosy: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Shares of what nobody is given cost nothing; nats of an expert that was not seen are those of others."""
    bits: dict[str, dict[bool, set[int]]] = {}
    for rounding in ("gptq", "kfac"):
        out = tmp_path / rounding
        said = made(choosy, out, tiny, "--rounding", rounding, "--bits", 4.5)
        assert said["bits_per_weight"] <= 4.5
        assert measure_size(Checkpoint(out)).block_bytes == said["stored_bytes"]
        layers = json.loads((out / "lowrank.json").read_text())["quantize"]["layers"]
        mine = {name: layer["bits"] for name, layer in layers.items() if ".experts." in name}
        seen = {name: name.split(".experts.")[1][0] in "12" for name in mine}
        bits[rounding] = {each: {mine[name] for name in mine if seen[name] is each} for each in (True, False)}
    assert bits["gptq"][False] == {2}
    assert min(bits["gptq"][True]) > 2
    assert max(bits["kfac"][False]) > 2


def test_few_tokens_damp_and_none_stand_for_the_rest() -> None:
    paths = [f"m.experts.{number}.lr_down" for number in range(3)]
    layers = [Layer(path, 0, (2, 4), False, path.rpartition(".")[0], 3) for path in paths]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    gram, fisher = x.T @ x, torch.eye(2).double()
    moments = {
        paths[0]: LayerMoments(gram, fisher, 2),
        paths[1]: LayerMoments(torch.zeros(4, 4).double(), torch.zeros(2, 2).double(), 0, 0.0),
        paths[2]: LayerMoments(3 * gram, 5 * fisher, 4),
    }
    found = made_up(layers, moments, QuantizeConfig(source=None, seq_len=8, micro_batch=1, bits=4, damping=0.1))
    mean = gram.diagonal().mean()
    assert torch.allclose(found[paths[0]].gram, gram + 0.1 * (4 / 2 - 1) * mean * torch.eye(4))
    fishers = [found[path].fisher for path in paths]
    assert fishers[0] is not None
    assert fishers[1] is not None
    assert torch.equal(fishers[0], fisher)
    assert torch.allclose(found[paths[1]].gram, 2 * mean * torch.eye(4).double())
    assert torch.allclose(fishers[1], 3 * torch.eye(2).double())
    assert torch.equal(found[paths[2]].gram, 3 * gram)
    assert thin_experts(layers, moments) == {"m.experts.0": 2, "m.experts.1": 0}


NAME = "model.layers.1.mlp.experts.2.lr_up.weight_packed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"has no tensor {NAME}"),
        (lambda tensors: tensors.update({NAME: tensors[NAME][:, :-1].contiguous()}), f"The tensor {NAME} of "),
        (lambda tensors: tensors.update({NAME: tensors[NAME].float()}), f"The tensor {NAME} of "),
    ],
)
def test_damaged_experts_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    out = tmp_path / "out"
    done("quantize", save_moe("mixtral", tmp_path / "mixture"), "--rounding", "rtn", "--group", 8, "--out", out)
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert message in refused("export", out, "--dense", tmp_path / "dense")
    assert "not what was written, the first model.safetensors" in " ".join(lrc("verify", out).err.split())


def test_an_adapter_beside_fused_experts_is_refused(tmp_path: Path) -> None:
    source = save_moe("mixtral", tmp_path / "mixture", torch.bfloat16)
    message = refused("quantize", source, "--rounding", "rtn", "--residual-rank", 2, "--out", tmp_path / "no")
    assert "expected a dense one without routed experts" in message
