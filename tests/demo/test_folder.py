"""The output folder: a former demo is replaced, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradtrace.demo.folder import MARK, PICTURE, prepare, store
from gradtrace.errors import GradtraceError


def test_a_new_or_empty_folder_is_marked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty"):
        assert prepare(tmp_path / name, networks=("a",), attrs={"seed": 3}) is False
        assert '"seed": 3' in (tmp_path / name / MARK).read_text()


def test_a_former_demos_files_go_and_others_stay(tmp_path: Path) -> None:
    prepare(tmp_path, networks=("a",), attrs={})
    store(tmp_path, "a").mkdir()
    (store(tmp_path, "a") / "zarr.json").write_text("{}")
    (tmp_path / PICTURE).write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.zarr").mkdir()
    assert prepare(tmp_path, networks=("a",), attrs={}) is True
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "notes.txt", "other.zarr"]


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    store(tmp_path, "a").mkdir()
    with pytest.raises(GradtraceError, match=r"thesis\.tex.*not written by a demo.*-o FOLDER"):
        prepare(tmp_path, networks=("a",), attrs={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(GradtraceError, match="is a file"):
        prepare(tmp_path / "out", networks=(), attrs={})


def test_a_linked_store_is_unlinked_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    folder = tmp_path / "out"
    prepare(folder, networks=("a",), attrs={})
    store(folder, "a").symlink_to(elsewhere)
    prepare(folder, networks=("a",), attrs={})
    assert (elsewhere / "precious").exists()
    assert not store(folder, "a").exists()
