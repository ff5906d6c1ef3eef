"""What the looking commands print, for people and with --json, and what they leave alone."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_compress.allocation.table import ALLOCATORS
from lowrank_compress.arch.table import ARCHITECTURES
from lowrank_compress.calibration.own import bytes_to_write
from lowrank_compress.calibration.sources import PAPERS_DATA
from lowrank_compress.cli.terminal import duration
from lowrank_compress.methods.table import METHODS
from lowrank_compress.model.checkpoint import Checkpoint
from lowrank_compress.model.dense import EXPORT
from lowrank_compress.recipe import Recipe
from lowrank_compress.resources.resources import Resources
from lowrank_compress.stages import samples
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.sizing import roomy
from lowrank_compress.stages.table import STAGES
from tests.runs import FEW, Tiny, contents, done, refused, results
from tests.tiny import save_tiny

Finished = Callable[[str], Path]
NAME = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("what", "table"),
    [("methods", METHODS), ("allocators", ALLOCATORS), ("architectures", ARCHITECTURES), ("stages", STAGES)],
)
def test_list(what: str, table):
    rows = done("list", what, "--json").json[what]
    assert [row[what[:-1]] for row in rows] == list(table)
    assert all(value for row in rows for value in row.values())
    printed = done("list", what).out
    assert all(name in printed for name in table)


def test_list_of_something_else():
    assert "Unknown list 'method'. Did you mean 'methods'?" in refused("list", "method")


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_show(pristine: Finished, method: str):
    run = pristine(method)
    report = json.loads((run / "model" / "lowrank.json").read_text())
    found = done("show", run, "--json").json
    spectra, texts = found.pop("spectra"), found.pop("texts")
    assert found == report
    assert [text["windows"] for text in texts] == ([] if method == "svd" else [8])
    assert set(spectra) == {name for name, matrix in report["matrices"].items() if matrix["format"] != "width"}
    assert all(values == sorted(values, reverse=True) for values in spectra.values())
    printed = done("show", run).out
    assert all(name in printed for name in report["matrices"])
    dense = sum(matrix["format"] == "dense" for matrix in report["matrices"].values())
    formats = [matrix["format"] for matrix in report["matrices"].values()]
    narrow = formats.count("width")
    low = len(formats) - dense - narrow
    assert f"{low} matrices are low-rank (LRC), {narrow} modules are narrower, {dense} stay dense (N-LRC)" in " ".join(
        printed.split()
    )
    assert ("nats a token" in printed) == (method == "auto")
    assert done("show", run / "model", "--json").json == report | {"spectra": {}, "texts": []}


def test_show_of_a_dense_checkpoint(tiny: Tiny):
    assert "is no compressed checkpoint: it has no lowrank.json" in refused("show", tiny.model)


def test_verify(pristine: Finished):
    found = done("verify", pristine("svd"), "--json").json
    states = {entry["file"]: entry["state"] for entry in found["files"]}
    assert found["ok"] is True
    assert states.pop("stats") == "dropped"
    assert set(states.values()) == {"intact"}
    assert {"scores/ranks.json", "model/config.json", "model/model.safetensors"} <= set(states)
    assert "intact" in done("verify", pristine("svd")).out


def test_verify_of_a_run_that_has_begun(tiny: Tiny, tmp_path: Path):
    done("calibrate", *tiny.options(tmp_path / "run"))
    states = {entry["file"]: entry["state"] for entry in done("verify", tmp_path / "run", "--json").json["files"]}
    assert states["scores"] == states["model"] == "not there yet"


def test_compress_says_what_it_reached(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    said = done("compress", *tiny.options(run))
    report = json.loads((run / "model" / "lowrank.json").read_text())
    assert f"Removed {report['reached_ratio']:.2%} of the parameters inside the blocks (asked: 30.00%)" in said.out
    assert f"Checkpoint: {run / 'model'}" in said.out.replace("\n", "")
    assert "Next: lrc eval" in said.err
    assert "factorize: done (2)" in said.err
    # Steps of less than a twentieth of a second are not named.
    assert re.search(
        r"Peak memory: [\d.]+ [MG]B \(in \w+; [\d.]+ [MG]B at the start\).* Time: (none|\w+ [\d.]+ (s|min))", said.err
    )


def test_statistics_cannot_be_kept_of_a_finished_run(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("compress", *tiny.options(run))
    assert "has its scores already" in done("compress", *tiny.options(run), "--keep-statistics").text
    done("calibrate", *tiny.options(run))
    assert list((run / "stats").glob("block-*.safetensors"))
    assert "has its scores already" not in done("compress", *tiny.options(run), "--keep-statistics").text


def test_a_memory_budget_changes_no_byte(tiny: Tiny, pristine: Finished, tmp_path: Path):
    cost = done("compress", *tiny.options(tmp_path / "run"), "--memory-budget", "1kB", "--json").json["cost"]
    assert results(tmp_path / "run") == results(pristine("auto"))
    assert {"tokenize", "forward", "loss", "backward", "decompose", "write"} <= cost["seconds"].keys()
    assert cost["peak_bytes"] >= cost["start_bytes"]


@pytest.mark.parametrize("command", ["compress", "calibrate", "score", "factorize"])
def test_stages_print_one_json_object(tiny: Tiny, tmp_path: Path, command: str):
    run = tmp_path / "run"
    done("compress", *tiny.options(run), "--keep-statistics")
    found = done(command, *(tiny.options(run) if command in ("compress", "calibrate") else [run]), "--json").json
    assert found["run"] == str(run)
    assert len(found["id"]) == 64


IN_BYTES = ("bytes", "mix", "rounding", "residual_rank")


def test_the_recipe_says_everything(pristine: Finished):
    recipe = yaml.safe_load((pristine("auto") / "recipe.yaml").read_text())
    # Whether to run a checkpoint's code is for the command line alone to say, each time.
    # Mappings stand there where there is something in them, and so does what is said of a cache, or of bytes.
    without = ("trust_remote_code", "methods", "options", "kv_ratio", "kv_window", *IN_BYTES)
    assert list(recipe) == [name for name in Recipe.model_fields if name not in without]
    parts = {"attention", "qk", "vo", "mlp", "experts", "metric"}
    decided = (
        set(recipe) - {"revision", "text_column", "label_column", "clip", "temperature", "second", "second_by"} - parts
    )
    assert all(recipe[name] is not None for name in decided)


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_dry_run_writes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.chdir(tmp_path)
    before = contents(tiny.model.parent)
    said = done("compress", *tiny.options(tmp_path / "run", method), "--dry-run")
    assert "Nothing was written." in said.out
    found = done("compress", *tiny.options(tmp_path / "run", method), "--dry-run", "--json").json
    assert found["run"] == str(tmp_path / "run")
    assert found["budget"]["denominator"] == 19968
    assert found["budget"]["largest_stored"] == 19968 - 5991  # ⌈0.3 · 19968⌉
    assert found["ranks_need_data"] == (method == "auto")
    assert found["memory"]["one block"] == 4 * (19968 // 2 + 2 * 32)  # float32 weights and norms
    assert (found["memory"]["statistics"] > 0) == (method == "auto")
    assert contents(tiny.model.parent) == before
    assert list(tmp_path.iterdir()) == []


def test_dry_run_tells_where_hidden_states_lie(tiny: Tiny, tmp_path: Path):
    options = [*tiny.options(tmp_path / "run", "auto"), "--dry-run", "--json"]
    free, tight = done("compress", *options).json, done("compress", *options, "--memory-budget", "1kB").json
    assert free["memory"]["hidden states"] == tight["disk"]["hidden states"] > 0
    assert "hidden states" not in {*free["disk"], *tight["memory"]}


def test_freed_memory_is_kept_where_there_is_twice_of_what_a_run_needs(tiny: Tiny, tmp_path: Path):
    found = done("compress", *tiny.options(tmp_path / "run"), "--dry-run", "--json").json
    plan, need = make_plan(Recipe(**found["recipe"])), sum(found["memory"].values())
    assert roomy(plan, Resources())
    assert roomy(plan, Resources(2 * need))
    assert not roomy(plan, Resources(2 * need - 1))


def test_dry_run_ranks_are_those_of_the_run(tiny: Tiny, pristine: Finished):
    found = done("compress", *tiny.options(Path("unused"), "svd"), "--dry-run", "--json").json
    report = json.loads((pristine("svd") / "model" / "lowrank.json").read_text())
    assert found["uniform_ranks"] == {name: matrix["rank"] for name, matrix in report["matrices"].items()}


def test_dry_run_touches_no_data(tiny: Tiny, tmp_path: Path):
    """The default texts are a data set of the hub, which is out of reach here, and what the model writes."""
    asked = ("compress", tiny.model, "--dry-run", "--json", "--out", tmp_path / "run")
    found = done(*asked).json
    wiki, own = found["recipe"]["calibration"]
    assert wiki == {"text": "hf:Salesforce/wikitext:wikitext-2-raw-v1:train", "weight": 1.0}
    assert own == {"text": "self", "weight": 1.0}
    shown = done("compress", tiny.model, "--dry-run", "--out", tmp_path / "run").out
    assert f"{wiki['text']}:1, self:1" in shown.replace("\n", "")
    whole = found["memory"]["the whole model, which writes"]
    named = done(*asked, "--calibration", tiny.text).json
    assert "the whole model, which writes" not in named["memory"]
    assert whole == max(0, bytes_to_write(Checkpoint(tiny.model), 160) - sum(named["memory"].values()))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_half_of_all_memory_does_not_write_its_text(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = ("compress", tiny.model, "--dry-run", "--json", "--seq-len", 16, "--out", tmp_path / "run")
    takes = bytes_to_write(Checkpoint(tiny.model), 16)
    for has, texts in ((2 * takes, 2), (2 * takes - 1, 1)):
        monkeypatch.setattr(samples, "all_memory", lambda device, has=has: has)
        said = done(*asked).json
        found, notes = said["recipe"]["calibration"], " ".join(said["notes"])
        assert len(found) == 2 if texts == 2 else found == PAPERS_DATA
        assert ("more than half: it is calibrated on WikiText-2 alone" in notes) == (texts == 1)
    # Neither does one of which there would be no window, nor one whose text has nothing to begin with.
    monkeypatch.undo()
    assert done(*asked, "--samples", 1).json["recipe"]["calibration"] == PAPERS_DATA
    bare = save_tiny("llama", tmp_path / "bare", bos=False, bos_token_id=None, eos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(bare, bos_token=None, eos_token=None)
    tokenizer.save_pretrained(bare)
    words = ("compress", bare, "--dry-run", "--json", "--seq-len", 16, "--out", tmp_path / "run")
    said = done(*words).json
    assert said["recipe"]["calibration"] == PAPERS_DATA
    assert "as it has nothing to begin a text with" in " ".join(said["notes"])


def test_dry_run_refuses_what_the_run_would(tiny: Tiny, tmp_path: Path):
    missing = refused("compress", tiny.model, "--calibration", tmp_path / "none.txt", "--dry-run")
    assert "none.txt does not exist" in missing
    message = refused("compress", *tiny.options(tmp_path / "run"), "--dry-run", "--ratio", 0.999)
    assert "out of reach" in message
    assert list(tmp_path.iterdir()) == []


ALONE = """
import json, sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.arange(4, 24).view(2, 10)).logits
assert "lowrank_compress" not in sys.modules
print(json.dumps([type(model).__name__, logits.tolist()]))
"""


@pytest.mark.slow
def test_a_dense_export_needs_nothing_of_this_package(tiny: Tiny, tmp_path: Path):
    model, run, dense = save_tiny("gpt2", tmp_path / "model"), tmp_path / "run", tmp_path / "dense"
    done("compress", model, "--calibration", tiny.text, *FEW, "--out", run)
    assert f"Dense checkpoint: {dense}" in done("export", run, "--dense", dense).out.replace("\n", "")
    assert "quantization_config" not in (settings := json.loads((dense / "config.json").read_text()))
    assert "auto_map" not in settings
    assert {path.name for path in dense.iterdir()} == {path.name for path in model.iterdir()} | {EXPORT}
    done("export", run / "model", "--dense", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(dense)

    # -I: neither this directory nor the environment can bring the package in; site-packages may have it, unimported.
    name, logits = json.loads(subprocess.check_output([sys.executable, "-I", "-c", ALONE, str(dense)], text=True))
    compressed = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        expected = compressed(torch.arange(4, 24).view(2, 10)).logits
        original = AutoModelForCausalLM.from_pretrained(model).eval()(torch.arange(4, 24).view(2, 10)).logits
    assert name == type(AutoModelForCausalLM.from_pretrained(model)).__name__
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, original, rtol=1e-3, atol=1e-3)


def test_export_replaces_checkpoints_only_and_only_when_told(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, out = finished("svd"), tmp_path / "dense"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    assert "is not empty" in refused("export", run, "--dense", out)
    assert "is no export of this program" in refused("export", run, "--dense", out, "--overwrite")
    assert list(contents(out)) == ["notes.txt"]
    done("export", run, "--dense", tmp_path / "new")
    assert "pass --overwrite" in refused("export", run, "--dense", tmp_path / "new")
    done("export", run, "--dense", tmp_path / "new", "--overwrite")

    before = contents(run)
    assert "is, holds or lies in the compressed checkpoint" in refused(
        "export", run, "--dense", run / "model", "--overwrite"
    )
    assert "is a file" in refused("export", run, "--dense", run / "recipe.yaml", "--overwrite")
    assert "nothing to make dense" in refused("export", tiny.model, "--dense", tmp_path / "no")
    assert contents(run) == before


@pytest.mark.parametrize(
    "default", ["0.3", "auto, the recommendation", "128", "1e-4", "hf:Salesforce/wikitext", "blocks"]
)
def test_help_says_the_defaults(default: str):
    said = " ".join(done("compress", "--help").out.replace("│", " ").split())
    assert f"(default: {default}" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0512, "0.0512 s"), (3.3349, "3.33 s"), (119, "119 s"), (1003, "17 min"), (7140, "119 min"), (9000, "2.5 h")],
)
def test_times_are_said_in_units_that_are_read_easily(seconds: float, said: str):
    assert duration(seconds) == said
