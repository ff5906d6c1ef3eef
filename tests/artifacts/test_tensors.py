"""Block files: whole, marked with the result they belong to, and the same bytes every time."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_compress.artifacts.tensors import BlockFiles
from lowrank_compress.errors import ArtifactError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float64).view(2, 3).T,  # not contiguous
    "a": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.empty(0, 4),
    "bytes": torch.tensor([1, 2], dtype=torch.uint8),
    "number": torch.tensor(2.5, dtype=torch.float64),
}


def test_blocks_come_back_as_they_were(tmp_path: Path):
    files = BlockFiles(tmp_path / "new", "id")
    files.write(3, TENSORS)
    found = files.read(3)
    assert files.finished(3)
    assert files.name(3) == "block-id-0003.safetensors"
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_bytes_do_not_depend_on_order_or_directory(tmp_path: Path):
    one, two = BlockFiles(tmp_path / "1", "id"), BlockFiles(tmp_path / "2", "id")
    one.write(0, TENSORS)
    two.write(0, dict(reversed(TENSORS.items())))
    assert one.path(0).read_bytes() == two.path(0).read_bytes()


def test_a_block_of_another_result_is_not_ours(tmp_path: Path):
    BlockFiles(tmp_path, "mine").write(0, TENSORS)
    other = BlockFiles(tmp_path, "other")
    assert not other.finished(0)
    shutil.copyfile(tmp_path / "block-mine-0000.safetensors", other.path(0))
    assert not other.finished(0)
    with pytest.raises(ArtifactError, match=r"belongs to another result \(mine; expected other\)"):
        other.read(0)


@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "flipped"])
def test_damaged_blocks_are_not_finished(tmp_path: Path, damage: str):
    files = BlockFiles(tmp_path, "id")
    files.write(0, TENSORS)
    whole = files.path(0).read_bytes()
    damaged = {"gone": None, "empty": b"", "truncated": whole[:-1], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}
    files.path(0).unlink()
    if (found := damaged[damage]) is not None:
        files.path(0).write_bytes(found)
    assert not files.finished(0)
    if damage != "flipped":
        with pytest.raises(ArtifactError, match="missing or damaged"):
            files.read(0)


def test_a_file_that_is_no_block_is_not_finished(tmp_path: Path):
    files = BlockFiles(tmp_path, "id")
    save_file({"a": torch.zeros(1)}, files.path(0))
    assert not files.finished(0)
    save_file({"a": torch.zeros(1)}, files.path(0), metadata={"lrc": "no json"})
    assert not files.finished(0)


def test_a_file_in_the_place_of_another_block_is_not_finished(tmp_path: Path):
    files = BlockFiles(tmp_path, "id")
    for block in (0, 1):
        files.write(block, TENSORS)
    shutil.copyfile(files.path(0), files.path(1))
    assert files.finished(0)
    assert not BlockFiles(tmp_path, "id").finished(1)


def test_what_is_not_ours_is_kept(tmp_path: Path):
    files = BlockFiles(tmp_path, "id")
    files.path(0).write_text("theirs")
    files.write(0, TENSORS)
    assert files.finished(0)
    assert (tmp_path / f"{files.name(0)}.bak").read_text() == "theirs"


def test_edited_notes_are_no_finished_block(tmp_path: Path):
    files = BlockFiles(tmp_path, "id")
    files.write(0, TENSORS, notes={"rank": 3})
    assert files.notes(0) == {"rank": 3}
    whole = files.path(0).read_bytes()
    files.path(0).write_bytes(whole.replace(b'rank\\": 3', b'rank\\": 4'))
    assert files.path(0).read_bytes() != whole
    assert not files.finished(0)
