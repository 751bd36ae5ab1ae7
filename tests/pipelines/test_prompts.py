import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluate.config import PromptColumns, PromptsConfig
from pipelines.evaluate.prompts import batches, index_rows, read_prompts
from pipelines.heldout import is_held_out
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, DataFile, require_manifest, write_manifest
from pipelines.storage import Storage, StorageOptions
from tests.reference import kept_rows

OPTIONS = StorageOptions()


def prompts(**settings):
    return read_prompts(PromptsConfig(**settings), OPTIONS)


def test_texts_and_a_file_of_lines_are_the_same_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red fox\n\n  ein grüner Vogel \n".encode())
    listed = prompts(texts=("a red fox", "ein grüner Vogel"), size=(64, 128))
    assert prompts(file=f"{tmp_path}/prompts.txt", size=(64, 128)) == listed
    assert [(p.text, p.size, p.original_size, p.crop_top_left) for p in listed] == [
        ("a red fox", (64, 128), (64, 128), (0, 0)),
        ("ein grüner Vogel", (64, 128), (64, 128), (0, 0)),
    ]


def test_what_the_networks_are_told_can_differ_from_the_picture():
    (prompt,) = prompts(texts=("x",), size=(64, 64), original_size=(2048, 1024), crop_top_left=(8, 0), negative="blur")
    assert (prompt.size, prompt.original_size, prompt.crop_top_left) == ((64, 64), (2048, 1024), (8, 0))
    assert prompt.negative == "blur"


def test_a_prompt_is_repeated_with_seeds_that_count_up():
    found = prompts(texts=("a", "b"), per_prompt=3, seed=5)
    assert [(p.text, p.seed) for p in found] == [(t, s) for t in "ab" for s in (5, 6, 7)]


@pytest.fixture
def table(tmp_path):
    """Three prompts in two files of a folder."""
    rows = [
        {"caption": "one", "not": "ugly", "s": 3, "h": 64, "w": 128, "more": 1.5},
        {"caption": "two", "not": None, "s": 4, "h": 128, "w": 64, "more": 1.5},
        {"caption": "three", "not": "dark", "s": 5, "h": 64, "w": 64, "more": 1.5},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "part-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "part-1.parquet")
    return tmp_path


COLUMNS = PromptColumns(prompt="caption", negative="not", seed="s", height="h", width="w")


def test_a_table_says_what_its_columns_are_named_for(table):
    found = prompts(parquet=str(table), columns=COLUMNS)
    assert [(p.text, p.negative, p.seed, p.size, p.original_size) for p in found] == [
        ("one", "ugly", 3, (64, 128), (64, 128)),
        ("two", None, 4, (128, 64), (128, 64)),
        ("three", "dark", 5, (64, 64), (64, 64)),
    ]
    texts = PromptColumns(prompt="caption")
    shared = prompts(parquet=str(table), columns=texts, negative="blur", seed=9, size=(32, 32))
    assert {(p.negative, p.seed, p.size) for p in shared} == {("blur", 9, (32, 32))}
    assert prompts(parquet=f"{table}/part-1.parquet", columns=texts)[0].text == "three"


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_count_takes_the_first_over_all_files(table, count):
    found = prompts(parquet=str(table), columns=COLUMNS, count=count)
    assert [p.text for p in found] == ["one", "two", "three"][:count]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(table):
    with pytest.raises(ValueError, match=r"no column \['prompt'\]; it has \['caption', 'not', 's', 'h', 'w', 'more'\]"):
        prompts(parquet=str(table))


def test_a_row_without_a_prompt_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet: row 1 has nothing in \['prompt'\]"):
        prompts(parquet=f"{tmp_path}/p.parquet")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("seed", 1.5, "a whole number"),
        ("height", "64", "a whole number"),
        ("prompt", 7, "text"),
        ("negative", 7, "text"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_row(tmp_path, column, value, expected):
    good = {"prompt": "a", "negative": None, "seed": 3, "height": 64}
    pq.write_table(
        pa.Table.from_pylist([{key: good[key] for key in good if key != column} | {column: value}]),
        tmp_path / "p.parquet",
    )
    columns = PromptColumns(**{name: name for name in good})
    with pytest.raises(ValueError, match=rf"p\.parquet: row 0 has {value!r} in '{column}'; expected {expected}"):
        prompts(parquet=f"{tmp_path}/p.parquet", columns=columns)


def test_whole_numbers_that_a_null_turned_into_floats_are_numbers(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "height": [64.0]}), tmp_path / "p.parquet")
    (prompt,) = prompts(parquet=f"{tmp_path}/p.parquet", columns=PromptColumns(height="height"), size=(32, 32))
    assert prompt.size == (64, 32)


