"""Tars of samples as a source: which members belong together, what they say, and what is odd about them."""

import tarfile

import pytest

from tests.containers import contents, inputs, listed, sample, source, weighed, write_tar


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tars_samples_are_inputs_with_what_their_json_says(tmp_path, kind):
    one, two, three = contents(3)
    long_name = "deep/" + "x" * 120
    write_tar(tmp_path / "00000.tar", sample("0", one, caption=" a cat ", pwatermark=0.25, aesthetic_score=6), kind)
    others = [*sample("b.c/1", two, caption="a dog"), (f"{long_name}.png", three), (f"{long_name}.txt", b"beside")]
    write_tar(tmp_path / "sub/00001.tar", [("__notes.py", b"x"), *others, ("no-image.txt", b"words")], kind)
    config = source(tmp_path, scores={})
    assert listed(config) == [
        ("00000.tar/0.jpg", "a cat", one),
        ("sub/00001.tar/b.c/1.jpg", "a dog", two),
        (f"sub/00001.tar/{long_name}.png", "beside", three),
        ("sub/00001.tar/no-image", "words", "the sample has no image"),
    ]
    (row, *_) = inputs(source(tmp_path / "00000.tar", scores={"watermark": "pwatermark"})).to_pylist()
    assert (row["aesthetic_score"], row["scores"], row["file_size"]) == (6.0, [("watermark", 0.25)], len(one))


def test_members_of_a_sample_need_not_lie_side_by_side(tmp_path):
    one, two = contents(2)
    write_tar(tmp_path / "a.tar", [("1.jpg", one), ("2.jpg", two), ("2.txt", b"two"), ("1.txt", b"one")])
    assert listed(source(tmp_path)) == [("a.tar/1.jpg", "one", one), ("a.tar/2.jpg", "two", two)]


def test_a_mark_of_the_coding_is_no_part_of_a_tars_texts(tmp_path):
    (one,) = contents(1)
    told = b'\xef\xbb\xbf{"caption": "a cat"}'
    write_tar(tmp_path / "a.tar", [("1.jpg", one), ("1.json", told), ("2.jpg", one), ("2.txt", b"\xef\xbb\xbfa dog")])
    assert listed(source(tmp_path)) == [("a.tar/1.jpg", "a cat", one), ("a.tar/2.jpg", "a dog", one)]


def test_of_several_images_in_a_sample_one_has_to_be_named(tmp_path):
    one, two = contents(2)
    write_tar(tmp_path / "a.tar", [("1.seg.png", one), ("1.jpg", two), ("1.txt", b"one")])
    several = "the sample 1 has several images, seg.png, jpg: name one in columns.image"
    rows = listed(source(tmp_path))
    assert [(path, caption) for path, caption, _ in rows] == [("a.tar/1.seg.png", "one"), ("a.tar/1.jpg", "one")]
    assert all(problem.startswith(several) for *_, problem in rows)
    assert listed(source(tmp_path, image="jpg")) == [("a.tar/1.jpg", "one", two)]
    with pytest.raises(ValueError, match=r"source.columns.image is 'webp', and there is only seg.png, jpg"):
        inputs(source(tmp_path, image="webp"))


def test_what_a_tar_does_not_say_is_named_with_what_it_does(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", b"x", caption="c"))
    with pytest.raises(
        ValueError, match=r"a\.tar: source.columns.scores.unsafe is 'punsafe', .* only txt, key, status"
    ):
        inputs(source(tmp_path, scores={"unsafe": "punsafe"}))
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", b'{"title": "c"}')])
    with pytest.raises(ValueError, match=r"source.columns.caption is 'caption', and there is only title"):
        inputs(source(tmp_path))
    assert listed(source(tmp_path, caption="title")) == [("a.tar/1.jpg", "c", b"x")]
    assert listed(source(tmp_path, caption="")) == [("a.tar/1.jpg", None, b"x")]
    write_tar(tmp_path / "a.tar", sample("0", b"x", caption="c", aesthetic_score="high"))
    with pytest.raises(ValueError, match=r"a\.tar, 0: aesthetic_score is 'high', and a number was expected"):
        inputs(source(tmp_path))


def test_a_tar_that_breaks_off_keeps_its_whole_samples_and_says_so(tmp_path):
    images = contents(4, seed=1)
    members = [pair for n, image in enumerate(images) for pair in sample(str(n), image + b"end", caption=f"c{n}")]
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    for cut in (*range(512, len(whole) - 10_240, 9_973), len(whole) - 10_240):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        *rows, (path, _, problem) = listed(source(tmp_path))
        assert path == "a.tar"
        assert problem.endswith("and what follows is unknown") or "unexpected end" in problem
        assert [found[2] for found in rows] == [image + b"end" for image in images[: len(rows)]]
    for other in (b"", b"no tar at all" * 99, whole[:99]):
        (tmp_path / "a.tar").write_bytes(other)
        ((_, _, problem),) = listed(source(tmp_path))
        assert problem.startswith("the tar cannot be read to its end")


def test_odd_members_are_problems_of_their_own_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("1.jpg", b"x"), ("1.txt", b"words"), ("1.json", b"{broken"), ("2.jpg", b"y"), ("2.jpg", b"z")],
    )
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("4\udcff.jpg"))
    rows = listed(source(tmp_path, caption=""))
    assert [caption for _, caption, _ in rows] == [None] * 5
    assert [path for path, *_ in rows[:4]] == ["a.tar/1.jpg", "a.tar/2.jpg", "a.tar/2.jpg (2)", "a.tar/3"]
    problems = [problem for *_, problem in rows]
    assert problems[0].startswith("1.json is not JSON")
    twice = "the sample 2 has several images of the suffix jpg"
    assert problems[1:] == [twice, twice, "3.jpg is a link or has holes", b""]


