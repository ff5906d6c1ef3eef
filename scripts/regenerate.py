"""Make the checkpoints of the recipes in configs/ again from nothing, and notice when a byte changes.

The model is the demo's. The text is ``configs/expected/calibration.txt``, sampled from that model, because the demo's
own text changes with the Python version. For the classifier's recipe the model has a classification head on it, and
each line of the text is an example; for that of mixtures its MLPs are cut into experts.

For each recipe, each step in a process of its own:

1. It is made and compared with ``configs/expected/RECIPE.json``. Where versions, processor and threads are those that
   the expectation was written with, the bytes must be the same; elsewhere the weights must be within the tolerance, and
   what differs is reported.
2. It is made a second time, and the bytes must be those of the first: this holds on every machine.

The runs and a report of each comparison are left in OUT/RECIPE/, a summary in OUT/report.md. Exit code 1 if anything is
not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from lowrank_compress.demo import text as demo_text
from lowrank_compress.stages.description import expect
from lowrank_compress.stages.expectation import write_expectation
from lowrank_compress.stages.run import Run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
MODEL = Path(demo_text.__file__).parent / "model"
# Sums depend on the number of threads; one is to be had everywhere.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DIFFERENT, WITHIN = 2, 3
EXPERTS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a recipe: whether it is as it must be, and a sentence on each comparison."""

    recipe: str
    good: bool
    repeated: str
    expected: str


