"""What a checkpoint stands for does not depend on how it is stored, and is what transformers computes with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.reconstruction import reconstruction
from tests.runs import FEW, Tiny, done
from tests.tiny import save_tiny

Finished = Callable[[str], Path]


def taken(path: Path) -> dict[str, Tensor]:
    return {
        name: torch.stack([piece.double() for piece in pieces]) for name, pieces in reconstruction(Checkpoint(path))
    }


def changed(model: Path, place: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(model, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
    return place


def agree(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """Names of what differs by more than rounding."""
    assert list(one) == list(two)
    return [name for name in one if float((one[name] - two[name]).norm()) > 1e-5 * float(one[name].norm())]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "opt"])
def test_of_a_dense_checkpoint_are_its_tensors(model_type: str, tmp_path: Path):
    model = save_tiny(model_type, tmp_path / "model")
    plan = blueprint(Checkpoint(model))
    found = taken(model)
    for target in plan.resolved.targets:
        assert torch.equal(found[target.name][0], plan.weight(target).double())
        if target.bias:
            assert torch.equal(found[f"{target.name}.bias"][0], plan.bias(target).double())
    fused = {name for target in plan.resolved.targets for name in (target.parameter, target.bias)}
    names = [name for name in plan.model.state_dict() if name not in (*fused, *plan.model.all_tied_weights_keys)]
    assert set(names) == set(found) - {f"{t.name}{end}" for t in plan.resolved.targets for end in ("", ".bias")}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
@pytest.mark.parametrize("method", ["svd", "nystrom"])
def test_of_a_compressed_one_is_its_dense_export(model_type: str, method: str, tiny: Tiny, tmp_path: Path):
    model = save_tiny(model_type, tmp_path / "model")
    run, dense = tmp_path / "run", tmp_path / "dense"
    done("compress", model, "--method", method, "--calibration", tiny.text, *FEW, "--out", run)
    done("export", run, "--dense", dense)
    assert agree(taken(run / "model"), taken(dense)) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
def test_narrower_values_and_output_come_as_their_product(model_type: str, tiny: Tiny, tmp_path: Path):
    model = save_tiny(model_type, tmp_path / "model")
    run, dense = tmp_path / "run", tmp_path / "dense"
    done("compress", model, "--method", "svd", "--vo", "vo-svd", "--calibration", tiny.text, *FEW, "--out", run)
    done("export", run, "--dense", dense)
    found, plan = taken(run / "model"), blueprint(Checkpoint(dense))
    joined = {name for name in found if " · " in name}
    assert len(joined) == len(plan.resolved.blocks)
    for block in range(len(plan.resolved.blocks)):
        value, output = (next(t for t in plan.resolved.of_block(block) if t.role == role) for role in "vo")
        heads = plan.resolved.heads
        products = found[f"{value.name} · {output.name}"]
        for head in range(heads.query):
            kept = slice(head * heads.size, (head + 1) * heads.size)
            group = head // (heads.query // heads.key)
            right = plan.weight(value)[group * heads.size : (group + 1) * heads.size].double()
            if value.bias:
                column = plan.bias(value)[group * heads.size : (group + 1) * heads.size].double()
                right = torch.cat([right, column[:, None]], 1)
            assert torch.allclose(products[head], plan.weight(output)[:, kept].double() @ right, atol=1e-6)


def test_turned_factors_stand_for_the_same(finished: Finished, tmp_path: Path):
    run = finished("svd")

    def turn(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.0.mlp.up_proj"
        inner, outer = tensors[f"{prefix}.lr_in.weight"].double(), tensors[f"{prefix}.lr_out.weight"].double()
        mix = torch.randn(len(inner), len(inner), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        tensors[f"{prefix}.lr_in.weight"] = (mix @ inner).float()
        tensors[f"{prefix}.lr_out.weight"] = (outer @ torch.linalg.inv(mix)).float()

    other = changed(run / "model", tmp_path / "turned", turn)
    one, two = taken(run / "model"), taken(other)
    assert agree(one, two) == []
    assert not torch.equal(one["model.layers.0.mlp.up_proj"], two["model.layers.0.mlp.up_proj"])


def test_turned_heads_stand_for_the_same(finished: Finished, tmp_path: Path):
    run = finished("modegpt")
    settings = json.loads((run / "model" / "config.json").read_text())["quantization_config"]["attention"]
    heads = settings["model.layers.0.self_attn"]
    assert heads["value"] < heads["size"]

    def turn(tensors: dict[str, Tensor]) -> None:
        prefix, width = "model.layers.0.self_attn", heads["value"]
        value, output = (tensors[f"{prefix}.{name}.weight"].double() for name in ("v_proj", "o_proj"))
        generator = torch.Generator().manual_seed(0)
        per_group = heads["heads"] // heads["kv_heads"]
        for group in range(heads["kv_heads"]):
            square = torch.randn(width, width, dtype=torch.float64, generator=generator)
            around = torch.linalg.qr(square).Q
            rows = slice(group * width, (group + 1) * width)
            value[rows] = around @ value[rows]
            for head in range(group * per_group, (group + 1) * per_group):
                columns = slice(head * width, (head + 1) * width)
                output[:, columns] = output[:, columns] @ around.T
        tensors[f"{prefix}.v_proj.weight"], tensors[f"{prefix}.o_proj.weight"] = value.float(), output.float()

    assert agree(taken(run / "model"), taken(changed(run / "model", tmp_path / "turned", turn))) == []