def test_places_that_hold_no_prompts_are_named_with_their_setting(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "page.parquet").write_text("<html>")
    for settings, error, message in (
        ({"file": f"{tmp_path}/no.txt"}, FileNotFoundError, r"^prompts.file: .*no.txt is no file"),
        ({"file": str(tmp_path)}, FileNotFoundError, "^prompts.file: .* is no file"),
        ({"file": f"{tmp_path}/latin.txt"}, ValueError, r"^prompts.file: .*latin.txt is no text in UTF-8: .* byte 2"),
        ({"parquet": f"{tmp_path}/no.parquet"}, FileNotFoundError, r"^prompts.parquet: there is no .*no.parquet"),
        ({"parquet": f"{tmp_path}/page.parquet"}, ValueError, r"^prompts.parquet: .*page.parquet is no Parquet file"),
        ({"texts": ("a",), "seed": 2**63 - 1, "per_prompt": 2}, ValueError, f"^prompts.seed: {2**63} does not fit"),
    ):
        with pytest.raises(error, match=message):
            prompts(**settings)


def test_nothing_to_make_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="there is none"):
        prompts(file=f"{tmp_path}/empty.txt")
    with pytest.raises(FileNotFoundError, match="holds none"):
        prompts(parquet=str(tmp_path))


def test_a_name_is_the_pictures_content_and_not_its_place():
    made_by = {"weights": "w"}
    first, second = prompts(texts=("A red fox!", "b"), size=(64, 64))
    assert prompts(texts=("b", "A red fox!"), size=(64, 64))[1].picture_name(made_by) == first.picture_name(made_by)
    assert first.picture_name(made_by).startswith("pictures/a-red-fox-")
    others = [
        second,
        *prompts(texts=("A red fox!",), size=(64, 128)),
        *prompts(texts=("A red fox!",), size=(64, 64), seed=1),
        *prompts(texts=("A red fox!",), size=(64, 64), negative=""),
        *prompts(texts=("A red fox!",), size=(64, 64), original_size=(8, 8)),
        *prompts(texts=("A red fox!",), size=(64, 64), crop_top_left=(8, 8)),
    ]
    names = [p.picture_name(made_by) for p in (first, *others)] + [first.picture_name({"weights": "v"})]
    assert len(set(names)) == len(names)
    assert prompts(texts=("狐",))[0].picture_name(made_by).startswith("pictures/picture-")


def test_batches_hold_one_size_and_every_prompt_once(table):
    columns = PromptColumns(prompt="caption", height="h")
    found = prompts(parquet=str(table), columns=columns, size=(64, 64), per_prompt=5)
    tables = batches(found, [f"{k}.png" for k in range(len(found))], 4)
    assert all(len({tuple(size) for size in t["size"].to_pylist()}) == 1 and t.num_rows <= 4 for t in tables)
    assert sorted(name for t in tables for name in t["name"].to_pylist()) == sorted(f"{k}.png" for k in range(15))
    assert len(tables) == 5  # 10 of one height in 3 tables, 5 of the other in 2


@pytest.mark.parametrize(("count", "share"), [(None, 0.0), (7, 0.0), (5, 0.5), (None, 0.5), (1000, 0.0)])
def test_the_rows_of_an_index_are_the_first_by_path_whatever_file_they_are_in(tmp_path, monkeypatch, count, share):
    index, files = Storage(f"{tmp_path}/index"), []
    for number in range(4):
        rows = []
        for place in range(8):
            path = f"{place * 7 % 8}-{number}.png"
            known = {"key": path, "id": f"{place}{number}" * 8, "source": f"s{place % 2}", "path": path, "file_size": 1}
            known |= {
                "captions": ["a", "bad"],
                "caption_weights": [1.0, 1.0],
                "caption_reasons": [None, "long_caption"],
            }
            known |= {"bucket": [8, 8], "original_size": [9, 9], "reject_reason": "blank" if place == number else None}
            rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known)
        files.append(DataFile(name=f"data/{number}.parquet", rows=8))
        index.write_table(files[-1].name, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    content = {"counts": {"kept": 28}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}}
    version = write_manifest(index, files, kind="index", **content).digest
    every = sorted(
        kept_rows(index, require_manifest(index, "index")).to_pylist(), key=lambda r: (r["source"], r["path"])
    )
    wanted = [row for row in every if not share or is_held_out(row["id"], share)][:count]
    told = [{name: value for name, value in row.items() if name != "key"} for row in wanted]
    found = index_rows(index, count, share, version)
    assert [{name: value for name, value in row.items() if name != "key"} for row in found] == told
    assert found[0]["captions"] == ["a"]
    assert 0 < len(found) <= 28
    monkeypatch.setattr(Storage, "read_tables", None)  # nothing is read again
    assert index_rows(index, count, share, version) == found
