import json

import pyarrow as pa
import pytest

from pipelines.config import ColumnsConfig, SourceConfig
from pipelines.originals import Originals
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.folder import list_folder, passed_over
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA, passed_over_words
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.storage import Storage, StorageOptions


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


def read(folder, **columns):
    return inputs(config(folder, **columns))


def inputs(*sources: SourceConfig):
    return pa.concat_tables(list_inputs([survey(source, StorageOptions()) for source in sources], StorageOptions()))


def config(folder, name: str = "source", **columns) -> SourceConfig:
    return SourceConfig(name=name, path=str(folder), columns=ColumnsConfig(**columns))


def caption_of(row: dict) -> str | None:
    """The caption of an image that has no more than one."""
    (caption,) = row["captions"] or [None]
    return caption


def captions(folder, **columns) -> dict[str, str | None]:
    """Of each image, as the index has it; the images themselves are no images here."""
    originals = Originals([config(folder)], StorageOptions())
    return {
        row["path"]: caption_of(row) for row in measure(read(folder, **columns), originals, FilterConfig()).to_pylist()
    }


def test_captions_and_scores_come_from_metadata(folder):
    put(folder, "a.png", "deep/b.jpg")
    describe(folder, {"file_name": "deep/b.jpg", "caption": " a dog ", "aesthetic_score": 4}, {"file_name": "a.png"})
    table = read(folder)
    assert table.schema == INPUT_SCHEMA
    assert table.select(["path", "captions", "aesthetic_score", "file_size"]).to_pylist() == [
        {"path": "a.png", "captions": [], "aesthetic_score": None, "file_size": 6},
        {"path": "deep/b.jpg", "captions": ["a dog"], "aesthetic_score": 4.0, "file_size": 6},
    ]


def test_columns_of_metadata_may_have_other_names(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "a.png", "text": "a cat", "beauty": 7.5})
    (row,) = read(folder, caption="text", aesthetic_score="beauty").to_pylist()
    assert (caption_of(row), row["aesthetic_score"]) == ("a cat", 7.5)


def test_further_scores_come_under_the_names_that_the_settings_give_them(folder):
    put(folder, "a.png", "b.png", "c.png")
    described = {"file_name": "a.png", "caption": "a", "pwatermark": 0.5, "similarity": 0.25, "other": 1}
    describe(folder, described, {"file_name": "b.png", "caption": "b", "pwatermark": None, "similarity": 0.75})
    rows = read(folder, scores={"watermark": "pwatermark", "clip": "similarity"}).to_pylist()
    assert [row["scores"] for row in rows] == [[("clip", 0.25), ("watermark", 0.5)], [("clip", 0.75)], None]


def csv(folder, text: str, name: str = "metadata.csv") -> None:
    put(folder, name, data=text.encode())


def test_a_score_that_is_not_a_number_is_none_as_in_tables(folder):
    put(folder, "a.png", "b.png", "one/c.png")
    put(folder, "metadata.jsonl", data=b'{"file_name": "a.png", "aesthetic_score": NaN}\n{"file_name": "b.png"}')
    put(folder, "one/metadata.csv", data=b"file_name,aesthetic_score\nc.png,nan\n")
    assert read(folder, caption="").column("aesthetic_score").to_pylist() == [None] * 3


def test_metadata_may_be_csv(folder):
    put(folder, "a.png", "b.png", "c.png")
    csv(folder, '\ufefffile_name,caption,beauty\r\na.png,"one, ""two""\nthree",4.5\r\n\r\nb.png,12,\r\nc.png,,1\r\n')
    put(folder, "c.txt", data=b"beside")
    rows = read(folder, aesthetic_score="beauty").to_pylist()
    assert [(caption_of(row), row["aesthetic_score"]) for row in rows] == [
        ('one, "two"\nthree', 4.5),
        ("12", None),
        (None, 1.0),
    ]
    assert captions(folder, aesthetic_score="beauty")["c.png"] == "beside"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,caption\na.png\n", "line 2: 1 fields, and the head has 2"),
        ('file_name,caption\na.png,"open\n', "line 2: not CSV"),
        ("name,caption\na.png,x\n", 'line 2: "file_name" is missing'),
        ("file_name,caption,aesthetic_score\na.png,x,high\n", "line 2: aesthetic_score is 'high', and a number"),
        ("file_name,caption,aesthetic_score\na.png,x,inf\n", "line 2: aesthetic_score is inf"),
        ("file_name,text\na.png,x\n", "source.columns.caption is 'caption', and there is only file_name, text"),
    ],
)
def test_wrong_csv_is_named(folder, text, words):
    put(folder, "a.png")
    csv(folder, text)
    with pytest.raises(ValueError, match=f"metadata.csv.*{words}"):
        read(folder)


