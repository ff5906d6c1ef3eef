"""Directories change places whole, whatever happens, and what is not ours outlives it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_compress.artifacts import directories
from lowrank_compress.artifacts.directories import Listed, recover, remove_listed, replacing
from lowrank_compress.artifacts.files import sha256
from lowrank_compress.errors import ArtifactError
from tests.runs import forked

LISTING = "listing"


def ours(directory: Path) -> Listed:
    """Read what a result lists: a name and hash a line."""
    path = directory / LISTING
    if not path.exists():
        return {}
    return dict(line.split() for line in path.read_text().splitlines()) | {LISTING: ""}


def fill(draft: Path, **contents: str) -> None:
    for name, content in contents.items():
        (draft / name).write_text(content)
    lines = [f"{name} {sha256(draft / name)}\n" for name in contents]
    (draft / LISTING).write_text("".join(lines))


def replace(place: Path, **contents: str) -> None:
    with replacing(place, ours) as draft:
        fill(draft, **contents)


def found(place: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in place.iterdir() if path.is_file() and path.name != LISTING}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A result of two files, with a file and a directory of the user's in it."""
    place = tmp_path / "place"
    replace(place, a="old", b="old")
    (place / "notes").write_text("precious")
    (place / "own").mkdir()
    (place / "own" / "thesis").write_text("precious")
    return place


def dying_at(count: int, name: str, *, after: bool) -> Callable[[], None]:
    """Make a function that has this process killed at the so-many-th call of a function of os."""
    real, calls = getattr(os, name), 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os._exit(9)
        result = real(*arguments, **options)
        if calls == count:
            os._exit(9)
        return result

    return lambda: setattr(os, name, call)


@pytest.mark.parametrize("name", ["rename", "unlink", "rmdir", "fsync"])
@pytest.mark.parametrize("after", [False, True])
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new(place: Path, name: str, after: bool):
    deaths, count = 0, 0
    while True:
        count += 1

        def work(count: int = count) -> None:
            dying_at(count, name, after=after)()
            replace(place, a=f"new {count}", c=f"new {count}")

        if forked(work) == 0:
            break
        deaths += 1
        recover(place, ours)
        now = found(place)
        assert now.pop("notes") == "precious"
        whole_new = now == {"a": f"new {count}", "c": f"new {count}"}
        assert whole_new or now in ({"a": "old", "b": "old"}, {"a": f"new {count - 1}", "c": f"new {count - 1}"})
        assert (place / "own" / "thesis").read_text() == "precious"
        assert [path.name for path in place.parent.iterdir()] == ["place"]
    assert deaths >= 2


def test_what_is_ours_goes_and_what_is_not_stays(place: Path):
    replace(place, a="new")
    assert found(place) == {"a": "new", "notes": "precious"}
    assert (place / "own" / "thesis").read_text() == "precious"


def test_what_was_changed_is_kept_aside_even_where_nothing_takes_its_name(place: Path):
    (place / "a").write_text("changed")
    (place / "b").write_text("changed")
    replace(place, a="new")
    assert found(place) == {"a": "new", "a.bak": "changed", "b.bak": "changed", "notes": "precious"}
    (place / "a").write_text("changed again")
    replace(place, a="newer")
    assert found(place)["a.bak"] == "changed"
    assert found(place)["a.bak1"] == "changed again"


def test_a_foreign_file_of_a_name_that_the_new_result_has_is_kept_aside(place: Path):
    replace(place, notes="ours")
    assert found(place) == {"notes": "ours", "notes.bak": "precious"}


def test_a_link_to_a_file_is_no_file_of_ours(place: Path, tmp_path: Path):
    (tmp_path / "elsewhere").write_text("old")
    (place / "a").unlink()
    (place / "a").symlink_to(tmp_path / "elsewhere")
    replace(place, a="new")
    assert (tmp_path / "elsewhere").read_text() == "old"
    assert (place / "a.bak").is_symlink()
    assert (place / "a").read_text() == "new"


