"""The commands that README and the pages of docs/ show, page by page, and a place in which they can be run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.moe import save_moe
from tests.runs import done
from tests.test_embeddings import saved
from tests.test_heads import saved as saved_with_head
from tests.tiny import save_tiny, tiny_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What cannot be run here, by how its words begin or one that is among them, and why.
SKIPPED = {
    "torchrun": "several processes; tests/stages/test_workers.py has them",
    "make": "is about the repository itself",
    "pip": "installs",
    "OWNER/NAME": "a repository on the Hub; tests/cli/test_hub.py has a hub of its own",
    "--push-to-hub": "the same",
    "--install-completion": "changes the files of the user's shell",
    "--show-completion": "asks which shell calls it",
}
# The data that a command would take from the Hub if no other are named, and options that name such.
DOWNLOADED = {
    "compress": ["--calibration", "my-text.txt"],
    "calibrate": ["--calibration", "my-text.txt"],
    "eval": ["--perplexity", "other-text.txt"],
}
# As much work as a test has time for, where a command says nothing of it itself.
_FEW = {"--samples": "8", "--seq-len": "32"}
LITTLE = {
    "compress": _FEW,
    "calibrate": _FEW,
    "quantize": _FEW,
    "recover": {"--steps": "4", "--seq-len": "32"},
    "bench": {"--rounds": "1", "--new-tokens": "2", "--prompt-tokens": "8"},
}
NAMING = {"--calibration", "--perplexity", "--tasks", "--classification", "--sts", "--config"}
# Words of pages that stand for the reader's own.
STANDING_FOR = {
    "RUN": "runs/mine",
    "MODEL": "./my-model",
    "ORIGINAL": "./my-model",
    "CHECKPOINT": "runs/mine/model",
    "RUN_OR_CHECKPOINT": "runs/mine",
    "TEXT": "my-text.txt",
}
# Runs in the place of those named, where it takes one of another kind: with blocks of one shape, or of embeddings.
OTHERS = {"--native": {"runs/mine": "runs/narrow"}, "--sts": {"runs/other": "runs/minilm-other"}}
HEADS = {
    "my-masked-model": "BertForMaskedLM",
    "my-tagger": "BertForTokenClassification",
    "my-reader": "BertForQuestionAnswering",
    "my-reward-model": "LlamaForSequenceClassification",
    "my-regression": "BertForSequenceClassification",
    "my-tags": "BertForSequenceClassification",
}
SETTINGS = {"my-tags": {"num_labels": 3, "problem_type": "multi_label_classification"}}
SWEEP = """
model: ./my-model
methods: [svd]
ratios: [0.3]
calibrations: [my-text.txt]
options: {samples: 8, seq_len: 64}
evaluate: {perplexity: [other-text.txt], seq_len: 64}
"""


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    line: str
    in_block: bool = True

    @property
    def words(self) -> list[str]:
        """Its words, without comments and what says that there may be more."""
        return [word for word in shlex.split(self.line, comments=True) if word != "…"]

    @property
    def spoken_of(self) -> bool:
        """Whether it is but named."""
        return len(self.words) < 3 and self.words[0] == "lrc" and not self.words[-1].startswith("--")

    @property
    def skipped(self) -> str | None:
        """Why it is not run, if it is not."""
        return next((why for word, why in SKIPPED.items() if word in self.words), None)

    def runnable(self, number: int) -> list[str]:
        """What follows ``lrc``, with names in the place of what stands for them, and no data of the Hub.

        `number` is that of the command, of which outputs get names of their own.
        """
        name, *rest = self.words[1:]
        words = [STANDING_FOR.get(word, f"made-{number}" if word in ("OUT", "DIRECTORY") else word) for word in rest]
        for option, others in OTHERS.items():
            if option in words:
                words = [others.get(word, word) for word in words]
        if "--tasks" in words:
            place = words.index("--tasks")
            words[place + 1 : place + 2] = ["tiny_choice", "--include-path", "tasks"]
        more = [] if NAMING & set(words) else DOWNLOADED.get(name, [])
        little = {} if "--config" in words else LITTLE.get(name, {})
        if name == "compress" and "--bytes" in words:
            little = little | {"--mix": "quantized"}
        return [name, *words, *more, *(word for each in little.items() if each[0] not in words for word in each)]


def commands_of(page: Path) -> list[Command]:
    """Find the command lines of a page: those in blocks, and then those in its sentences."""
    text = page.read_text(encoding="utf-8")
    shell = [line for kind, block in _BLOCK.findall(text) if kind == "bash" for line in block.splitlines()]
    inline = re.findall(r"`((?:lrc|torchrun|make)\s[^`]+)`", _BLOCK.sub("", text))
    found = [Command(page.name, line.strip()) for line in shell if line.strip() and not line.startswith("#")]
    return found + [Command(page.name, " ".join(line.split()), False) for line in inline]


def commands() -> dict[str, list[Command]]:
    """Name by page the commands that are to be run, each where it first stands."""
    found: dict[str, list[Command]] = {}
    seen: set[tuple[str, ...]] = set()
    for page in PAGES:
        for command in commands_of(page):
            if command.spoken_of:
                continue
            words = tuple(command.words if command.skipped else command.runnable(0))
            if words in seen:
                continue
            seen.add(words)
            found.setdefault(page.name, []).append(command)
    return found


def furnish(place: Path) -> None:
    """Make in a directory all that commands name: models, texts, tables, recipes and finished runs."""
    save_tiny("llama", place / "my-model", max_position_embeddings=1100)
    save_moe("mixtral", place / "my-mixture")
    save_tiny("bert", place / "classifier", "classification")
    for seed, name in enumerate(("my-text.txt", "other-text.txt", "wiki.txt", "code.txt", "mine.txt")):
        (place / name).write_text(tiny_text(12_000 if name == "my-text.txt" else 5000, seed=seed))
    (place / "dev.tsv").write_text("sentence\tlabel\n" + "".join(f"the quick brown {n}\t{n % 3}\n" for n in range(9)))
    pairs = "".join(f"the fox {n}\tthe dog {n * n}\t{n % 5}\n" for n in range(9))
    (place / "pairs.tsv").write_text(f"sentence1\tsentence2\tscore\n{pairs}")
    shutil.copytree(ROOT / "configs", place / "configs")
    (place / "configs/sweeps/methods.yaml").write_text(SWEEP)
    recipe = place / "configs/svd-llm.yaml"
    recipe.write_text(re.sub(r"^samples:.*", "samples: 16\nseq_len: 64", recipe.read_text(), flags=re.MULTILINE))
    _task(place / "tasks")
    _heads(place)
    sentences, text = saved(place)
    own = ("--config", recipe, "--calibration", place / "my-text.txt")
    runs = place / "runs"
    done("compress", place / "my-model", *own, "--out", runs / "mine")
    done("compress", place / "my-model", "--method", "svd", "--ratio", 0.2, "--out", runs / "other")
    narrow = ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths")
    done("compress", place / "my-model", *narrow, "--ratio", 0.2, *own[2:], "--out", runs / "narrow")
    done("compress", place / "classifier", "--method", "svd", "--ratio", 0.2, "--out", runs / "sst2")
    done("compress", place / "my-tagger", "--method", "svd", "--ratio", 0.2, "--out", runs / "tagger")
    for method, name in (("svd-llm", "minilm"), ("svd", "minilm-other")):
        done("compress", sentences, "--method", method, "--ratio", 0.2, *text, "--out", runs / name)


def _heads(place: Path) -> None:
    """Make models with other heads, and the tables that these are trained on."""
    for name, head in HEADS.items():
        saved_with_head(head, place / "heads", **SETTINGS.get(name, {}))[0].rename(place / name)
    texts = {name: tiny_text(1500, seed=seed).split() for seed, name in enumerate(("train", "dev"), start=7)}
    lines = {name: [words[start : start + 6] for start in range(0, 96, 6)] for name, words in texts.items()}
    tables = {
        name: [{"tokens": each, "ner_tags": [f"LABEL_{len(word) % 5}" for word in each]} for each in found]
        for name, found in lines.items()
    }
    tables["squad"] = [
        {"question": each[0], "context": " ".join(each[1:]), "answers": each[3]} for each in lines["dev"]
    ]
    tables["pairs"] = [{"chosen": " ".join(each), "rejected": " ".join(each[:4])} for each in lines["dev"]]
    tables["more"] = [{"text": " ".join(each)} for each in lines["dev"]]
    flags = [f"{' '.join(each).replace(',', '')},{n % 2},{n % 3 % 2},0" for n, each in enumerate(lines["train"])]
    (place / "train.csv").write_text("\n".join(["comment,toxic,insult,threat", *flags, ""]))
    for name, rows in tables.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _task(place: Path) -> None:
    """Write a task for lm-eval that needs no network."""
    place.mkdir()
    rows = [{"query": "the quick brown", "choices": [" fox", " dog"], "gold": n % 2} for n in range(4)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(place / "data.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (place / "tiny_choice.yaml").write_text(json.dumps(settings))
