"""What compression does to trained models: the order of the methods, and how far each is from dense.

Random models cannot tell a good method from a bad one. The bounds are orders of size: a third around what was measured
when the test was written (`scripts/sweep.py`), so that they hold on other machines and fail where a method breaks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_compress.demo import MODEL_DIRECTORY
from lowrank_compress.demo.text import write_parts
from tests.runs import done

# A quarter of the calibration set that the numbers are from, which moves them by a few percent.
STORIES = ("--samples", 32, "--seq-len", 256, "--ratio", 0.2)


def perplexity(checkpoint: Path, text: Path, *options: object) -> float:
    """Perplexity of one checkpoint."""
    (values,) = done("eval", checkpoint, "--perplexity", text, "--json", *options).json["perplexity"].values()
    return values["compressed"] if "compressed" in values else values["dense"]


def perplexities(out: Path, text: Path, *options: object) -> tuple[float, float]:
    """Perplexity of a run's model and of its dense original."""
    (values,) = done("eval", out, "--perplexity", text, "--json", *options).json["perplexity"].values()
    return values["compressed"], values["dense"]


@pytest.fixture(scope="module")
def stories(assets: Path, tmp_path_factory: pytest.TempPathFactory):
    """Perplexity of stories260k with 20 % removed over that of the dense model, by method, allocator and storage."""
    text = assets / "text" / "tinystories-calibration.txt"
    heldout = (assets / "text" / "tinystories-dev.txt", "--seq-len", 256, "--limit", 48)
    model = assets / "models" / "stories260k-llama-gqa"
    dense = perplexity(model, *heldout)
    known: dict[tuple[str, str, str], float] = {}

    def measure(method: str, allocate: str, storage: str) -> float:
        if (method, allocate, storage) not in known:
            out = tmp_path_factory.mktemp("stories") / "run"
            choices = ("--method", method, "--allocate", allocate, "--storage", storage)
            done("compress", model, "--calibration", text, *STORIES, *choices, "--out", out)
            known[method, allocate, storage] = perplexity(out / "model", *heldout) / dense
        return known[method, allocate, storage]

    return measure


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.xdist_group("stories")
@pytest.mark.parametrize(
    ("choice", "measured"),
    [
        (("svd", "uniform", "pair"), 178),
        (("svd", "uniform", "pivot"), 24.4),
        (("asvd", "uniform", "pair"), 143),
        (("svd-llm", "uniform", "pair"), 30.6),
        (("svd-llm", "uniform", "pivot"), 10.2),
        (("kfac", "uniform", "pivot"), 9.4),
        (("svd", "welore", "pivot"), 16.3),
        (("kfac", "loss", "pivot"), 7.14),
        (("modegpt", "block-influence", "pair"), 15.5),
        (("auto", "loss", "auto"), 6.36),
    ],
)
def test_a_collapsing_model_ranks_the_methods(stories, choice: tuple[str, str, str], measured: float):
    expected = measured / 4.75
    assert expected * 2 / 3 < stories(*choice) < expected * 4 / 3


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.xdist_group("stories")
def test_the_recommendation_is_the_best(stories):
    recommended = stories("auto", "loss", "auto")
    others = [("svd", "welore", "pivot"), ("svd-llm", "uniform", "pivot"), ("kfac", "uniform", "pivot")]
    assert recommended < min(stories(*other) for other in others)
    assert recommended < 0.95 * stories("kfac", "loss", "pivot")


@pytest.mark.slow
@pytest.mark.assets
def test_a_classifier_keeps_its_accuracy(assets: Path, tmp_path: Path):
    columns = ("--text-column", "sentence", "--label-column", "label")
    model, text = assets / "models" / "sst2-bert-mini", assets / "text"
    options = ("--method", "fwsvd", "--ratio", 0.3, "--samples", 512)
    done("compress", model, "--calibration", text / "sst2-train-4k.tsv", *columns, *options, "--out", tmp_path / "run")
    dev = text / "sst2-dev.tsv"
    found = done("eval", tmp_path / "run", "--classification", dev, *columns, "--limit", 2000, "--json").json
    values = found["classification"][str(dev)]
    assert values["n"] == 2000
    assert values["dense"] > 0.85
    assert values["compressed"] > values["dense"] - 0.01


@pytest.mark.slow
@pytest.mark.assets
def test_conv1d_and_biases_survive_on_a_trained_model(assets: Path, tmp_path: Path):
    text, out = assets / "text", tmp_path / "run"
    parts = {name: tmp_path / f"{name}.txt" for name in ("books-train-part", "books-validation")}
    for name, part in parts.items():
        part.write_text((text / f"{name}.txt").read_text()[:400_000])
    options = ("--ratio", 0.3, "--samples", 32, "--seq-len", 256)
    done("compress", assets / "models" / "books-gpt2-2m", "--calibration", parts["books-train-part"], *options,
         "--out", out)  # fmt: skip
    compressed, dense = perplexities(out, parts["books-validation"], "--seq-len", 256, "--limit", 32)
    assert compressed < 1.05 * dense


@pytest.mark.xdist_group("documentation")
def test_the_embedded_model_suffers_under_svd_and_hardly_under_the_recommendation(tmp_path: Path):
    texts = write_parts(tmp_path / "text")
    found = {}
    for method in ("svd", "auto"):
        out = tmp_path / method
        done("compress", MODEL_DIRECTORY, "--calibration", texts["calibration"], "--method", method, "--ratio", 0.3,
             "--samples", 64, "--out", out)  # fmt: skip
        found[method], dense = perplexities(out, texts["heldout"], "--limit", 48)
    assert found["svd"] > 2.5 * dense
    assert found["auto"] < 1.3 * dense
