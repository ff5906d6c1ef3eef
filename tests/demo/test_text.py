import ast
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_compress.demo import MODEL_DIRECTORY, text
from lowrank_compress.errors import CalibrationError, InputError

# All in one process: the corpus of the whole documentation is made but once there.
pytestmark = pytest.mark.xdist_group("documentation")

PARTS: tuple[text.Part, ...] = get_args(text.Part)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of three modules, with what must be skipped beside them."""
    monkeypatch.setattr(text, "SMALLEST_LIBRARY", 1)
    root = tmp_path / "library"
    copied = "This sentence is long enough to be recognised as a copy of another."
    sources = {
        "alpha.py": f'"""Alpha.\n\n{copied}\n"""\n'
        'class A:\n    """Of A."""\n    async def f(self):\n        """Of f."""\n',
        "beta/__init__.py": f'"""Beta.\n\n    {copied}\n"""\ndef g():\n    r"""Of \\g."""\n    x = "no docstring"\n',
        "gamma.py": '# -*- coding: latin-1 -*-\n"""Gamma \xe9."""\nraise RuntimeError("imported")\n',
        "silent.py": "x = 1\n",
        "test/test_alpha.py": '"""A test."""\n',
        "site-packages/foreign.py": '"""Foreign."""\n',
        "idlelib/broken.py": "def (:\n",
    }
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="latin-1")
    return root


def modules_of(library: Path) -> dict[str, str]:
    return {name: content for name, content in text.documents(library) if name.startswith("module:")}


def test_docstrings_are_extracted_without_importing(library: Path) -> None:
    assert modules_of(library) == {
        "module:alpha": (
            "Alpha.\n\nThis sentence is long enough to be recognised as a copy of another.\n\nOf A.\n\nOf f.\n"
        ),
        "module:beta.__init__": "Beta.\n\nOf \\g.\n",
        "module:gamma": "Gamma é.\n",
    }


def test_order_of_files_changes_nothing(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(text.documents(library))
    walk = os.walk

    def reversed_walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, subfolders, files in walk(top):
            subfolders.reverse()
            yield folder, subfolders, files[::-1]

    monkeypatch.setattr(os, "walk", reversed_walk)
    text._corpus.cache_clear()
    assert list(text.documents(library)) == before


def test_new_documents_move_no_other(library: Path) -> None:
    before = {name: text.split(name) for name, _ in text.documents(library)}
    (library / "aardvark.py").write_text('"""A new module that sorts first."""\n')
    text._corpus.cache_clear()
    after = {name: text.split(name) for name, _ in text.documents(library)}
    assert after.pop("module:aardvark") == text.split("module:aardvark")
    assert after == before


@pytest.mark.slow
def test_documents_are_deterministic_and_sorted() -> None:
    first = list(text.documents())
    text._corpus.cache_clear()
    assert list(text.documents()) == first
    names = [name for name, _ in first]
    assert names == sorted(set(names))
    assert all(content.strip() and content.endswith("\n") for _, content in first)
    assert not [name for name in names if ".test." in name or "site-packages" in name or "idlelib" in name]


def test_corpus_is_large_enough() -> None:
    contents = dict(text.documents())
    assert {"topic:assert", "topic:lambda", "module:argparse", "module:asyncio.events"} <= set(contents)
    assert 1_000_000 < sum(map(len, contents.values())) < 4_000_000


@pytest.mark.slow
def test_parts_cover_every_document_once() -> None:
    by_part = {which: [content for name, content in text.documents() if text.split(name) == which] for which in PARTS}
    assert sum(map(len, by_part.values())) == len(list(text.documents()))
    for which in PARTS:
        assert text.part(which) == "\n".join(by_part[which])


def test_parts_share_no_long_paragraph() -> None:
    paragraphs = {
        which: {
            key
            for paragraph in text.part(which).split("\n\n")
            if len(key := " ".join(paragraph.split())) >= text.SHORTEST_COPY
        }
        for which in PARTS
    }
    assert not paragraphs["train"] & paragraphs["heldout"]
    assert not paragraphs["train"] & paragraphs["calibration"]
    assert not paragraphs["calibration"] & paragraphs["heldout"]


def test_part_sizes() -> None:
    """Documents are few and of very different lengths: shares of the text lie loosely around those of the names."""
    sizes = {which: len(text.part(which)) for which in PARTS}
    total = sum(sizes.values())
    assert sizes["train"] > 0.75 * total
    assert 0.03 * total < sizes["calibration"] < 0.15 * total
    assert 0.03 * total < sizes["heldout"] < 0.15 * total


def test_split_has_its_shares() -> None:
    drawn = [text.split(f"name {index}") for index in range(20_000)]
    # Three standard deviations of a binomial share at n = 20000 are below 0.8 percent.
    assert drawn.count("calibration") / len(drawn) == pytest.approx(0.07, abs=0.008)
    assert drawn.count("heldout") / len(drawn) == pytest.approx(0.08, abs=0.008)


def test_split_is_frozen() -> None:
    """The committed model was trained on one split: these documents must stay where they were."""
    assert text.split("module:argparse") == "train"
    assert text.split("topic:calls") == "calibration"
    assert text.split("topic:types") == "heldout"


def test_write_parts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heldout.txt").write_text("stale")
    written = text.write_parts(tmp_path / "out")
    assert written == {which: tmp_path / "out" / f"{which}.txt" for which in ("calibration", "heldout")}
    assert written["heldout"].read_bytes().decode() == text.part("heldout")
    assert written["calibration"].read_bytes().decode() == text.part("calibration")
    assert sorted(os.listdir(tmp_path / "out")) == ["calibration.txt", "heldout.txt"]


def test_write_parts_leaves_no_temporary_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        text.write_parts(tmp_path)
    assert os.listdir(tmp_path) == []


def test_missing_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"expected at least 500,000 characters .* got 0\..*without its \.py files"
    ):
        list(text.documents(tmp_path / "nowhere"))


def test_unknown_part_is_an_error() -> None:
    which: Any = "validation"
    with pytest.raises(InputError, match="expected one of train, calibration, heldout, got 'validation'"):
        text.part(which)


def test_extraction_needs_only_the_standard_library() -> None:
    tree = ast.parse(Path(text.__file__).read_bytes())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in imported if name and name.split(".")[0] in {"torch", "transformers", "numpy"}]


def test_model_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIRECTORY.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected | {"training_info.json"} == set(files)
    assert sum(files.values()) <= 3_000_000
    config = json.loads((MODEL_DIRECTORY / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] <= 1024
    info = json.loads((MODEL_DIRECTORY / "training_info.json").read_text())
    assert 500_000 <= info["parameters"] <= 1_000_000


def test_tokenizer_adds_bos_and_loses_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    sample = "def f(x):\n    return '☃ é'\t# two  spaces\n"
    plain = tokenizer.encode(sample, add_special_tokens=False)
    assert len(tokenizer) <= 1024
    assert tokenizer.encode(sample) == [tokenizer.bos_token_id, *plain]
    assert tokenizer.bos_token_id not in plain
    assert tokenizer.decode(plain) == sample


@torch.no_grad()
def test_model_is_trained() -> None:
    """Perplexity of the first 32 held-out windows: 28.5 when this was written, 354 from token frequencies alone.

    The bound leaves room for the texts of other Python versions.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIRECTORY).eval()
    tokens = torch.tensor(tokenizer.encode(text.part("heldout"), add_special_tokens=False, verbose=False)[: 32 * 255])
    rows = torch.nn.functional.pad(tokens.view(32, 255), (1, 0), value=tokenizer.bos_token_id)
    logits = model(input_ids=rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert math.exp(float(loss)) < 40
