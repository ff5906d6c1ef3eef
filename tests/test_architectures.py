"""Every entry of the architecture table, from a checkpoint to a compressed one, against weights put in by hand."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lowrank_compress
from lowrank_compress.recipe import Recipe
from lowrank_compress.stages.pipeline import claim, compress
from lowrank_compress.stages.plan import make_plan
from lowrank_compress.stages.run import Run
from tests.ordinary import Trace, load, matrix, padded, part_rows, statistics, tokens, traces
from tests.reference import damp, square_root
from tests.tiny import CASES, MODELS, MORE_MODELS, VARIANTS, Task, save_tiny, tiny_text

assert lowrank_compress.__version__  # importing the package is what makes `from_pretrained` understand its checkpoints

SEQ_LEN = 24
# What is used where a recipe says nothing.
FISHER, GRAM, ALPHA = 1e-4, 1e-6, 0.5
LEFT = {"kfac": "out_fisher", "fwsvd": "row_fisher"}
RIGHT = {"kfac": "in_gram", "svd-llm": "in_gram", "asvd": "in_abs"}
# Every architecture meets svd, a method with data and both storages; every method meets both storages.
STORAGES = ("pair", "pivot")
METHODS = ("kfac", "svd-llm")
OTHERS = (("fwsvd", "pivot"), ("asvd", "pair"), ("kfac", "auto"), ("fwsvd", "pair"), ("asvd", "pivot"))
PAIRS: list[tuple[str, str, str]] = []
for _number, (_model_type, _task) in enumerate(CASES):
    _case = f"{_model_type}-{_task}"
    if _number % 4 in (0, 3):
        PAIRS.append((_case, "svd", STORAGES[_number // 4 % 2]))
    PAIRS.append((_case, METHODS[(_number + _number // 4) % 2], STORAGES[(_number + 1) // 2 % 2]))
PAIRS += [(_case, *OTHERS[_number % len(OTHERS)]) for _number, _case in enumerate(VARIANTS)]
# Of those that differ little, the ones with a layout or a block of their own meet the method that takes most.
ALIKE = ("ernie4_5", "arcee", "olmo", "exaone4", "ministral", "ministral3", "seed_oss", "internlm3", "hunyuan_v1_dense")
ALIKE += ("eurobert", "xlm-roberta-xl", "ernie")
PAIRS += [
    (_case, "svd" if _case in ALIKE else "kfac", STORAGES[_number % 2]) for _number, _case in enumerate(MORE_MODELS)
]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint and what it is calibrated on: every row or window of a file."""

    path: Path
    task: Task
    data: Path
    sequences: list[Tensor]
    labels: list[int] | None

    def options(self) -> dict[str, Any]:
        columns = {} if self.task == "lm" else {"text_column": "sentence", "label_column": "label"}
        return {"model": str(self.path), "calibration": str(self.data), "samples": 99, "seq_len": SEQ_LEN, **columns}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("case"))
        return made[name]

    return get