def test_no_image_of_names_with_further_dots_is_lost(tmp_path):
    images = contents(3)
    write_tar(tmp_path / "a.tar", [(f"img.{n}.jpg", image) for n, image in enumerate(images)])
    assert [path for path, *_ in listed(source(tmp_path, caption=""))] == [f"a.tar/img.{n}.jpg" for n in range(3)]
    assert [problem[:66] for *_, problem in listed(source(tmp_path, caption=""))] == [
        "the sample img has several images, 0.jpg, 1.jpg, 2.jpg: name one in"[:66]
    ] * 3
    write_tar(tmp_path / "a.tar", [(f"img.{n}.jpg", image) for n, image in enumerate(images)] + [("1.jpg", b"x")])
    missing = ("a.tar/img", None, "the sample has no image jpg, only 0.jpg, 1.jpg, 2.jpg")
    assert listed(source(tmp_path, image="jpg", caption="")) == [missing, ("a.tar/1.jpg", None, b"x")]


def test_a_sample_of_another_format_is_a_row_too(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("1.heic", b"x"), ("1.cls", b"7"), ("README", b"words"), ("2.jpg", b"y"), ("2.cls", b"7")]
    )
    assert listed(source(tmp_path, caption="")) == [
        ("a.tar/1", None, "the sample has no image, only cls, heic"),
        ("a.tar/README", None, "the sample has no image"),
        ("a.tar/2.jpg", None, b"y"),
    ]


def test_suffixes_count_in_capital_letters_too(tmp_path):
    write_tar(
        tmp_path / "A.TAR", [("1.JPG", b"x"), ("1.TXT", b"one"), ("2.Jpg", b"y"), ("2.JSON", b'{"caption": "b"}')]
    )
    assert listed(source(tmp_path, image="jpg")) == [("A.TAR/1.JPG", "one", b"x"), ("A.TAR/2.Jpg", "b", b"y")]


def test_json_that_is_nested_too_deep_is_a_problem_of_its_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", b"[" * 100_000), ("2.jpg", b"y")])
    (_, _, problem), (_, _, image) = listed(source(tmp_path, caption=""))
    assert problem.startswith("1.json is not JSON")
    assert image == b"y"


def test_tars_that_were_appended_to_each_other_are_read_to_the_last(tmp_path):
    one, two, three = contents(3)
    parts = []
    for image, words in ((one, b"one"), (two, b"two"), (three, b"three")):
        write_tar(tmp_path / "a.tar", [("1.jpg", image), ("1.txt", words)])
        parts.append((tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(70_000))
    assert listed(source(tmp_path)) == [
        ("a.tar/1.jpg", words, image) for image, words in zip((one, two, three), ("one", "two", "three"), strict=True)
    ]


@pytest.mark.parametrize("garbage", [b"x", b"no tar " * 200])
def test_what_follows_a_tars_end_and_is_none_is_said(tmp_path, garbage):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole + bytes(512) + garbage)
    image, (path, _, problem) = listed(source(tmp_path, caption=""))
    assert (image, path) == (("a.tar/1.jpg", None, b"x"), "a.tar")
    assert problem == f"what follows the tar's end mark, from byte {len(whole) + 512} on, is no tar, and unknown"


def test_of_appended_tars_problems_of_one_name_are_rows_of_their_own(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", b"{"), ("2.txt", b"words")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    found = [path for path, *_ in listed(source(tmp_path, caption=""))]
    assert found == ["a.tar/1.jpg", "a.tar/2", "a.tar/1.jpg (2)", "a.tar/2 (2)"]


def test_a_tars_json_may_have_a_list_of_captions_and_its_text_one_in_each_line(tmp_path):
    told = sample("1", b"x", caption=["a cat", "a pet"], odds=[1, 3])
    write_tar(tmp_path / "a.tar", [*told, ("2.jpg", b"y"), ("2.txt", b"one\ntwo\n")])
    assert weighed(source(tmp_path, caption_weights="odds")) == [{"a cat": 1, "a pet": 3}, {"one\ntwo": 1}]
    assert weighed(source(tmp_path, caption_per_line=True))[1] == {"one": 0.5, "two": 0.5}
    assert weighed(source(tmp_path, caption={"caption": 1.0, "txt": 1.0}, caption_per_line=True))[1] == {
        "one": 0.5,
        "two": 0.5,
    }
