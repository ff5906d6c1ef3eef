"""Bad input: exit code 2, one paragraph that says what to do, and nothing that looks finished."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import Tiny, contents, done, looks_finished, lrc, refused
from tests.tiny import save_tiny, tiny_text

Finished = Callable[[str], Path]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--method", "fwsdv"], ["Unknown method 'fwsdv'", "Did you mean 'fwsvd'?", "kfac"]),
        (["--allocate", "unifrom"], ["Unknown allocator 'unifrom'", "Did you mean 'uniform'?", "welore"]),
        (["--storage", "pivots"], ["Unknown storage 'pivots'", "Did you mean 'pivot'?", "auto"]),
        (["--ratio", 0], ["--ratio 0.0 is not between 0 and 1"]),
        (["--ratio", 1], ["--ratio 1.0 is not between 0 and 1"]),
        (["--ratio", 1.5], ["--ratio 1.5 is not between 0 and 1", "0.3 for 30 %"]),
        (["--ratio", "nan"], ["ratio: Input should be a finite number"]),
        (["--ratio", 0.999], ["ratio of 0.999 is out of reach", "largest reachable ratio is 0.9"]),
        (["--ratio", 0.999, "--method", "svd"], ["out of reach", "largest reachable ratio is 0.9"]),
        (["--ratio", 0.9, "--ratio-of", "model"], ["out of reach", "largest reachable ratio is 0.7"]),
        (["--ratio-of", "blokcs"], ["ratio_of", "'blocks' or 'model'", "'blokcs'"]),
        (["--seq-len", 161], ["--seq-len 161 is more than the 160 positions"]),
        (["--seq-len", 4], ["seq_len", "greater than or equal to 8", "got 4"]),
        (["--samples", 0], ["samples", "got 0"]),
        (["--alpha", -1], ["alpha", "got -1.0"]),
        (["--dtype", "float8"], ["dtype is 'float8'", "bfloat16"]),
        (["--memory-budget", "much"], ["--memory-budget much is no size", "8GB"]),
        (["--device", "gpu"], ["Unknown device 'gpu'", "cuda:N"]),
        (["--device", "meta"], ["device meta is not supported"]),
        (["--calibration", "/no/such.txt"], ["/no/such.txt does not exist"]),
        (
            ["--calibration", "hf:some/set:config:train"],
            ["data set hf:some/set", "Pass a text file instead"],
        ),
        (["--config", "/no/such.yaml"], ["The recipe /no/such.yaml does not exist"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options(tiny: Tiny, tmp_path: Path, options: list[object], messages: list[str]):
    run = tmp_path / "run"
    message = refused("compress", *tiny.options(run), *options, "--json")
    assert all(part in message for part in messages), message
    assert looks_finished(run) == []
    done("compress", *tiny.options(run, "svd"))  # a command that failed at once does not claim the directory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 2**63], "seed: Input should be less than 4294967296"),
        (["--limit", 10**12], "limit: Input should be less than or equal to 1000000000"),
        (["--label-column", "a\udcff"], "expected printable text"),
        (["--classification", ""], "classification is ''"),
    ],
)
def test_options_of_an_evaluation(tiny: Tiny, options: list[object], message: str):
    assert message in refused("eval", tiny.model, "--perplexity", tiny.heldout, *options, "--json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(tiny: Tiny, tmp_path: Path):
    assert "sees no GPU. Use --device cpu" in refused("compress", *tiny.options(tmp_path / "run"), "--device", "cuda")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("empty.txt", "", [], "holds no text"),
        ("blank.txt", " \n\n", [], "holds no text"),
        ("short.txt", "the quick", [], "one window of --seq-len 32 needs 31"),
        ("binary.txt", b"\xff\xfe\x00", [], "it is no UTF-8 text; it looks like UTF-16"),
        ("table.csv", "a,b\n1,2\n", [], "name the column that holds the text with --text-column"),
        ("table.csv", "a,b\n1,2\n", ["--text-column", "c"], "has no column 'c'; it has a, b"),
        ("lines.jsonl", '{"text": "a"}\n{\n', ["--text-column", "text"], "Line 2 of"),
        ("lines.jsonl", "[1]\n", ["--text-column", "text"], "is a JSON list"),
    ],
)
def test_calibration_texts(tiny: Tiny, tmp_path: Path, name: str, content: str | bytes, options: list, message: str):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    run = tmp_path / "run"
    assert message in refused("compress", *tiny.options(run, text=path), *options)
    assert looks_finished(run) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {model}\nratoi: 0.3\n", "unknown option 'ratoi'; known are model, ratio"),
        ("model: {model}\nratio: much\n", "ratio: Input should be a valid number"),
        ("ratio: 0.3\n", "names no model"),
        ("- 1\n", "holds a list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_recipes(tiny: Tiny, tmp_path: Path, content: str, message: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content.replace("{model}", str(tiny.model)))
    assert message in refused("compress", "--config", recipe, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_recipe_of_a_run(finished: Finished):
    run = finished("svd")
    written = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(written.replace("ratio:", "ratoi:"))
    assert "unknown option 'ratoi'" in refused("score", run)
    assert "unknown option 'ratoi'" in refused("factorize", run)


def poison(value: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


def configured(**fields: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | fields))

    return change


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lacking(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


JAMBA = {"model_type": "jamba", "architectures": ["JambaForCausalLM"], "num_experts": 4}
MXFP4 = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nan": (poison(float("nan")), ["model.layers.1.mlp.up_proj.weight", "1 NaN or infinite elements"]),
    "inf": (poison(float("-inf")), ["model.layers.1.mlp.up_proj.weight", "1 NaN or infinite elements"]),
    "truncated": (truncate, ["model.safetensors is not a whole safetensors file", "Download it again"]),
    "empty file": (lambda m: (m / "model.safetensors").write_bytes(b""), ["not a whole safetensors file"]),
    "pickled": (pickled, ["has pickled weights only (pytorch_model.bin)", "save_pretrained"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["has no weights"]),
    "a tensor lacks": (lacking, ["model.layers.1.mlp.up_proj.weight"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["has no config.json"]),
    "bad config": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "unknown type": (configured(model_type="llamma"), ["llamma"]),
    "unsupported type": (configured(model_type="mamba", architectures=["MambaForCausalLM"]), ["mamba", "llama"]),
    "mixture of experts": (configured(**JAMBA), ["jamba", "mixtral"]),
    "mxfp4": (configured(**MXFP4), ["is quantized (mxfp4)", "Mxfp4Config(dequantize=True)", "save_pretrained"]),
    "unsupported head": (configured(architectures=["LlamaForMultipleChoice"]), ["LlamaForMultipleChoice"]),
    "quantized": (configured(quantization_config={"quant_method": "gptq", "bits": 4}), ["gptq", "dense checkpoint"]),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], ["no tokenizer"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints(tiny: Tiny, tmp_path: Path, damage: str):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny.model, model)
    change, messages = DAMAGES[damage]
    change(model)
    message = refused("compress", model, *tiny.options(run)[1:])
    assert all(part in message for part in messages), message
    assert "model" not in looks_finished(run)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "auto"])
def test_weights_that_are_not_finite_are_named_by_every_kind_of_method(tiny: Tiny, tmp_path: Path, method: str):
    shutil.copytree(tiny.model, tmp_path / "model")
    poison(float("nan"))(tmp_path / "model")
    message = refused("compress", tmp_path / "model", *tiny.options(tmp_path / "run", method)[1:])
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_missing_shard(tiny: Tiny, tmp_path: Path):
    model = save_tiny("llama", tmp_path / "model", max_shard_size="40KB")
    gone = sorted(model.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refused("compress", model, *tiny.options(tmp_path / "run")[1:])
    assert f"{gone.name} is missing" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c"])
def test_no_checkpoint(tiny: Tiny, tmp_path: Path, name: str):
    assert f"The directory {name} does not exist" in refused("compress", name, "--out", tmp_path / "run")


def test_a_hub_name_offline(tmp_path: Path):
    message = refused("compress", "some/model", "--out", tmp_path / "run")
    assert "neither a directory here nor a model" in message
    assert not (tmp_path / "run").exists()


def test_a_compressed_checkpoint_is_not_compressed_again(tiny: Tiny, pristine: Finished, tmp_path: Path):
    message = refused("compress", pristine("svd") / "model", *tiny.options(tmp_path / "run")[1:])
    assert "is already compressed by this program; start from the dense checkpoint" in message


@pytest.mark.parametrize("command", ["compress", "calibrate"])
def test_a_directory_of_something_else(tiny: Tiny, tmp_path: Path, command: str):
    (tmp_path / "thesis.tex").write_text("precious")
    for options in ([], ["--overwrite"]):
        message = refused(command, *tiny.options(tmp_path), *options)
        assert "is not empty and is no run of this program" in message
    assert list(contents(tmp_path)) == ["thesis.tex"]
    message = refused(command, *tiny.options(tmp_path / "thesis.tex"))
    assert "is a file; expected a directory" in message


@pytest.mark.parametrize("command", ["score", "factorize", "verify", "show", "eval"])
def test_no_run(tmp_path: Path, command: str):
    assert "is no" in (message := refused(command, tmp_path)) or "has no config.json" in message
    assert contents(tmp_path) == {}


def test_a_run_without_scores_or_model(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run"
    done("calibrate", *tiny.options(run))
    assert "holds no finished scores. Run `lrc score`" in refused("factorize", run)
    assert "the run has no checkpoint yet" in refused("show", run)
    assert "the run has no checkpoint yet" in refused("eval", run, "--perplexity", tiny.heldout)


class TestClassifier:
    COLUMNS = ("--text-column", "sentence", "--label-column", "label")

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_tiny("bert", tmp_path_factory.mktemp("bert"), "classification")

    @pytest.mark.parametrize(
        ("labels", "columns", "message"),
        [
            (["0", "positive"], COLUMNS, "'positive' is none of the model's classes: LABEL_0 (0)"),
            (["0", "3"], COLUMNS, "'3' is none of the model's classes"),
            (["0", "1"], ("--text-column", "sentence", "--label-column", "gold"), "has no column 'gold'"),
            (["0", "1"], ("--text-column", "sentence"), "needs labels"),
            ([], COLUMNS, "has no rows"),
        ],
    )
    def test_labels(self, model: Path, tmp_path: Path, labels: list[str], columns: tuple[str, ...], message: str):
        data = tmp_path / "data.tsv"
        rows = [f"{tiny_text(300, seed=i).splitlines()[0]}\t{label}" for i, label in enumerate(labels * 10)]
        data.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        options = ["--method", "kfac", "--calibration", data, "--seq-len", 8, "--out", tmp_path / "run"]
        assert message in refused("compress", model, *options, *columns)

    def test_no_data(self, model: Path, tmp_path: Path):
        message = refused("compress", model, "--method", "fwsvd", "--out", tmp_path / "run")
        assert "needs labelled examples of a classifier" in message

    def test_wrong_measure(self, model: Path, tiny: Tiny):
        assert "Perplexity needs a language model" in refused("eval", model, "--perplexity", tiny.heldout)


def test_debug_shows_the_traceback(tiny: Tiny, tmp_path: Path):
    with pytest.raises(Exception, match="not between 0 and 1"):
        lrc("compress", *tiny.options(tmp_path / "run"), "--ratio", 2, "--debug")


def test_unknown_options_are_usage_errors():
    assert lrc("compress", "--no-such-option").code == 2
    assert lrc("no-such-command").code == 2


def test_markup_in_names_is_printed_as_it_is(tiny: Tiny, tmp_path: Path):
    run = tmp_path / "run[bold]x[/oops]"
    assert str(run) in done("compress", *tiny.options(run, "svd")).out.replace("\n", "")
    assert "[bold]x[/oops]" in done("show", run).out
    assert "[bold]x[/oops]" in refused("compress", *tiny.options(run, "svd"), "--ratio", 0.5)


def test_a_path_that_is_not_utf8_is_printed_escaped(finished: Finished, tmp_path: Path):
    said = done("export", finished("svd"), "--dense", tmp_path / "a\udcff")
    assert "a\\udcff" in said.out
