"""A storage format is one file and one entry: two more are added here, computed with, saved, loaded and shipped."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_compress.shipped.config import REMOTE_FILE, LowRankConfig
from lowrank_compress.shipped.formats.base import Part
from lowrank_compress.shipped.formats.table import FORMATS
from lowrank_compress.shipped.join import HERE, joined
from lowrank_compress.shipped.linear import CompressedLinear
from lowrank_compress.shipped.saving import remote_code_entries, write_remote_code
from lowrank_compress.shipped.swap import swap_modules
from tests.shipped import more_formats
from tests.shipped.more_formats import Dictionary, Middle
from tests.shipped.test_loading import python
from tests.tiny import tiny_model

torch.set_num_threads(1)
pytestmark = pytest.mark.versions

IDS = torch.tensor([[5, 9, 2, 30, 41, 7, 3], [11, 4, 8, 8, 60, 23, 90]])
NEW: list[type[Part]] = [Middle, Dictionary]
PARTS: dict[str, dict[str, Any]] = {
    "svd-middle": {"rows": 12, "format": "svd-middle", "rank": 5, "middle": 4},
    "dictionary": {"rows": 12, "format": "dictionary", "atoms": 6, "used": 2, "columns": 10},
}
PIVOT = {"rows": 6, "format": "pivot", "rank": 3}
LAYOUTS = {
    "svd-middle": [PARTS["svd-middle"]],
    "dictionary": [PARTS["dictionary"]],
    "fused": [PIVOT, PARTS["dictionary"], PARTS["svd-middle"]],
}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in NEW:
        monkeypatch.setitem(FORMATS, form.format, form)


def fill(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if not isinstance(layer, CompressedLinear):
            continue
        for parameter in layer.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for part in layer.parts:
            if isinstance(part, Dictionary):
                drawn = torch.rand(part.atoms, part.columns, generator=generator).argsort(0)[: part.used]
                layer.get_buffer(f"lr_index{part.suffix}").copy_(drawn)
    return module


def layer(parts: list[dict[str, Any]], dtype: torch.dtype = torch.float64) -> CompressedLinear:
    made = CompressedLinear(10, sum(part["rows"] for part in parts), True, parts, dtype=dtype)
    fill(made)
    return made


def by_loops(module: CompressedLinear) -> Tensor:
    """The weight, each entry of a product by itself."""
    state = {name: value.double() for name, value in module.state_dict().items()}
    rows: list[Tensor] = []
    start = 0
    for part in module.parts:
        b = state["lr_in.weight"][start : start + part.width]
        start += part.width
        out = state[f"lr_out{part.suffix}.weight"]
        if isinstance(part, Middle):
            rows += [row @ state[f"lr_core{part.suffix}.weight"] @ b for row in out]
        elif isinstance(part, Dictionary):
            columns = []
            for j in range(10):
                pairs = zip(state[f"lr_index{part.suffix}"][:, j], state[f"lr_coefficients{part.suffix}.weight"][:, j])  # noqa: B905
                columns.append(sum(out[:, int(atom)] * coefficient for atom, coefficient in pairs))
            rows += list(torch.stack([torch.as_tensor(column) for column in columns], 1))
        else:
            rows += [*b, *(out @ b)]  # the first rows are the pivots
    return torch.stack(rows)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_format_computes_what_its_definition_says(layout: str) -> None:
    module = layer(LAYOUTS[layout])
    reference = by_loops(module)
    torch.testing.assert_close(module.dense_weight(), reference, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(module(x), nn.functional.linear(x, reference, module.bias), rtol=1e-12, atol=1e-12)
    module(x).square().sum().backward()
    used = [p for n, p in module.named_parameters() if p.numel()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used)
    program = torch.export.export(module, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), module(x))


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"rows": 12, "format": "svd-middle", "rank": 5}, "to have the keys rows, format, rank and middle, got"),
        (PARTS["svd-middle"] | {"rank": 13}, "the rank of a svd-middle part of 12 rows is from 1 to 12"),
        (PARTS["dictionary"] | {"used": 7}, "6 atoms cannot have 7 used in a column"),
    ],
)
def test_a_new_format_checks_its_entry(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConfig({"x": {"in_features": 10, "out_features": 12, "bias": False, "parts": [part]}})


def compressed() -> tuple[PreTrainedModel, LowRankConfig]:
    """A llama whose matrices are in the new formats."""
    model = tiny_model("llama")
    core = {"rows": 72, "format": "svd-middle", "rank": 9, "middle": 8}
    dictionary = {"rows": 32, "format": "dictionary", "atoms": 20, "used": 3, "columns": 72}
    modules = {}
    for i in range(2):
        for name, part, columns in (("up_proj", core, 32), ("down_proj", dictionary, 72)):
            shape = {"in_features": columns, "out_features": part["rows"], "bias": False, "heads": 1}
            modules[f"model.layers.{i}.mlp.{name}"] = shape | {"parts": [part]}
    config = LowRankConfig(modules)
    swap_modules(model, config)
    fill(model)
    model.config.quantization_config = config
    return model, config


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.config.auto_map = remote_code_entries(model.config)
    model.save_pretrained(directory)
    write_remote_code(directory)
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.usefixtures("added")
def test_a_checkpoint_in_new_formats_loads_runs_saves_and_loads_again(tmp_path: Path) -> None:
    model, config = compressed()
    assert config.version == 3
    assert not torch.allclose(logits(model), logits(tiny_model("llama")), rtol=0.01)
    loaded, info = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "one"), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "two")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first["model.layers.0.mlp.down_proj.lr_index"].dtype == torch.int32
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))
    torch.testing.assert_close(logits(again.dequantize()), logits(model), rtol=1e-4, atol=1e-4)
    assert isinstance(again.model.layers[0].mlp.down_proj, nn.Linear)
    first["model.layers.1.mlp.down_proj.lr_index"][1, 2] = 20
    save_file(first, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.lr_index names atoms that are not there"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "two")


def test_code_without_the_format_refuses_by_its_name(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for form in NEW:
            patch.setitem(FORMATS, form.format, form)
        save(compressed()[0], tmp_path / "one")
    with pytest.raises(
        ValueError, match=r"unknown format '(svd-middle|dictionary)', expected one of pair, pivot, svd-core, dense"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")


WITHOUT_PACKAGE = """
    import json, sys, torch
    sys.modules["lowrank_compress"] = None
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits, sys.argv[1] + "-logits.pt")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_a_new_file_and_entry_are_shipped_without_further_ado(tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    shutil.copytree(HERE, folder)
    assert more_formats.__file__
    text = Path(more_formats.__file__).read_text(encoding="utf-8")
    text = text.replace("from lowrank_compress.shipped.formats.base import", "from .base import")
    (folder / "formats" / "more.py").write_text(text, encoding="utf-8")
    table = (folder / "formats" / "table.py").read_text(encoding="utf-8")
    table = table.replace("from .pair", "from .more import Middle, Dictionary\nfrom .pair")
    table = table.replace("Dense, Rebuilt)", "Dense, Rebuilt, Middle, Dictionary)")
    (folder / "formats" / "table.py").write_text(table, encoding="utf-8")
    model, _ = compressed()
    directory = save(model, tmp_path / "one")
    (directory / REMOTE_FILE).write_text(joined(folder), encoding="utf-8")
    (tmp_path / "cache").mkdir()
    python(WITHOUT_PACKAGE, directory, json.dumps(IDS.tolist()), cache=tmp_path / "cache")
    assert torch.equal(torch.load(f"{directory}-logits.pt"), logits(model))