def test_csv_that_is_not_unicode_is_named(folder):
    put(folder, "a.png", "metadata.csv", data=b"file_name,caption\na.png,x\nb.png,\xff\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 3: not UTF-8"):
        read(folder)


def test_metadata_describes_images_of_its_folder_and_below_and_the_nearest_goes_before(folder):
    put(folder, "a.png", "one/b.png", "one/two/c.png", "one/two/d.png", "three/e.png")
    rows = [{"file_name": name, "caption": "top"} for name in ("./a.png", "one/b.png", "one/two/c.png")]
    describe(folder, *rows)
    csv(folder, "file_name,caption\nc.png,near\n../../three/e.png,far\n", "one/two/metadata.csv")
    assert captions(folder) == {
        "a.png": "top",
        "one/b.png": "top",
        "one/two/c.png": "near",
        "one/two/d.png": None,
        "three/e.png": "far",
    }


def test_two_metadata_files_of_one_folder_are_refused(folder):
    put(folder, "one/a.png", "one/metadata.csv", "one/metadata.jsonl")
    with pytest.raises(ValueError, match=r"one/metadata.csv and one/metadata.jsonl both describe"):
        read(folder)


def test_an_image_that_is_described_twice_is_refused(folder):
    put(folder, "a.png", "deep/b.png")
    csv(folder, "file_name,caption\nb.png,x\n", "deep/metadata.csv")
    describe(folder, {"file_name": "a.png", "caption": "1"}, "", {"file_name": "./a.png", "caption": "2"})
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 3: line 1 describes ./a.png already"):
        read(folder)


def test_a_caption_may_lie_beside_its_image(folder):
    put(folder, "a.png", "deep/b.tar.webp", "c.jpg")
    put(folder, "a.txt", data=" ein Kätzchen \n".encode())
    put(folder, "deep/b.tar.txt", data=b"two")
    assert captions(folder) == {"a.png": "ein Kätzchen", "deep/b.tar.webp": "two", "c.jpg": None}


def test_the_file_beside_may_have_its_suffix_in_capital_letters(folder):
    put(folder, "a.JPG", "b.png")
    put(folder, "a.TXT", data=b"one")
    put(folder, "b.TXT", data=b"not this")
    put(folder, "b.txt", data=b"two")
    assert captions(folder) == {"a.JPG": "one", "b.png": "two"}


def test_files_that_are_no_images_by_their_suffix_are_counted(folder):
    put(folder, "a.png", "a.txt", "deep/b.JPG", "deep/b.TXT", "told.dat")
    describe(folder, {"file_name": "a.png"}, {"file_name": "told.dat"})
    put(folder, "c.HEIC", "deep/d.heic", "lonely.txt", "LICENSE", "v1.5 notes", "a.b/c", ".hidden")
    files = survey(config(folder), StorageOptions()).files
    counted = passed_over(files, list_folder(Storage(str(folder)), files, config(folder, caption="")))
    assert counted == {".heic": 2, ".txt": 1, "": 3, ".hidden": 1}
    assert passed_over_words({".heic": 2, "": 3}) == "files passed over for their suffix: 2 .heic, 3 without one"


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
    assert (rows["gone.png"]["file_size"], rows["gone.png"]["problem"]) == (-1, "there is no such file")
    assert caption_of(rows["gone.png"]) == "gone"
    assert len(rows) == 2


