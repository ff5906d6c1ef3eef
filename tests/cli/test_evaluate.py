"""`lrc eval`: the shape of its JSON, what it keeps, and lm-eval tasks without a network."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_compress import compare
from lowrank_compress.errors import InputError
from lowrank_compress.evaluation import harness
from tests.runs import Tiny, contents, done, lrc, printed, refused, times
from tests.tiny import save_tiny

Finished = Callable[[str], Path]

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with one lm-eval task and its data."""
    place = tmp_path / "tasks"
    place.mkdir()
    rows = [{"query": "the quick brown", "choices": [" fox", " dog"], "gold": i % 2} for i in range(6)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (place / "tiny_choice.yaml").write_text(TASK.format(data=place / "data.jsonl"))
    return place


def slow_perplexity(model_path: Path, text: str) -> tuple[float, int]:
    """Score windows of [bos] + 159 tokens one at a time."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_path).eval(),
        AutoTokenizer.from_pretrained(model_path),
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for first in range(0, len(ids), 159):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[first : first + 159]]])
        with torch.no_grad():
            scores = model(window).logits.double().log_softmax(-1)[0, :-1]
        total -= float(scores.gather(1, window[0, 1:, None]).sum())
    return math.exp(total / len(ids)), len(ids)


def test_a_run_is_measured_beside_its_original(tiny: Tiny, finished: Finished):
    run = finished("auto")
    found = done("eval", run, "--perplexity", tiny.heldout, "--json").json
    assert set(found) == {"perplexity", "classification", "tasks", "size"}
    assert found["classification"] == found["tasks"] == {}
    (values,) = found["perplexity"].values()
    assert list(found["perplexity"]) == [str(tiny.heldout)]
    for role, path in (("compressed", run / "model"), ("dense", tiny.model)):
        expected, tokens = slow_perplexity(path, tiny.heldout.read_text())
        assert values[role] == pytest.approx(expected, rel=1e-5)
        assert values["tokens"] == tokens

    report = json.loads((run / "model" / "lowrank.json").read_text())
    size = found["size"]
    blocks = {"compressed": report["stored_elements"], "dense": report["claimed_elements"]}
    assert size["blocks"] == blocks | {"ratio": pytest.approx(report["reached_ratio"])}
    outside = size["model"]["dense"] - blocks["dense"]
    assert size["model"]["compressed"] == blocks["compressed"] + outside
    assert size["model"]["ratio"] == pytest.approx(1 - size["model"]["compressed"] / size["model"]["dense"])
    assert (size["asked_ratio"], size["ratio_of"]) == (0.3, "blocks")


def test_perplexity_by_position(tiny: Tiny, finished: Finished):
    run = finished("auto")
    asked = ("eval", run, "--perplexity", tiny.heldout, "--seq-len", 100)
    whole = done(*asked, "--json").json["perplexity"][str(tiny.heldout)]
    found = done(*asked, "--by-position", "--json").json["perplexity"][str(tiny.heldout)]
    parts = found.pop("positions")
    assert found == whole
    assert list(parts) == ["0-31", "32-63", "64-99"]
    assert sum(part["tokens"] for part in parts.values()) == whole["tokens"]
    for role in ("dense", "compressed"):
        nats = sum(part["tokens"] * math.log(part[role]) for part in parts.values())
        assert math.exp(nats / whole["tokens"]) == pytest.approx(whole[role], rel=1e-6)
    assert "of tokens 32-63 of a window" in done(*asked, "--by-position").out
    # What was measured without is not measured again, and not replaced.
    assert done(*asked, "--json").json["perplexity"][str(tiny.heldout)] == whole


def test_positions_are_of_texts(tiny: Tiny):
    assert "pass --perplexity TEXT" in refused("eval", tiny.model, "--by-position")
    with pytest.raises(InputError, match="lrc eval does"):
        compare(tiny.model, tiny.model, perplexity=tiny.heldout, by_position=True)


def test_a_plain_checkpoint_is_dense_and_nothing_is_written(tiny: Tiny):
    before = contents(tiny.model.parent)
    found = done("eval", tiny.model, "--perplexity", tiny.heldout, "--json").json
    assert set(found["perplexity"][str(tiny.heldout)]) == {"dense", "tokens"}
    assert set(found["size"]["blocks"]) == set(found["size"]["model"]) == {"dense"}
    assert contents(tiny.model.parent) == before


def test_evaluations_are_kept_and_merged(tiny: Tiny, finished: Finished, tmp_path: Path):
    run = finished("svd")
    first = done("eval", run, "--perplexity", tiny.heldout, "--json").json
    kept = times(run / "eval")
    again = lrc("eval", run, "--perplexity", tiny.heldout, "--json")
    assert (again.json, again.err) == (first, "")
    assert times(run / "eval") == kept
    second = done("eval", run, "--perplexity", tiny.heldout, "--seq-len", 16, "--json").json
    assert second["perplexity"] != first["perplexity"]
    merged = json.loads((run / "eval" / "metrics.json").read_text())["evaluations"]
    directories = {path.name for path in (run / "eval").iterdir() if path.is_dir()}
    assert set(merged) == directories
    assert len(directories) == 2
    assert {entry["config"]["seq_len"] for entry in merged.values()} == {None, 16}
    assert [entry["perplexity"] for entry in merged.values() if entry["config"]["seq_len"]] == [second["perplexity"]]
    assert done("verify", run, "--json").json["ok"] is True


def test_people_see_a_table(tiny: Tiny, finished: Finished):
    run = finished("auto")
    said = done("eval", run, "--perplexity", tiny.heldout)
    assert "perplexity · heldout.txt" in said.out
    assert "Asked: 30.00% of the parameters inside the blocks; reached: 30.0" in said.out
    assert "perplexity · heldout.txt" in done("eval", tiny.model, "--perplexity", tiny.heldout).out


def test_the_calibration_text_is_refused_by_content(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, copy = finished("auto"), tmp_path / "copy.txt"
    copy.write_bytes(tiny.text.read_bytes())
    for name in (tiny.text, copy):
        message = refused("eval", run, "--perplexity", tiny.heldout, "--perplexity", name)
        assert f"{name} is the text that this run was calibrated on" in message
        assert "--force" in message
    assert not (run / "eval").exists()
    assert str(copy) in done("eval", run, "--perplexity", copy, "--force", "--json").json["perplexity"]


def test_bad_input(tiny: Tiny, finished: Finished, tmp_path: Path):
    run, empty = finished("svd"), tmp_path / "empty.txt"
    empty.write_text("")
    for options, message in (
        (["--perplexity", "/no/such.txt"], "/no/such.txt does not exist"),
        (["--perplexity", empty], "holds no text"),
        (["--perplexity", tiny.heldout, "--seq-len", 161], "--seq-len 161 is more than the model's 160 positions"),
        (["--classification", tiny.heldout], "for a language model use --perplexity"),
    ):
        assert message in refused("eval", run, *options)
    assert not (run / "eval").exists()


def test_a_changed_original_is_refused(tiny: Tiny, tmp_path: Path):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny.model, model)
    done("compress", model, *tiny.options(run, "svd")[1:])
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "its files have changed since" in refused("eval", run, "--perplexity", tiny.heldout)


@pytest.mark.slow
def test_local_tasks_without_a_network(finished: Finished, tasks: Path, tmp_path: Path):
    """In a process of its own, so that whatever lm-eval writes on stdout is seen."""
    asked = ("eval", finished("auto"), "--include-path", tasks, "--json", "--tasks")
    code, out, err = printed(tmp_path, (*asked, "tiny_choice"), (*asked, "tiny_chioce"))
    assert code == 2
    values = json.loads(out)["tasks"]["tiny_choice"]
    # The six examples differ in their answer only, and that is the first choice in half of them.
    assert values["dense"]["acc"] == values["compressed"]["acc"] == 0.5
    message = " ".join(err.split())
    assert "lm-eval knows no task 'tiny_chioce'" in message
    assert "Tasks of --include-path: tiny_choice" in message
    assert "Traceback" not in message


def test_a_task_directory_must_exist(finished: Finished, tasks: Path):
    run = finished("svd")
    assert "is no directory" in refused("eval", run, "--tasks", "tiny_choice", "--include-path", tasks / "nowhere")


def test_the_checkpoint_inside_a_run_is_guarded_like_the_run(tiny: Tiny, finished: Finished):
    model = finished("auto") / "model"
    assert "is the text that this run was calibrated on" in refused("eval", model, "--perplexity", tiny.text)
    assert done("eval", model, "--perplexity", tiny.text, "--force", "--json").json["perplexity"]


def test_a_method_without_data_has_no_calibration_text(tiny: Tiny, finished: Finished):
    assert done("eval", finished("svd"), "--perplexity", tiny.text, "--json").json["perplexity"]


def test_tasks_need_a_language_model(tasks: Path, tmp_path: Path):
    model = save_tiny("bert", tmp_path / "bert", "classification")
    message = refused("eval", model, "--tasks", "local_copa", "--include-path", tasks)
    assert "--tasks needs a causal language model" in message


@pytest.mark.slow
def test_processes_of_torchrun_share_the_requests(finished: Finished, tasks: Path):
    words = ["fox", "dog", "the", "over", "lazy", "quick", "brown"]
    rows = [{"query": f"the {word}", "choices": [" fox", " jumps over"], "gold": i % 2} for i, word in enumerate(words)]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    run = finished("svd")
    asked = ["eval", str(run), "--tasks", "tiny_choice", "--include-path", str(tasks), "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "lowrank_compress"]
    ran = subprocess.run([*launcher, *asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(run / "eval")
    assert json.loads(ran.stdout)["tasks"] == done(*asked).json["tasks"]


def test_only_the_first_process_must_have_results():
    assert harness._by_task(None, 1) == {}
    with pytest.raises(InputError, match="LOCAL_RANK is set"):
        harness._by_task(None, 0)


def test_examples_before_each_and_chat_templates_reach_lm_eval(
    finished: Finished, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    heard, real = [], lm_eval.simple_evaluate

    def evaluate(**options: Any) -> Any:
        heard.append((options["num_fewshot"], options["apply_chat_template"]))
        return real(**options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    run = finished("svd")
    asked = ("eval", run, "--include-path", tasks, "--tasks", "tiny_choice", "--num-fewshot", "1")
    done(*asked)
    assert heard == [(1, False)] * 2
    assert "expected a tokenizer with a chat template" in refused(*asked, "--apply-chat-template")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    other = run.parent / "checkpoint"
    shutil.copytree(run / "model", other)
    (other / "manifest.json").unlink()
    (other / "chat_template.jinja").write_text(template)
    done("eval", other, *asked[2:], "--apply-chat-template")
    assert heard[2:] == [(1, True)]
