import json

import pytest

from pipelines.config import SourceConfig
from pipelines.preprocess.read import INPUT_SCHEMA, list_inputs
from pipelines.storage import Storage


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"


def put(folder, *names: str, data: bytes = b"pixels") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def describe(folder, *lines: object) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    put(folder, "metadata.jsonl", data=text.encode())


def read(folder, **settings):
    return list_inputs(Storage(str(folder)), SourceConfig(path=str(folder), **settings))


def captions(folder, **settings) -> dict[str, str | None]:
    rows = read(folder, **settings).to_pylist()
    return {row["path"]: row["caption"] for row in rows}


def test_captions_and_scores_come_from_metadata(folder):
    put(folder, "a.png", "deep/b.jpg")
    describe(folder, {"file_name": "deep/b.jpg", "caption": " a dog ", "aesthetic_score": 4}, {"file_name": "a.png"})
    table = read(folder)
    assert table.schema == INPUT_SCHEMA
    assert table.drop_columns(["key"]).to_pylist() == [
        {"path": "a.png", "caption": None, "aesthetic_score": None, "file_size": 6},
        {"path": "deep/b.jpg", "caption": "a dog", "aesthetic_score": 4.0, "file_size": 6},
    ]


def test_columns_of_metadata_may_have_other_names(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "a.png", "text": "a cat", "beauty": 7.5})
    (row,) = read(folder, caption_column="text", score_column="beauty").to_pylist()
    assert (row["caption"], row["aesthetic_score"]) == ("a cat", 7.5)


def test_a_caption_may_lie_beside_its_image(folder):
    put(folder, "a.png", "deep/b.tar.webp", "c.jpg")
    put(folder, "a.txt", data=" ein Kätzchen \n".encode())
    put(folder, "deep/b.tar.txt", data=b"two")
    assert captions(folder) == {"a.png": "ein Kätzchen", "deep/b.tar.webp": "two", "c.jpg": None}


def test_metadata_goes_before_the_file_beside(folder):
    put(folder, "a.png", "b.png")
    put(folder, "a.txt", "b.txt", data=b"beside")
    describe(folder, {"file_name": "a.png", "caption": "metadata"}, {"file_name": "b.png", "caption": None})
    assert captions(folder) == {"a.png": "metadata", "b.png": "beside"}


def test_other_files_are_no_inputs(folder):
    put(folder, "a.PNG", "notes.txt", "script.py", "b.jpeg.part")
    assert list(captions(folder)) == ["a.PNG"]


def test_a_file_that_metadata_names_and_nobody_has_is_an_input(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "gone.png", "caption": "gone"}, {"file_name": "a.png", "caption": "here"})
    rows = {row["path"]: row for row in read(folder).to_pylist()}
    assert rows["gone.png"]["file_size"] == -1
    assert rows["gone.png"]["caption"] == "gone"
    assert len(rows) == 2


def test_a_key_changes_with_what_the_row_is_made_of(folder):
    def key() -> str:
        return {row["path"]: row["key"] for row in read(folder).to_pylist()}["a.png"]

    put(folder, "a.png", "b.png")
    seen = [key()]
    assert key() == seen[0]
    put(folder, "b.png", data=b"another file")
    assert key() == seen[0]
    put(folder, "a.txt", data=b"a caption")
    seen.append(key())
    describe(folder, {"file_name": "a.png", "caption": "a caption", "aesthetic_score": 5})
    seen.append(key())
    put(folder, "a.png", data=b"other pixels")
    seen.append(key())
    (folder / "a.png").unlink()
    seen.append(key())
    assert len(set(seen)) == 5


def test_a_folder_without_an_image_is_an_error_that_names_it(folder):
    put(folder, "a.txt")
    with pytest.raises(FileNotFoundError, match=str(folder)):
        read(folder)


def test_a_caption_column_that_is_not_there_names_those_that_are(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "a.png", "text": "a cat", "width": 3})
    with pytest.raises(ValueError, match=r"line 1: source.caption_column is 'caption', and the row has .*text, width"):
        read(folder)


def test_an_empty_line_before_the_first_row_does_not_hide_a_missing_caption_column(folder):
    put(folder, "a.png")
    describe(folder, "", {"file_name": "a.png", "text": "a cat"})
    with pytest.raises(ValueError, match=r"line 2: source.caption_column"):
        read(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "b.png", "caption"', "not JSON"),
        ('["b.png", "a cat"]', "file_name"),
        ('{"caption": "a cat"}', "file_name"),
        ('{"file_name": 3, "caption": "a cat"}', "file_name"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": "high"}', "'high', and a number"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": true}', "True, and a number"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": NaN}', "nan"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": 1e999}', "inf"),
        ('{"file_name": "b.png", "caption": "half of a pair: \\ud83d"}', "caption"),
    ],
)
def test_a_wrong_line_is_named(folder, line, words):
    put(folder, "a.png", "b.png")
    describe(folder, {"file_name": "a.png", "caption": "a cat"}, "", line)
    with pytest.raises(ValueError, match=f"metadata.jsonl, line 3: .*{words}"):
        read(folder)


def test_a_line_that_is_not_unicode_is_named(folder):
    put(folder, "a.png")
    lines = [b'{"file_name": "a.png", "caption": "a cat"}', b'{"file_name": "a.png", "caption": "\xff"}']
    put(folder, "metadata.jsonl", data=b"\n".join(lines))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        read(folder)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(folder, separator):
    put(folder, "a.png")
    text = '{"file_name": "a.png", "caption": "one' + separator + 'two"}'
    if separator < " ":  # JSON escapes control characters
        text = json.dumps({"file_name": "a.png", "caption": f"one{separator}two"})
    describe(folder, text)
    assert captions(folder) == {"a.png": f"one{separator}two"}


def test_windows_line_ends_and_a_byte_order_mark_are_read(folder):
    put(folder, "a.png", "b.png")
    rows = [json.dumps({"file_name": name, "caption": name[0]}) for name in ("a.png", "b.png")]
    put(folder, "metadata.jsonl", data=b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert captions(folder) == {"a.png": "a", "b.png": "b"}