def test_a_key_changes_with_what_the_row_is_made_of(folder):
    def key(**columns) -> str:
        return {row["path"]: row["key"] for row in read(folder, **columns).to_pylist()}["a.png"]

    put(folder, "a.png", "b.png")
    seen = [key()]
    assert key() == seen[0]
    put(folder, "b.png", data=b"another file")
    assert key() == seen[0]
    put(folder, "a.txt", data=b"a caption")
    seen.append(key())
    put(folder, "a.txt", data=b"another caption")
    seen.append(key())
    described = {"file_name": "a.png", "caption": "a caption"}
    for more in ({}, {"aesthetic_score": 5}, {"aesthetic_score": 5, "pwatermark": 0.5}):
        describe(folder, described | more)
        seen.append(key())
    seen.append(key(scores={"watermark": "pwatermark"}))
    put(folder, "a.png", data=b"other pixels")
    seen.append(key())
    (folder / "a.png").unlink()
    seen.append(key())
    assert len(set(seen)) == 8


def test_sources_may_hold_the_same_names_and_keep_their_own_columns(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    put(one, "b.png", "a.png")
    put(two, "a.png")
    describe(two, {"file_name": "a.png", "text": "a cat"})
    sources = [config(two, "two", caption="text"), config(one, "one")]
    table = inputs(*sources)
    rows = table.to_pylist()
    assert [(row["source"], row["path"], caption_of(row)) for row in rows] == [
        ("two", "a.png", "a cat"),
        ("one", "a.png", None),
        ("one", "b.png", None),
    ]
    assert len(set(table.column("key").to_pylist())) == 3
    put(one, "a.txt", data=b"beside in one")
    put(two, "a.png", data=b"other pixels")
    originals = Originals(sources, StorageOptions())
    assert [originals.read(row) for row in rows] == [b"other pixels", b"pixels", b"pixels"]
    measured = measure(inputs(*sources), originals, FilterConfig())
    assert measured.column("captions").to_pylist() == [["a cat"], ["beside in one"], []]


def test_a_source_that_the_settings_lack_is_named(folder):
    put(folder, "a.png")
    originals = Originals([config(folder, "one"), config(folder, "two")], StorageOptions())
    with pytest.raises(ValueError, match="images of the source 'source', and the settings name 'one', 'two'"):
        originals.check(read(folder))


def test_a_folder_without_an_image_is_an_error_that_names_it(folder):
    put(folder, "a.txt")
    with pytest.raises(FileNotFoundError, match=str(folder)):
        read(folder)


def test_a_caption_column_that_is_not_there_names_those_that_are(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "a.png", "text": "a cat", "width": 3})
    with pytest.raises(
        ValueError, match=r"source.columns.caption is 'caption', and there is only file_name, text, width"
    ):
        read(folder)


