"""`lrc report`: what the page says, that it needs nothing, and that nothing in it is cut off in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowrank_compress
from lowrank_compress.pages.page import labels
from tests.runs import Tiny, done, refused

Finished = Callable[[str], Path]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VOID = {"meta", "br", "link", "img", "path", "use", "rect", "circle"}


class Balanced(HTMLParser):
    """Refuses tags that do not close in order, and keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def pages(tiny: Tiny, pristine: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two measured runs, one with a name that would be code if it were not escaped."""
    place = tmp_path_factory.mktemp("pages")
    runs = []
    for method, name in (("auto", "<script>alert(1)</script>"), ("svd", "svd $x^2$ & co")):
        runs.append(place / name.replace("/", "∕"))
        shutil.copytree(pristine(method), runs[-1])
        done("eval", runs[-1], "--perplexity", tiny.heldout)
    made = done("report", *runs, "--out", place / "two.html", "--text", tiny.heldout, "--limit", 1)
    assert made.out.strip() == f"Report: {place / 'two.html'}"
    return place


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing(pages: Path, tiny: Tiny) -> None:
    text = (pages / "two.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.fetched == []
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text
    for heading in (
        "All runs",
        "Quality",
        "What each matrix keeps",
        "Loss of each block",
        "What it took",
        "To make it again",
    ):
        assert heading in text
    assert text.count("<svg") == 5  # a trade; spectra of the svd run and the other one's; losses of both
    run = pages / "svd $x^2$ & co"
    found = done("eval", run, "--perplexity", tiny.heldout, "--json").json
    values = found["perplexity"][str(tiny.heldout)]
    row = f"<td>{values['compressed']:.4g}</td><td>{values['dense']:.4g}</td>"
    assert f"{row}<td>× {values['compressed'] / values['dense']:.4g}</td>" in re.sub(r"\s*\n\s*", "", text)
    report = done("show", run, "--json").json
    assert f"{report['stored_elements']:,}" in text
    assert f"{report['reached_ratio'] * 100:.2f} %" in text
    assert str(tiny.model) in text  # the recipe
    assert "this block alone" in text


def test_the_same_page_again(pages: Path, tmp_path: Path) -> None:
    run, out = pages / "svd $x^2$ & co", tmp_path / "one.html"
    done("report", run, "--out", out)
    first = out.read_bytes()
    assert "exists. Choose another name, or pass --overwrite" in refused("report", run, "--out", out)
    assert lowrank_compress.report(run, out, overwrite=True) == out
    assert out.read_bytes() == first
    assert b"All runs" not in first
    notes = tmp_path / "notes.html"
    notes.write_text("<p>mine</p>")
    assert "is no report of this program" in refused("report", run, "--out", notes, "--overwrite")
    assert "is no run" in refused("report", tmp_path, "--out", tmp_path / "x.html")


def test_without_its_original_a_run_is_shown_all_the_same(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    done("compress", tmp_path / "model", *tiny.options(tmp_path / "run", "svd")[1:])
    shutil.rmtree(tmp_path / "model")
    said = done("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert "is not looked at" in " ".join(said.err.split())
    assert "Nothing was measured of this checkpoint yet" in (tmp_path / "page.html").read_text()
    message = refused("report", tmp_path / "run", "--out", tmp_path / "b.html", "--text", tiny.heldout)
    assert "which is not at hand" in message


def test_without_jinja_it_is_said_what_to_install(
    pristine: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    message = refused("report", pristine("svd"), "--out", tmp_path / "page.html")
    assert "pip install 'lowrank_compress[report]'" in message
    assert not (tmp_path / "page.html").exists()


PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *:not(svg *)")].filter(each =>
    !each.closest(".wide, pre") && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.tagName);
  const boxes = [...document.querySelectorAll("svg")].map(svg => {
    const outer = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
      const box = text.getBoundingClientRect();
      return box.left < outer.left - 2 || box.right > outer.right + 2 || box.bottom > outer.bottom + 2;
    }).length;
  });
  document.querySelectorAll("table.sortable th")[4].click();
  const cells = [...document.querySelectorAll("table.sortable tbody tr td:nth-child(5)")];
  const sorted = cells.map(cell => +cell.dataset.value);
  const page = document.documentElement;
  page.dataset.found = JSON.stringify([page.scrollWidth > innerWidth, wide, boxes,
    sorted.every((value, place) => !place || sorted[place - 1] <= value), sorted.length]);
});
</script></head>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off_in_a_browser(width: int, pages: Path, tmp_path: Path) -> None:
    page = tmp_path / "probed.html"
    page.write_text((pages / "two.html").read_text().replace("</head>", PROBE))
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, f"--window-size={width},2000", "--dump-dom", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-found="([^"]*)"', ran.stdout)
    assert found, ran.stderr[-2000:]
    assert found[1] == "[false,[],[0,0,0,0,0],true,2]"


def test_runs_are_named_by_what_tells_them_apart() -> None:
    def run(method: str, ratio: float, *stages: str, **options: object) -> Any:
        chain = ("factorize", "refine", *stages)
        return SimpleNamespace(report={"method": method}, options={"ratio": ratio, **options}, chain=chain)

    runs = [
        run("auto", 0.1, second_by="scales", seed=0),
        run("auto", 0.3, second_by="full", seed=1),
        run("kfac", 0.1, storage="pair", allocate=None),
        run("kfac", 0.1, storage="pivot", allocate=None),
        run("kfac", 0.3, storage="pivot", allocate=None),
        run("svd", 0.3, "quantize"),
    ]
    assert labels(runs) == ["auto", "auto", "kfac storage=pair", *["kfac storage=pivot"] * 2, "svd quantize"]
