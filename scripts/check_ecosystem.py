"""Try programs that know nothing of this package on compressed checkpoints, and write the table of docs/serving.md.

Each runs in a process of its own where the package cannot be imported (but where the row says otherwise), on
checkpoints of one small Llama in every form: pairs, pivots, narrower heads and MLPs (modegpt), and a native export.
Programs may also lie in directories of PYTHONPATH. Usage, from the root of the repository::

    python scripts/check_ecosystem.py MODEL TEXT --write docs/serving.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from running import write_between

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 540  # seconds a program
FORMS = {
    "pair": ("--method", "svd-llm", "--storage", "pair"),
    "pivot": ("--method", "svd-llm", "--storage", "pivot"),
    "modegpt": ("--method", "modegpt"),
    "native": ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths", "--ratio", "0.1"),
}
# Python finds this by PYTHONPATH before anything else: as if the package were not installed.
ABSENT = 'import sys\nsys.modules["lowrank_compress"] = None\n'
TASK = """task: check
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
PIPELINE = (
    "import sys, transformers as t; "
    "said = t.pipeline('text-generation', sys.argv[1], trust_remote_code=True)('Once', max_new_tokens=5); "
    "assert said[0]['generated_text']"
)
LOAD = (
    "import sys, torch, transformers as t; "
    "model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval(); "
    "ids = torch.tensor([[1, 5, 9, 30]]); "
)
EXPORT = LOAD + (
    "program = torch.export.export(model, (), dict(input_ids=ids, use_cache=False), strict=False); "
    "torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, "
    "model(input_ids=ids, use_cache=False).logits)"
)
COMPILE = LOAD + (
    "made = torch.compile(model, fullgraph=True, backend='aot_eager'); torch.no_grad().__enter__(); "
    "torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, "
    "model(input_ids=ids, use_cache=False).logits)"
)
ONNX = LOAD + (
    "import tempfile, onnxruntime; place = tempfile.mkdtemp() + '/model.onnx'; "
    "run = lambda self, ids: self.model(input_ids=ids, use_cache=False).logits; "
    "made = type('Logits', (torch.nn.Module,), {'forward': run})(); made.model = model; "
    "torch.onnx.export(made.eval(), (ids,), place, dynamo=True, verbose=False); "
    "session = onnxruntime.InferenceSession(place, providers=['CPUExecutionProvider']); "
    "(found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()}); "
    "torch.testing.assert_close(torch.from_numpy(found), made(ids), rtol=1e-3, atol=1e-3)"
)
# A step, and merged: the same as before; saved and loaded again, too.
LORA = LOAD + (
    "import peft, tempfile; place = tempfile.mkdtemp(); names = sys.argv[2:] or None; "
    "config = peft.LoraConfig(r=2, target_modules=names[0] if names == ['all-linear'] else names, "
    "task_type='CAUSAL_LM'); made = peft.get_peft_model(model, config); "
    "step = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1.0); "
    "before = made(input_ids=ids, labels=ids).loss; before.backward(); step.step(); "
    "after = made.eval()(input_ids=ids, labels=ids); assert after.loss < before; "
    "merged = made.merge_and_unload(); merged.save_pretrained(place); "
    "again = t.AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval(); "
    "[torch.testing.assert_close(one(input_ids=ids).logits, after.logits, rtol=1e-3, atol=1e-3) "
    "for one in (merged, again)]"
)
SFT = LOAD + (
    "import datasets, peft, tempfile, trl; tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1]); "
    "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token; "
    "data = datasets.Dataset.from_list([{'text': 'Once upon a time there was a frog.'}] * 4); "
    "settings = trl.SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=2, "
    "report_to='none', use_cpu=True, bf16=False, max_length=32); "
    "trainer = trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, "
    "peft_config=peft.LoraConfig()); trainer.train(); made = trainer.model.eval(); "
    "after = made(input_ids=ids).logits; "
    "torch.testing.assert_close(made.merge_and_unload()(input_ids=ids).logits, after, rtol=1e-3, atol=1e-3)"
)
EMBED = (
    "import sys, sentence_transformers as s; "
    "model = s.SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu'); "
    "model.tokenizer.pad_token = model.tokenizer.eos_token; "
    "assert model.encode(['Once upon a time', 'A frog']).shape[0] == 2"
)
NATIVELY = (
    "import sys, transformers as t; "
    "model, found = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True); "
    "assert not any(found[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))"
)
EVALUATE = ("run", "--model", "hf", "--model_args", "pretrained={model},trust_remote_code=True", "--tasks", "check")
EVALUATE = (*EVALUATE, "--include_path", "{tasks}", "--limit", "4", "--device", "cpu", "--batch_size", "4")


@dataclass(frozen=True)
class Row:
    """A program: the package that it is of, how the table shows its command, and the words after `python`."""

    package: str
    shown: str
    words: tuple[str, ...]
    forms: tuple[str, ...] = tuple(FORMS)
    installed: bool = False


