from __future__ import annotations

import errno

import pytest

from llm_streamline.errors import UserError
from llm_streamline.files import TEMPORARY, atomic, remove_leftovers, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole(tmp_path):
    with atomic(tmp_path / "deep" / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "a").read_text() == "a"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot write"), (errno.EACCES, "cannot write")],
)
def test_a_disk_that_refuses_is_named(tmp_path, number, words):
    with pytest.raises(UserError, match=words), atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError(number, "no")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_go(tmp_path):
    (tmp_path / ".partial-12345678-model").mkdir()
    (tmp_path / ".partial-12345678-a.json").write_text("{")
    (tmp_path / "keep.json").write_text("{}")
    (tmp_path / "model" / ".partial-12345678").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["keep.json", "model"]


def test_what_a_library_writes_beside_is_a_leftover_too(tmp_path):
    with atomic(tmp_path / "a.safetensors") as temporary:
        (temporary.parent / ".tmp5F2Fy8").write_text("half")  # as safetensors does before it renames
        assert all(path.name.startswith(TEMPORARY) for path in tmp_path.iterdir())
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_is_told_of_the_final_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/model/a.json could"), atomic(tmp_path / "model") as folder:
        folder.mkdir()
        with atomic(folder / "a.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