def test_a_named_column_has_to_be_there_and_none_can_be_named(folder):
    put(folder, "a.png")
    describe(folder, {"file_name": "a.png", "text": "a cat"})
    with pytest.raises(
        ValueError, match=r"source.columns.scores.clip is 'similarity', and there is only file_name, text"
    ):
        read(folder, caption="text", scores={"clip": "similarity"})
    with pytest.raises(ValueError, match=r"source.columns.aesthetic_score is 'beauty'"):
        read(folder, caption="text", aesthetic_score="beauty")
    assert captions(folder, caption="") == {"a.png": None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "b.png", "caption"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["b.png", "a cat"]', "file_name"),
        ('{"caption": "a cat"}', "file_name"),
        ('{"file_name": 3, "caption": "a cat"}', "file_name"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": "high"}', "'high', and a number"),
        ('{"file_name": "b.png", "caption": "a cat", "aesthetic_score": true}', "True, and a number"),
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


def weighed(rows) -> list[dict[str, float]]:
    """Captions and weights of each row."""
    told = [(row["captions"] or [], row["caption_weights"] or []) for row in rows.to_pylist()]
    assert all(len(set(captions)) == len(captions) for captions, _ in told)
    return [dict(zip(*both, strict=True)) for both in told]


def test_a_line_of_metadata_may_give_several_captions_with_their_weights(folder):
    put(folder, *(f"{name}.png" for name in "abcdef"))
    described = [
        {"file_name": "a.png", "caption": [" a cat ", "a pet", None], "odds": [3, 1, 9]},
        {"file_name": "b.png", "caption": ["one", "two", "one", "never"], "odds": [1, 2, 0.5, 0]},
        {"file_name": "c.png", "caption": ["alike", "too"]},
        {"file_name": "d.png", "caption": "alone", "odds": 5},
        {"file_name": "e.png", "caption": [], "odds": []},
    ]
    describe(folder, *described)
    put(folder, "e.txt", "f.txt", data=b"beside")
    rows = read(folder, caption_weights="odds")
    assert weighed(rows)[:5] == [
        {"a cat": 3, "a pet": 1},
        {"one": 1.5, "two": 2},
        {"alike": 0.5, "too": 0.5},
        {"alone": 5},
        {},
    ]
    measured = measure(rows, Originals([config(folder)], StorageOptions()), FilterConfig())
    assert weighed(measured)[4:] == [{"beside": 1}] * 2
    assert [len(told["caption_reasons"]) for told in measured.to_pylist()] == [2, 2, 2, 1, 1, 1]
    for wrong, words in (
        ({"odds": [1]}, "caption has 2, and odds 1"),
        ({"odds": [1, -1]}, "odds holds -1, and weights are numbers, 0 or more"),
        ({"odds": [1, "2"]}, "odds holds '2'"),
        ({"caption": ["a", ["b"]]}, r"caption holds \['b'\], and texts were expected"),
        ({"caption": {"en": "a"}}, "caption holds {'en': 'a'}"),
    ):
        describe(folder, *described[:2], described[2] | wrong)
        with pytest.raises(ValueError, match=f"metadata.jsonl, line 3: {words}"):
            read(folder, caption_weights="odds")


def test_several_columns_may_have_captions_each_with_a_weight(folder):
    put(folder, "a.png", "b.png", "c.png")
    csv(
        folder,
        'file_name,long,short\na.png,"[""very long"", ""longer""]",brief\nb.png,,[photo] only\nc.png,same,same\n',
    )
    rows = read(folder, caption={"long": 3.0, "short": 1.0})
    assert weighed(rows) == [{"very long": 1.5, "longer": 1.5, "brief": 1}, {"[photo] only": 1}, {"same": 4}]
    csv(folder, 'file_name,long,odds\na.png,"[""x"", ""y""]","[1, 3]"\nb.png,z,2.5\nc.png,,7\n')
    assert weighed(read(folder, caption="long", caption_weights="odds")) == [{"x": 1, "y": 3}, {"z": 2.5}, {}]
    csv(folder, "file_name,long,short\na.png,x,y\n")
    with pytest.raises(ValueError, match=r"source.columns.caption.alt is 'alt', and there is only file_name, long"):
        read(folder, caption={"long": 1.0, "alt": 1.0})
    with pytest.raises(ValueError, match=r"source.columns.caption_weights is 'odds', and there is only file_name"):
        read(folder, caption="long", caption_weights="odds")


def test_each_line_of_a_text_file_is_a_caption_where_the_settings_say_so(folder):
    put(folder, "a.png")
    put(folder, "a.txt", data=b"a cat\r\n\n  a pet \na cat\n")

    def found(**columns) -> tuple[list[dict[str, float]], str]:
        rows = read(folder, **columns)
        measured = measure(rows, Originals([config(folder)], StorageOptions()), FilterConfig())
        return weighed(measured), rows.column("key")[0].as_py()

    whole, lines = found(), found(caption_per_line=True)
    assert whole[0] == [{"a cat\r\n\n  a pet \na cat": 1}]
    assert lines[0] == [{"a cat": 2, "a pet": 1}]
    assert whole[1] != lines[1]
