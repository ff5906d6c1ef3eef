"""Which method each matrix has: shorthands, groups, roles and patterns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_compress.arch.targets import Resolved
from lowrank_compress.config import Scheme
from lowrank_compress.errors import InputError
from lowrank_compress.methods.scheme import label, parts_of, rival_of, scheme_of
from lowrank_compress.model.blueprint import blueprint
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.pipeline import default_run
from tests.runs import Tiny, done, refused
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> Resolved:
    return blueprint(Checkpoint(tiny.model)).resolved


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    return blueprint(Checkpoint(save_tiny("phi3", tmp_path_factory.mktemp("phi3")))).resolved


def recipe(**fields: Any) -> Recipe:
    return Recipe(model="m", **fields)


def methods(resolved: Resolved, found: Scheme) -> Mapping[str, str]:
    """Name of each matrix without what all have -> names of its methods."""
    return {
        target.name.removeprefix("model.layers."): "|".join(method.name for method in part.methods) or "dense"
        for block in range(len(resolved.blocks))
        for part in parts_of(found, resolved, block)
        for target in part.targets
    }


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"qk": "svd", "vo": "dense"}, {"qk": "svd", "vo": "dense"}),
        ({"attention": "svd-llm", "mlp": "kfac|nystrom"}, {"attention": "svd-llm", "mlp": "kfac|nystrom"}),
        ({"attention": "modegpt", "vo": "kfac"}, {"vo": "kfac", "attention": "modegpt"}),
    ],
)
def test_shorthands_are_entries(llama: Resolved, short: dict[str, str], long: dict[str, str]) -> None:
    a, b = recipe(method="kfac", **short), recipe(method="kfac", methods=long)
    assert scheme_of(a, llama) == scheme_of(b, llama)
    assert rival_of(recipe(methods=long), llama) is None
    assert rival_of(recipe(), llama) is not None


def test_a_scheme_is_one_mapping_in_files(llama: Resolved) -> None:
    scheme, _ = scheme_of(recipe(mlp="kfac", methods={"down": "svd"}), llama)
    expected = {"qk": "kfac", "vo": "kfac", "mlp": "kfac", "down": "svd", "metric": "kfac"}
    assert scheme.model_dump(mode="json") == expected
    assert Scheme(**json.loads(scheme.model_dump_json())) == scheme


def test_the_nearest_name_decides(llama: Resolved) -> None:
    own = {"attention": "svd-llm", "k": "dense", "*.1.mlp.*": "nystrom", "*.0.mlp.up_proj": "fwsvd", "mlp": "kfac"}
    found = methods(llama, scheme_of(recipe(methods=own), llama)[0])
    assert found == {
        **{f"{block}.self_attn.{name}_proj": "svd-llm" for block in (0, 1) for name in "qvo"},
        **{f"{block}.self_attn.k_proj": "dense" for block in (0, 1)},
        **{f"1.mlp.{name}_proj": "nystrom" for name in ("gate", "up", "down")},
        **{"0.mlp.gate_proj": "kfac", "0.mlp.up_proj": "fwsvd", "0.mlp.down_proj": "kfac"},
    }


def test_parts_of_a_fused_weight_have_methods_of_their_own(fused: Resolved) -> None:
    found = methods(fused, scheme_of(recipe(method="svd", methods={"q": "dense", "*:up": "fwsvd"}), fused)[0])
    for block in (0, 1):
        attention = {f"{block}.self_attn.qkv_proj:{role}": "svd" for role in "kv"}
        assert attention.items() <= found.items()
        assert found[f"{block}.self_attn.qkv_proj:q"] == "dense"
        assert found[f"{block}.mlp.gate_up_proj:up"] == "fwsvd"
        assert found[f"{block}.mlp.gate_up_proj:gate"] == "svd"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mpl": "svd"}, r"Unknown part of a block 'mpl'\. Did you mean 'mlp'\? Known: attention, .*, vo\. A shell"),
        ({"*.7.*": "svd"}, r"'\*\.7\.\*' is that of none in this model"),
        ({"mlp": "svdd"}, "Unknown method 'svdd'. Did you mean 'svd'"),
        ({"up": "svdd"}, "Unknown method 'svdd'. Did you mean 'svd'"),
        ({"qk": "nystrom"}, "'nystrom' is not for --qk"),
        ({"attention": "nystrom"}, "'nystrom' is not for --attention"),
        ({"down": "nystrom"}, r"not for model\.layers\.0\.mlp\.down_proj alone"),
        ({"*.0.*": "nystrom"}, r"not for model\.layers\.0\.self_attn\.q_proj and model"),
        ({"*.0.mlp.*": "auto"}, "auto is a mixture"),
        ({"*.0.*": "svd", "*.mlp.*": "kfac"}, r"patterns '\*\.0\.\*' and '\*\.mlp\.\*' are both for model"),
    ],
)
def test_what_cannot_be_is_explained(llama: Resolved, own: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scheme_of(recipe(method="svd", methods=own), llama)


def test_patterns_may_overlap_where_they_agree(llama: Resolved) -> None:
    found = methods(llama, scheme_of(recipe(methods={"*.0.*": "svd", "*.up_proj": "svd", "*.1.*": "svd"}), llama)[0])
    assert set(found.values()) == {"svd"}


def test_one_part_has_one_method(llama: Resolved) -> None:
    with pytest.raises(InputError, match="--mlp svd and --for mlp=kfac are two methods for one part"):
        scheme_of(recipe(mlp="svd", methods={"mlp": "kfac"}), llama)


def test_a_run_is_named_after_its_parts() -> None:
    assert default_run(recipe(mlp="kfac", methods={"*.0.*": "dense", "q": "svd"})).name == (
        "m-auto-mlp-kfac-+.0.+-dense-q-svd-0.3"
    )
    assert label(recipe(mlp="kfac", methods={"q": "svd"})) == "auto (mlp: kfac, q: svd)"


def test_parts_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    run, own = tmp_path / "run", ["--for", "*.0.*=dense", "--for", "down=kfac", "--ratio", 0.1]
    done("compress", *tiny.options(run, "svd-llm"), *own)
    matrices = json.loads((run / "model" / "lowrank.json").read_text())["matrices"]
    assert {name.split(".")[2] for name in matrices} == {"1"}
    assert len(matrices) == 7
    assert yaml.safe_load((run / "recipe.yaml").read_text())["methods"] == {"*.0.*": "dense", "down": "kfac"}
    assert json.loads((run / "scores" / "manifest.json").read_text())["key"]["config"]["scheme"]["down"] == "kfac"
    done("verify", run)
    done("compress", "--config", run / "recipe.yaml", "--out", run)  # it says everything
    assert "another recipe: methods" in refused("compress", *tiny.options(run, "svd-llm"), *own[2:])


def test_parts_in_a_file_and_on_the_command_line_are_put_together(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("methods: {qk: dense, mlp: svd}\nratio: 0.1\n")
    words = ["--config", tmp_path / "recipe.yaml", "--for", "mlp=kfac", "--for", "v=svd", "--dry-run", "--json"]
    found = done("compress", *tiny.options(tmp_path / "run", "svd-llm"), *words).json["recipe"]
    assert found["methods"] == {"qk": "dense", "mlp": "kfac", "v": "svd"}