def lrc(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; its exit code is the caller's to judge."""
    command = [sys.executable, "-m", "lowrank_compress", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT | os.environ, text=True, capture_output=True)


def succeed(*words: object) -> None:
    """Run a command that must succeed."""
    done = lrc(*words)
    if done.returncode:
        raise SystemExit(f"lrc {' '.join(map(str, words))} failed ({done.returncode}):\n{done.stderr.strip()}")


def classifier(place: Path) -> Path:
    """Write the demo's model with a head that tells two classes apart; its weights are the same everywhere."""
    path = place / "classifier"
    path.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(MODEL / "tokenizer.json", path / "tokenizer.json")
    tokenizer = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    padded = tokenizer | {"pad_token": tokenizer["eos_token"]}
    (path / "tokenizer_config.json").write_text(json.dumps(padded, indent=2), encoding="utf-8")
    settings = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    labels = {"id2label": {"0": "even", "1": "odd"}, "label2id": {"even": 0, "odd": 1}}
    settings |= {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False, **labels}
    settings["pad_token_id"] = settings["eos_token_id"]
    (path / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    tensors = {name: tensor for name, tensor in load_file(MODEL / "model.safetensors").items() if "lm_head" not in name}
    width = settings["hidden_size"]
    tensors["score.weight"] = (torch.arange(2 * width).view(2, width) * 37 % 101 - 50) / 512
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def mixture(place: Path) -> Path:
    """Write the demo's model with its hidden units dealt out to experts, as a Mixtral; it is the same everywhere."""
    path = place / "mixture"
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, path / name)
    settings = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    units, width = settings["intermediate_size"] // EXPERTS, settings["hidden_size"]
    shape = {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS // 2, "intermediate_size": units}
    settings |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **shape}
    (path / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    tensors = {}
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        block, mlp, role = name.partition(".mlp.")
        if not mlp:
            tensors[name] = tensor
            continue
        leaf = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[role]
        for number in range(EXPERTS):
            own = tensor[:, number::EXPERTS] if leaf == "w2" else tensor[number::EXPERTS]
            tensors[f"{block}.block_sparse_moe.experts.{number}.{leaf}.weight"] = own.contiguous()
        router = (torch.arange(EXPERTS * width).view(EXPERTS, width) * 37 % 101 - 50) / 512
        tensors[f"{block}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def examples(place: Path, text: Path, columns: tuple[str, str]) -> Path:
    """Write the lines of a text as examples of two classes: of even and of odd length."""
    path = place / "examples.tsv"
    lines = text.read_text(encoding="utf-8").replace("\t", " ").replace('"', "'").splitlines()
    rows = ["\t".join(columns), *(f"{line}\t{len(line) % 2}" for line in lines)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def command(recipe: str, model: Path, text: Path, samples: int, place: Path) -> list[object]:
    """Return the arguments of `lrc compress` for a recipe."""
    path = CONFIGS / f"{recipe}.yaml"
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "label_column" in options:
        model = classifier(place)
        text = examples(place, text, (options["text_column"], options["label_column"]))
    if "experts" in options:
        model = mixture(place)
    return ["compress", model, "--config", path, "--calibration", text, "--samples", samples, "--device", "cpu"]


def regenerate(recipe: str, place: Path, arguments: argparse.Namespace) -> Outcome:
    """Make a recipe's checkpoint twice, and compare it with itself and with what is expected."""
    place.mkdir(parents=True, exist_ok=True)
    first, second, itself = place / "first", place / "second", place / "first.json"
    for run in (first, second):
        if Run(run).exists():
            shutil.rmtree(run)
    words = command(recipe, arguments.model, arguments.text, arguments.samples, place)
    expectation = arguments.expected / f"{recipe}.json"
    if arguments.write:
        succeed(*words, "--out", first)
        write_expectation(expectation, expect(first))
        expected, good = "written", True
    elif not expectation.exists():
        succeed(*words, "--out", first)
        expected, good = "there is none; write it with --write", False
    else:
        check = ["--check", expectation, "--tolerance", arguments.tolerance, "--report", place / "expected.md"]
        expected, good = judge(lrc(*words, "--out", first, *check, "--json"))
    write_expectation(itself, expect(first, place))
    again = lrc(*words, "--out", second, "--check", itself, "--report", place / "repeated.md")
    repeated = "the same bytes" if again.returncode == 0 else last_line(again.stderr)
    return Outcome(recipe, good and again.returncode == 0, repeated, expected)


def judge(done: subprocess.CompletedProcess[str]) -> tuple[str, bool]:
    """Say what a comparison with an expectation found, and whether that is as it must be."""
    if done.returncode == 0:
        return "the same bytes", True
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return last_line(done.stderr), False
    where = "; ".join(f"{each['what']} {each['expected']} → {each['found']}" for each in found["environment"])
    if done.returncode != WITHIN:
        return last_line(done.stderr) + (f" Environment: {where}." if where else ""), False
    if not where:
        return "other bytes in the same environment, although within the tolerance", False
    farthest = max((each["distance"] for each in found["weights"]), default=0.0)
    return f"within the tolerance (farthest weight {farthest:.1e}) in another environment: {where}", True


def last_line(text: str) -> str:
    """Return what a command said last."""
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def summary(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a table."""
    rows = [
        " | ".join(["recipe", "", "made twice", "against configs/expected"]),
        " | ".join(["---"] * 4),
        *(
            " | ".join([each.recipe, "good" if each.good else "**BAD**", each.repeated, each.expected])
            for each in outcomes
        ),
    ]
    return "# Compressed checkpoints made again\n\n" + "\n".join(f"| {row} |" for row in rows) + "\n"


def tell(outcome: Outcome) -> None:
    """Print an outcome; to GitHub also as an annotation, if it is not plain sameness."""
    print(f"{outcome.recipe}: {'good' if outcome.good else 'BAD'}", flush=True)
    print(f"  made twice: {outcome.repeated}\n  against the expectation: {outcome.expected}", flush=True)
    plain = outcome.good and outcome.expected in ("the same bytes", "written")
    if os.environ.get("GITHUB_ACTIONS") and not plain:
        kind = "notice" if outcome.good else "error"
        print(f"::{kind} title={outcome.recipe}::{outcome.repeated}; against the expectation: {outcome.expected}")


def main() -> None:
    """Run."""
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipes", default=",".join(known), help="names without .yaml, separated by commas")
    parser.add_argument("--write", action="store_true", help="write the expectations anew instead of comparing")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples; part of the expectation")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of weights, in another environment")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=CONFIGS / "expected" / "calibration.txt")
    parser.add_argument("--expected", type=Path, default=CONFIGS / "expected", help="directory of expectations")
    parser.add_argument("--out", type=Path, default=Path("runs/regenerate"))
    arguments = parser.parse_args()
    recipes = [name for name in arguments.recipes.split(",") if name]
    if unknown := sorted(set(recipes) - set(known)):
        parser.error(f"no recipe is called {', '.join(unknown)}; there are {', '.join(known)}")
    outcomes = []
    for recipe in recipes:
        outcomes.append(regenerate(recipe, arguments.out / recipe, arguments))
        tell(outcomes[-1])
    (arguments.out / "report.md").write_text(summary(outcomes), encoding="utf-8")
    if os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as page:
            page.write(summary(outcomes))
    if bad := [each.recipe for each in outcomes if not each.good]:
        raise SystemExit(
            f"Not as expected: {', '.join(bad)}. If the change is meant: make regenerate ARGS=--write, and commit."
        )


if __name__ == "__main__":
    main()
