"""What a local folder holds: each file once, by a name that can be written down."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines.walk import files_below, opened


def names(folder: Path) -> list[str]:
    return sorted(path.removeprefix(f"{folder}/") for path, _, _ in files_below(str(folder)))


def test_files_have_the_names_sizes_and_times_that_arrow_gives(tmp_path):
    for name in ("a.png", "deep/er/b é 你.png", "deep/new\nline.png", "deep/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(len(name)))
    (tmp_path / "empty").mkdir()
    found = pafs.LocalFileSystem().get_file_info(pafs.FileSelector(str(tmp_path), recursive=True))
    expected = {(info.path, info.size, info.mtime_ns // 1000) for info in found if info.type == pafs.FileType.File}
    assert set(files_below(str(tmp_path))) == expected
    assert len(expected) == 4


def test_links_are_followed_and_none_of_them_leads_round(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").touch()
    folder = tmp_path / "folder"
    (folder / "one").mkdir(parents=True)
    (folder / "one/b.png").touch()
    for link, to in {"c.png": "one/b.png", "other": "../elsewhere", "one/up": "..", "self": "self"}.items():
        (folder / link).symlink_to(to)
    (tmp_path / "elsewhere/back").symlink_to(folder)
    assert names(folder) == ["c.png", "one/b.png", "other/a.png", "self"]  # which cannot be read


def test_a_link_to_what_is_not_there_is_a_file_and_a_pipe_is_none(tmp_path):
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == ["gone.png"]


def test_a_link_that_leads_through_a_file_or_to_itself_is_a_file_that_is_not_there(tmp_path):
    (tmp_path / "a.png").touch()
    for link, to in {"through.png": "a.png/x", "round.png": "round.png", "long.png": "n" * 300}.items():
        (tmp_path / link).symlink_to(to)
    assert names(tmp_path) == ["a.png", "long.png", "round.png", "through.png"]
    for name in ("long.png", "round.png", "through.png", "gone.png", "a.png/x", "n" * 300, "n\0.png"):
        with pytest.raises(FileNotFoundError):
            opened(str(tmp_path / name))
    with opened(str(tmp_path / "a.png")) as file:
        assert file.read() == b""


def test_a_name_that_is_no_text_is_written_with_the_numbers_of_its_bytes(tmp_path):
    for name in (b"caf\xe9.png", b"\xff/a.png", "é.png".encode()):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).touch()
    assert names(tmp_path) == ["\\xff/a.png", "caf\\xe9.png", "é.png"]


def test_a_folder_that_is_missing_has_no_files_and_a_file_is_no_folder(tmp_path):
    assert names(tmp_path / "none") == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        names(tmp_path / "file")