def test_an_exchange_under_way_is_let_alone(place: Path):
    def slow() -> None:
        with replacing(place, ours) as draft:
            fill(draft, a="slow")
            assert forked(lambda: replace(place, a="quick")) == 0
            assert draft.is_dir()

    with pytest.raises(ArtifactError, match="Somebody else has written to"):
        slow()
    assert found(place) == {"a": "quick", "notes": "precious"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_what_appears_meanwhile_stays(tmp_path: Path):
    place = tmp_path / "place"

    def overtaken() -> None:
        with replacing(place, ours) as draft:
            fill(draft, a="new")
            place.mkdir()
            (place / "theirs").write_text("precious")

    with pytest.raises(ArtifactError, match="it is left as it is"):
        overtaken()
    assert found(place) == {"theirs": "precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_something_in_the_place_of_an_interrupted_exchange_is_named(place: Path):
    def work() -> None:
        dying_at(1, "rename", after=True)()
        replace(place, a="new")

    assert forked(work) == 9
    place.mkdir()
    (place / "theirs").write_text("also precious")
    with pytest.raises(ArtifactError, match=r"what was there is now .*old; but something else has taken its place"):
        recover(place, ours)
    assert found(place) == {"theirs": "also precious"}
    (place / "theirs").rename(place.parent / "theirs")
    recover(place, ours)  # an empty directory is nothing
    assert found(place) == {"a": "old", "b": "old", "notes": "precious"}


def test_only_exchanges_of_this_place_are_finished(tmp_path: Path):
    for name in (".place.lrc-abc", ".other.lrc-abcdefgh", ".place.lrc-ABCDEFGH", "place.lrc-abcdefgh"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "new" / "mine").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / ".place.lrc-abcdefgh").write_text("a file")
    recover(tmp_path / "place", ours)
    assert sorted(tmp_path.rglob("mine")) == [path for path in before if path.name == "mine"]
    assert (tmp_path / ".place.lrc-abcdefgh").read_text() == "a file"


@pytest.mark.parametrize("planted", ["new", "old", "lock"])
def test_links_in_what_looks_like_an_exchange_are_not_followed(place: Path, tmp_path: Path, planted: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("precious")
    exchange = tmp_path / ".place.lrc-abcdefgh"
    exchange.mkdir()
    (exchange / planted).symlink_to(tmp_path / "elsewhere" / ("mine" if planted == "lock" else ""))
    replace(place, a="new")
    assert (tmp_path / "elsewhere" / "mine").read_text() == "precious"
    assert found(place) == {"a": "new", "notes": "precious"}


def test_the_longest_name(tmp_path: Path):
    place = tmp_path / ("n" * 255)
    replace(place, a="old")
    replace(place, a="new")
    assert found(place) == {"a": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_mount_point_is_refused_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place)
    with pytest.raises(ArtifactError, match=r"is a mount point.*Name a directory inside it"), replacing(place, ours):
        pytest.fail("worked")
    assert found(place) == {"a": "old", "b": "old", "notes": "precious"}


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_what_is_no_directory_is_refused(place: Path, tmp_path: Path, kind: str):
    other = tmp_path / "other"
    {"file": other.touch, "link": lambda: other.symlink_to(place), "pipe": lambda: os.mkfifo(other)}[kind]()
    with pytest.raises(ArtifactError, match="is a file or a link; expected a directory"), replacing(other, ours):
        pytest.fail("worked")
    assert found(place) == {"a": "old", "b": "old", "notes": "precious"}


def test_a_full_disk_is_said_so(place: Path):
    with pytest.raises(ArtifactError, match=rf"disk is full: {place} could not be written"), replacing(place, ours):
        raise OSError(28, "No space left on device")
    assert found(place) == {"a": "old", "b": "old", "notes": "precious"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_what_is_the_same_leaves_no_copy(tmp_path: Path):
    """A file that a result takes over from an unfinished one, which lists nothing, or has made again, is there once."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "a").write_text("same")
    (place / "b").write_text("same")
    with replacing(place, ours) as draft:
        directories.link(place / "a", draft / "a")
        (draft / "b").write_text("same")
    assert found(place) == {"a": "same", "b": "same"}
    assert (place / "a").stat().st_nlink == 1


def test_nothing_is_removed_through_a_link_that_stands_for_a_directory(tmp_path: Path) -> None:
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "place"
    elsewhere.mkdir()
    place.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (place / "1_Pooling").symlink_to(elsewhere)
    remove_listed(place, {"1_Pooling/config.json": sha256(elsewhere / "config.json")})
    assert (elsewhere / "config.json").read_text() == "{}"
    assert (place / "1_Pooling").is_symlink()