def make(name: str, place: Path) -> Case:
    model_type, task, overrides = (MODELS | MORE_MODELS)[name]
    path = save_tiny(model_type, place / "dense", task, **overrides)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if task == "lm":
        data = place / "text.txt"
        data.write_text(tiny_text(600))
        ids = tokenizer(data.read_text(), add_special_tokens=False)["input_ids"]
        body = SEQ_LEN - 1
        whole = range(0, len(ids) - body + 1, body)
        return Case(path, task, data, [torch.tensor([1, *ids[start : start + body]]) for start in whole], None)
    data = place / "rows.tsv"
    texts = [tiny_text(length, seed=length).replace("\n", " ").strip() for length in range(20, 119)]
    with open(data, "w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["sentence", "label"])
        writer.writerows((text, f"LABEL_{i % 3}") for i, text in enumerate(texts))
    sequences = [torch.tensor(tokenizer(text, truncation=True, max_length=SEQ_LEN)["input_ids"]) for text in texts]
    return Case(path, task, data, sequences, [i % 3 for i in range(len(texts))])


def compressed(case: Case, place: Path, **options: Any) -> Path:
    """Run the whole pipeline and return the checkpoint's directory."""
    decided = make_plan(Recipe(**(case.options() | options)))
    run = Run(place)
    claim(run, decided, overwrite=False)
    compress(decided, run)
    return run.model


def metric(name: str | None, means: dict[str, Tensor], size: int) -> np.ndarray:
    """The square of a metric, (size, size)."""
    if name is None:
        return np.eye(size)
    moment = means[name].numpy()
    if name == "in_abs":
        moment = moment ** (2 * ALPHA)
    return moment if moment.ndim == 2 else np.diag(moment)


def truncated(weight: Tensor, method: str, seen: list[Trace], terms: int, rank: int) -> tuple[Tensor, float, float]:
    """The best matrix of a rank from the SVD of L W R; its loss, and the loss at rank 0."""
    means = statistics(seen, weight, terms)
    rows, columns = weight.shape
    left, right = metric(LEFT.get(method), means, rows), metric(RIGHT.get(method), means, columns)
    # The smaller side is damped where there is anything to damp, the larger one where its metric is full.
    if method in LEFT and (rows <= columns or LEFT[method] == "out_fisher"):
        left = damp(left, FISHER)
    if method in RIGHT and (rows > columns or RIGHT[method] != "in_abs"):
        right = damp(right, GRAM)
    left, right = square_root(left), square_root(right)
    dense = weight.detach().numpy()
    u, s, v = np.linalg.svd(left @ dense @ right, full_matrices=False)
    if rows <= columns:
        best = np.linalg.solve(left, u[:, :rank] @ u[:, :rank].T @ left) @ dense
    else:
        best = dense @ np.linalg.solve(right, v[:rank].T @ v[:rank] @ right).T
    return torch.from_numpy(best), float((s[rank:] ** 2).sum()), float((s**2).sum())


def put(model: PreTrainedModel, target: str, new: Tensor) -> None:
    """Write a target's weight (out, in) where the model keeps it."""
    path, rows = part_rows(model, target)
    module: Any = model.get_submodule(path)
    with torch.no_grad():
        if isinstance(module, Conv1D):
            module.weight[:, rows] = new.T
        else:
            module.weight[rows] = new


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits of some padded sequences, at real tokens where they are a language model's."""
    ids, mask = padded(tokens(19, 14, 17))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[mask.bool()] if logits.ndim == 3 else logits


@pytest.mark.parametrize(("name", "method", "storage"), PAIRS)
def test_equals_the_dense_model_with_truncated_weights(
    name: str, method: str, storage: str, cases: Any, tmp_path: Path
) -> None:
    case: Case = cases(name)
    out = compressed(case, tmp_path / "run", method=method, storage=storage, ratio=0.3)
    report = json.loads((out / "lowrank.json").read_text())
    by_hand = load(case.path, case.task)
    dense = logits_of(by_hand)
    seen, terms = traces(by_hand, list(report["matrices"]), case.sequences, case.labels)
    formats = set()
    for target, entry in report["matrices"].items():
        weight = matrix(by_hand, target).clone()
        assert list(weight.shape) == entry["shape"]
        formats.add(entry["format"])
        if entry["rank"] is None:
            continue
        new, loss, total = truncated(weight, method, seen[target], terms, entry["rank"])
        put(by_hand, target, new)
        predicted = loss / 2 if method == "kfac" else loss / total
        assert entry["predicted_loss"] == pytest.approx(predicted, rel=1e-3, abs=1e-7 * total)
    assert formats <= ({storage} if storage != "auto" else {"pair", "pivot", "dense"})
    found = load(out, case.task)
    expected, logits = logits_of(by_hand), logits_of(found)
    # Statistics are taken in float32, and a basis is kept in float32.
    scale = (expected - dense).abs().max()
    assert scale > 0.1
    assert (logits - expected).abs().max() <= (1e-5 if method == "svd" else 1e-3) * scale
    assert_rest_is_untouched(case, out)
    if case.task == "lm" and method != "svd":
        assert_cache_does_not_matter(found)


def assert_rest_is_untouched(case: Case, out: Path) -> None:
    """Biases, norms, embeddings and heads are the dense model's, bit by bit; what was tied is tied."""
    dense, found = (load(path, case.task, torch.float32) for path in (case.path, out))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    state = found.state_dict()
    kept = [name for name in dense.state_dict() if name.removesuffix(".weight") not in settings]
    assert len(kept) + len(settings) == len(dense.state_dict())
    for name in kept:
        assert torch.equal(state[name], dense.state_dict()[name]), name
    if dense.config.tie_word_embeddings and case.task == "lm":
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight  # pyright: ignore
    stored = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert len(stored) == len(set(stored)) == len(state) - len(found.all_tied_weights_keys)


def assert_cache_does_not_matter(model: PreTrainedModel) -> None:
    prompt = torch.stack(tokens(7, 7))
    made = [
        model.generate(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False, use_cache=cache)  # pyright: ignore
        for cache in (True, False)
    ]
    assert made[0].shape == (2, 17)
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["gpt2-lm", "bert-classification", "phi3-lm", "opt-lm"])
@pytest.mark.parametrize("storage", STORAGES)
def test_afm_keeps_the_mean_output(name: str, storage: str, cases: Any, tmp_path: Path) -> None:
    """Where a layer has a bias, the mean of its outputs on the calibration set's dense inputs is the dense one."""
    case: Case = cases(name)
    warned = pytest.warns(UserWarning, match="restores the mean through biases")
    with warned if name == "phi3-lm" else nullcontext():
        out = compressed(case, tmp_path / "run", method="afm", storage=storage, ratio=0.5)
    dense, found = load(case.path, case.task), load(out, case.task)
    targets = list(json.loads((out / "lowrank.json").read_text())["matrices"])
    seen, _ = traces(dense, targets, case.sequences, case.labels)
    for target in targets:
        path, rows = part_rows(dense, target)
        x = torch.cat([trace.x for trace in seen[target]])
        with torch.no_grad():
            before, after = (model.get_submodule(path)(x)[:, rows] for model in (dense, found))
        lost = (after - before).norm() / before.norm()
        assert lost > 1e-3
        mean = (after - before).mean(0).abs().max() / before.abs().max()
        assert (mean < 1e-5) == (dense.get_submodule(path).bias is not None), (target, float(mean))


OTHER_NAMES = {
    "gpt2-lm": lambda name: name.removeprefix("transformer."),
    "llama-lm": lambda name: name.removeprefix("model."),
    "llama-tied": lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name,
    "gpt_neox-lm": lambda name: name.replace("embed_out", "lm_head"),
    "bert-classification": lambda name: (
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta")
    ),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_on_disk_do_not_matter(name: str, cases: Any, tmp_path: Path) -> None:
    """Checkpoints of old libraries and of base models give the same compressed model as their usual form."""
    case: Case = cases(name)
    other = tmp_path / "other"
    shutil.copytree(case.path, other)
    state = load_file(case.path / "model.safetensors")
    renamed = {OTHER_NAMES[name](key): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    options = {"method": "svd", "ratio": 0.3, "storage": "pivot"}
    usual = load(compressed(case, tmp_path / "usual", **options), case.task, torch.float32)
    found = load(compressed(case, tmp_path / "found", **options, model=str(other)), case.task, torch.float32)
    assert found.state_dict().keys() == usual.state_dict().keys()
    for key, tensor in usual.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    assert torch.equal(logits_of(found), logits_of(usual))
