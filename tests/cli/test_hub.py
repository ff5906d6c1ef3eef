"""Checkpoints that go to the hub, and come from there; the hub is one on this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import lowrank_compress
from lowrank_compress.errors import InputError
from lowrank_compress.model.locate import Address, in_folder
from tests.hub import OWNER, TOKEN, Hub, served
from tests.runs import Tiny, done, lrc, refused


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "")  # what --token puts there goes with the test
    with served(tmp_path, monkeypatch) as made:
        yield made


def test_only_the_finished_checkpoint_is_pushed(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = done("compress", *tiny.options(run, "svd"), "--push-to-hub", "small", "--token", TOKEN, "--private")
    repo = f"{OWNER}/small"
    assert f"On the hub: {hub.endpoint}/{repo}" in said.out
    assert hub.private == {repo: True}
    # Nothing of the run but its checkpoint; not even files that somebody put beside it.
    checkpoint = {str(path.relative_to(run / "model")) for path in (run / "model").rglob("*")}
    assert hub.files(repo) == checkpoint
    assert all((hub.place / repo / name).read_bytes() == (run / "model" / name).read_bytes() for name in checkpoint)
    asked = {token for _, path, token in hub.asked if repo in path or path == "/api/repos/create"}
    assert asked == {f"Bearer {TOKEN}"}

    # The token is nowhere.
    assert TOKEN not in said.out + said.err
    for place in (run, hub.place):
        assert not [path for path in place.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]

    # A finished run is pushed again as it is; stray files of the run's owner stay here.
    (run / "model" / "notes.txt").write_text("mine")
    found = done("compress", *tiny.options(run, "svd"), "--push-to-hub", "small", "--token", TOKEN, "--json").json
    assert found["hub"] == f"{hub.endpoint}/{repo}"
    assert hub.files(repo) == checkpoint

    # And everything that looks at a checkpoint takes its name.
    for address in (repo, f"hf://{repo}", f"hf://{repo}@main"):
        assert done("show", address, "--json").json["matrices"] == done("show", run, "--json").json["matrices"]
    verified = done("verify", repo, "--json").json
    assert verified["ok"]
    assert {file["file"] for file in verified["files"]} == checkpoint - {"manifest.json"}
    done("export", repo, "--dense", tmp_path / "dense", "--push-to-hub", f"{OWNER}/dense", "--token", TOKEN)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.files(f"{OWNER}/dense")
    AutoModelForCausalLM.from_pretrained(f"{OWNER}/dense")
    assert isinstance(lowrank_compress.load(repo), AutoModelForCausalLM.from_pretrained(tiny.model).__class__)
    (hub.place / repo / "config.json").write_text("{}")
    said = lrc("verify", repo)
    assert said.code == 2
    assert "config.json (missing or altered)" in said.text


def test_what_is_there_already(hub: Hub, tiny: Tiny, finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Another model is not replaced unawares; of an earlier one of ours nothing stays that would be loaded."""
    run, repo = finished("svd"), f"{OWNER}/there"
    result = lowrank_compress.compress(
        tiny.model, method="svd", calibration=tiny.text, samples=8, seq_len=32, out=run, reporter=None
    )
    shutil.copytree(tiny.model, hub.place / repo)
    with pytest.raises(InputError, match=rf"{repo} on the hub holds another model \(config.json\)"):
        result.push_to_hub(repo, token=TOKEN)
    (hub.place / repo / "photo.png").write_bytes(b"mine")
    (hub.place / repo / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    assert result.push_to_hub(repo, token=TOKEN, overwrite=True) == f"{hub.endpoint}/{repo}"
    ours = {path.name for path in (run / "model").iterdir()}
    assert hub.files(repo) == ours | {"photo.png"}

    # What an earlier checkpoint of ours had and this one has not goes.
    manifest = hub.place / repo / "manifest.json"
    found = json.loads(manifest.read_text())
    assert "chat_template.jinja" not in found["outputs"]
    other = done(
        "cast", run, "--dtype", "bfloat16", "--out", tmp_path / "cast", "--push-to-hub", repo, "--token", TOKEN
    )
    assert "On the hub" in other.out
    assert json.loads((hub.place / repo / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_pushed_is_said_before_any_work(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    options = tiny.options(tmp_path / "run", "svd")
    assert "needs a token that may write" in refused("compress", *options, "--push-to-hub", "small")
    assert "a/b/c on the Hugging Face hub cannot be written to" in refused(
        "compress", *options, "--push-to-hub", "a/b/c", "--token", TOKEN
    )
    for extra in (["--dry-run"], ["--check", tmp_path / "expected.json"]):
        message = refused("compress", *options, "--push-to-hub", "small", "--token", TOKEN, *extra)
        assert "not with --dry-run or --check" in message
    assert "--private goes with --push-to-hub" in refused("compress", *options, "--private")
    assert not (tmp_path / "run").exists()


def test_an_unfinished_or_changed_checkpoint_stays_here(
    hub: Hub, finished: Callable[[str], Path], tmp_path: Path, tiny: Tiny
) -> None:
    run = finished("svd")
    (run / "model" / "lowrank.json").write_text("{}")
    with pytest.raises(lowrank_compress.LrcError, match=r"lowrank\.json is missing or not as it was written"):
        lowrank_compress.Result(run / "model", run, "", {}).push_to_hub("small", token=TOKEN)
    with pytest.raises(InputError, match="is no finished checkpoint of this program"):
        lowrank_compress.Result(tiny.model, tiny.model, "", {}).push_to_hub("small", token=TOKEN)
    assert not hub.place.exists()


def test_a_checkpoint_in_a_folder_of_a_repository(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    repo = f"{OWNER}/several"
    shutil.copytree(tiny.model, hub.place / repo / "v2" / "base")
    (hub.place / repo / "config.json").write_text("{}")
    options = tiny.options(tmp_path / "run", "svd")[1:]
    found = done("compress", repo, "--subfolder", "v2/base", *options, "--token", TOKEN, "--json").json
    # Repeated by its own recipe, and the same as from a directory.
    assert f"model: hf://{repo}/v2/base\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert (
        done("compress", "--config", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "run", "--json").json["id"]
        == found["id"]
    )
    here = tiny.options(tmp_path / "here", "svd")
    assert done("compress", *here, "--json").json["id"] == found["id"]
    inside = ["compress", tiny.model.parent, "--subfolder", tiny.model.name, *here[1:], "--json"]
    assert done(*inside).json["id"] == found["id"]
    assert "has no config.json" in refused("compress", f"hf://{repo}/v2", *options)
    assert os.environ["HF_TOKEN"] == TOKEN  # for this process alone


@pytest.mark.parametrize("name", ["hf://name", "hf://a/b/../c", "hf://a/b@", "hf://", "hf://a/b//c", "hf://a/b@x@y"])
def test_addresses_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match=r"expected hf://OWNER/NAME\[@REVISION\]\[/FOLDER\]"):
        Address.of(name)


def test_addresses() -> None:
    assert Address.of("gpt2", "v1") == ("gpt2", "v1", "")
    assert Address.of("hf://a/b@v1/c/d") == ("a/b", "v1", "c/d")
    assert Address.of("hf://a/b/c", "v1") == ("a/b", "v1", "c")
    assert Address.of("hf://a/b/") == ("a/b", None, "")
    assert in_folder("hf://a/b@v1/c", "d") == "hf://a/b@v1/c/d"
    assert in_folder("a/b", None) == "a/b"
    with pytest.raises(InputError, match="names the revision v1, and --revision v2"):
        Address.of("hf://a/b@v1", "v2")
    with pytest.raises(InputError, match="is no folder of a model"):
        in_folder("a/b", "../c")
    with pytest.raises(InputError, match="full name, OWNER/NAME; got gpt2"):
        in_folder("gpt2", "c")


def test_a_token_is_in_no_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither in an error's nor in the file that keeps an unexpected one."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"a library that says {TOKEN}")

    monkeypatch.setattr("lowrank_compress.cli.inspection.show", fail)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("sys.argv", ["lrc", "show", "x", "--token", TOKEN])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = lrc("show", "x", "--token", TOKEN)
    assert said.code == 1
    assert "a library that says …" in said.text
    (kept,) = tmp_path.glob("lrc-*.txt")
    assert "ZeroDivisionError" in kept.read_text()
    assert TOKEN not in kept.read_text() + said.out + said.err