ROWS = (
    Row("transformers", "`pipeline(…, trust_remote_code=True)`", ("-c", PIPELINE, "{model}")),
    Row(
        "lm_eval",
        "`lm_eval run --model hf --model_args pretrained=…,trust_remote_code=True`",
        ("-m", "lm_eval", *EVALUATE),
    ),
    Row(
        "lm_eval",
        "`python -m lowrank_compress.launch lm_eval run --model hf --model_args pretrained=…`",
        (
            "-m",
            "lowrank_compress.launch",
            "lm_eval",
            *(word.replace(",trust_remote_code=True", "") for word in EVALUATE),
        ),
        installed=True,
    ),
    Row(
        "accelerate",
        "`accelerate launch -m lm_eval run …`",
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lm_eval", *EVALUATE),
    ),
    Row("torch", "`torch.export.export`", ("-c", EXPORT, "{model}")),
    Row("torch", "`torch.compile(fullgraph=True)`", ("-c", COMPILE, "{model}")),
    Row("onnxruntime", "`torch.onnx.export(…, dynamo=True)`", ("-c", ONNX, "{model}")),
    Row(
        "peft",
        '`LoraConfig(target_modules=["q_proj", "v_proj"])`, a step, merged, saved, loaded',
        ("-c", LORA, "{model}", "q_proj", "v_proj"),
    ),
    Row("peft", "`LoraConfig()`, the same", ("-c", LORA, "{model}")),
    Row("peft", '`LoraConfig(target_modules="all-linear")`, the same', ("-c", LORA, "{model}", "all-linear")),
    Row("trl", "`SFTTrainer(…, peft_config=LoraConfig())`, a step, merged", ("-c", SFT, "{model}")),
    Row("sentence_transformers", "`SentenceTransformer(…, trust_remote_code=True)`", ("-c", EMBED, "{model}")),
    Row(
        "transformers", "`from_pretrained(…)` without package and remote code", ("-c", NATIVELY, "{model}"), ("native",)
    ),
)


def run(words: Sequence[str], place: Path, *, installed: bool) -> str:
    """Run a program; return what went wrong, or nothing."""
    paths = [str(ROOT if installed else place / "absent"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", *words]
    try:
        done = subprocess.run(
            command, env=environment, cwd=place, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:200]


def made(form: str, model: Path, text: Path, place: Path) -> Path:
    """Compress a model in one form, and return the checkpoint."""
    out = place / form
    options = [*map(str, ("compress", model, "--ratio", "0.2", "--calibration", text, "--out", out)), *FORMS[form]]
    sized = ["--samples", "32", "--seq-len", "128"]
    if problem := run(["-m", "lowrank_compress", *options, *sized], place, installed=True):
        raise SystemExit(f"{form} cannot be made: {problem}")
    if form != "native":
        return out / "model"
    exported = place / "native-checkpoint"
    words = ["-m", "lowrank_compress", "export", str(out), "--native", str(exported)]
    if problem := run(words, place, installed=True):
        raise SystemExit(f"{form} cannot be exported: {problem}")
    return exported


def version_of(package: str) -> str:
    """Return the installed version of a package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(
    model: Annotated[Path, typer.Argument(help="A small Llama.")],
    text: Annotated[Path, typer.Argument(help="Text to calibrate on.")],
    only: Annotated[str, typer.Option(help="Rows of programs whose names or commands hold one of these words.")] = "",
    write: Annotated[Path | None, typer.Option(help="File whose table is replaced.")] = None,
) -> None:
    """Print the table, and exit with 1 if a program that is installed fails."""
    lines = ["| tool | version | command | " + " | ".join(FORMS) + " |", "|---|---|---|" + "---|" * len(FORMS)]
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "absent").mkdir()
        (place / "absent" / "sitecustomize.py").write_text(ABSENT, encoding="utf-8")
        (place / "tasks").mkdir()
        documents = [{"query": "Once upon a", "choices": [" time", " frog"], "gold": 0} for _ in range(4)]
        data = place / "tasks" / "check.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8")
        (place / "tasks" / "check.yaml").write_text(TASK % data, encoding="utf-8")
        checkpoints = {form: made(form, model.resolve(), text.resolve(), place) for form in FORMS}
        for row in (row for row in ROWS if any(word in f"{row.package} {row.shown}" for word in only.split(","))):
            cells = []
            for form in FORMS:
                if form not in row.forms:
                    cells.append("–")
                    continue
                if not version_of(row.package):
                    cells.append("not installed")
                    continue
                model_at, tasks_at = str(checkpoints[form]), str(place / "tasks")
                words = [word.replace("{model}", model_at).replace("{tasks}", tasks_at) for word in row.words]
                problem = run(words, place, installed=row.installed)
                cells.append("works" if not problem else "**fails**")
                if problem:
                    problems.append(f"{row.shown}, {form}: {problem}")
                typer.echo(f"{row.package} {form}: {problem or 'works'}", err=True)
            lines.append(f"| {row.package} | {version_of(row.package)} | {row.shown} | " + " | ".join(cells) + " |")
            if write is not None:
                # After each row, so that what was tried is kept if the rest takes too long.
                write_between(write, "ecosystem", "\n".join(lines))
    typer.echo("\n".join(lines))
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
