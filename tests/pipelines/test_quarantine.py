"""Images that kill the process that decodes them: each is found, named in its row, and costs its neighbours nothing."""

import io
import os
import subprocess
import sys
import time
import types

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.config import SourceConfig
from pipelines.images import DECODE_ERRORS
from pipelines.originals import Originals
from pipelines.preprocess import quarantine
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.measure import measure
from pipelines.preprocess.quarantine import DecoderKilledError, decoding
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA
from pipelines.schema import Reject
from pipelines.storage import StorageOptions
from tests import deadly
from tests.conftest import ROOT


def png(side: int, tail: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue() + tail


def rows(folder, files: dict[str, bytes], attempt: int, measured=deadly.measure) -> dict[str, dict]:
    """Index rows of a block at its first (0) or a further attempt."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    known = [
        dict.fromkeys(INPUT_SCHEMA.names) | {"key": name, "source": "source", "path": name, "file_size": len(data)}
        for name, data in files.items()
    ]
    inputs = pa.Table.from_pylist(known, INPUT_SCHEMA)
    originals = Originals([SourceConfig(path=str(folder))], StorageOptions())
    table = measured(inputs, originals, FilterConfig(max_pixels=100_000_000), lambda: attempt)
    return {row["path"]: row for row in table.to_pylist()}


def test_the_image_that_kills_is_found_and_the_block_is_measured_as_ever(tmp_path, monkeypatch):
    good = {f"{side}.png": png(side) for side in range(20, 26)} | {"broken.png": png(40)[:100], "text.png": b"text"}
    expected = rows(tmp_path, good, attempt=0)
    monkeypatch.setattr(quarantine, "HANG_SECONDS", 2.0)
    once = tmp_path / "killed.once"
    found = rows(
        tmp_path,
        good
        | {"segfault.png": png(30, deadly.SEGFAULT), "hang.png": png(31, deadly.HANG)}
        | {"once.png": png(32, deadly.ONCE + str(once).encode())},
        attempt=1,
    )
    bad = {name: found.pop(name) for name in ("segfault.png", "hang.png")}
    assert once.exists()
    assert found.pop("once.png")["original_size"] == [32, 32]  # the machine's fault, and not the image's
    assert found == expected
    assert {row["reject_reason"] for row in bad.values()} == {Reject.KILLS_DECODER}
    assert bad["segfault.png"]["reject_detail"] == "ended by SIGSEGV, in each of 2 processes of its own"
    assert bad["hang.png"]["reject_detail"] == "not done after 2 s, in each of 2 processes of its own"
    assert all(row["id"] and row["original_size"] is None for row in bad.values())


def test_an_image_that_takes_too_much_memory_does_not_take_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "BYTES_PER_PIXEL", 0)
    monkeypatch.setattr(quarantine, "SPARE_BYTES", 400_000_000)
    files = {"large.png": png(9_900), "small.png": png(50)}  # 294 MB as RGB, and 98 MB as it is stored
    found = rows(tmp_path, files, attempt=1, measured=measure)
    assert [row["reject_reason"] for row in found.values()] == [Reject.KILLS_DECODER, None]
    assert "more memory" in found["large.png"]["reject_detail"]


def test_that_a_task_has_no_memory_left_is_no_fault_of_an_image(tmp_path):
    files = {"crowded.png": png(30, deadly.CROWDED), "small.png": png(50)}
    found = rows(tmp_path, files, attempt=0)
    assert [(row["original_size"], row["reject_reason"]) for row in found.values()] == [
        ([30, 30], None),
        ([50, 50], None),
    ]


@pytest.mark.parametrize("hang", ["deadly.obey, deadly.HANG", "time.sleep, 60"])  # with the lock held, and without
def test_a_task_whose_decoder_hangs_ends_and_says_where(hang):
    program = (
        "import time\n"
        "from pipelines.preprocess import quarantine\n"
        "from tests import deadly\n"
        "quarantine.HANG_SECONDS = 1.0\n"
        "with quarantine.decoding(0, 1) as call:\n"
        "    call(len, b'')\n"
        f"    call({hang})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "quarantine.py" in ended.stderr


def test_a_decoder_that_is_done_is_not_watched_any_more(monkeypatch):
    monkeypatch.setattr(quarantine, "HANG_SECONDS", 0.1)
    with decoding(0, 1) as call:
        assert call(len, b"abc") == 3
        with pytest.raises(TypeError):
            call(len, 3)
        time.sleep(0.3)
    time.sleep(0.3)  # this process would have ended, here or before


def test_what_a_child_raises_is_raised_and_no_child_stays():
    before = children()
    with decoding(1, 1) as call:
        assert call(len, b"abc") == 3
        assert len(children()) > len(before)
        with pytest.raises(TypeError, match="has no len"):
            call(len, 3)
        with pytest.raises(DecoderKilledError, match="ended by SIGABRT"):
            call(os.abort)
        assert call(len, b"abcd") == 4
    assert children() == before


def test_a_child_that_does_not_start_is_no_fault_of_an_image(monkeypatch):
    module = types.ModuleType("a_module_of_this_process_alone")
    exec("def size(data): return len(data)", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with decoding(1, 1) as call, pytest.raises(quarantine.ChildStartError, match="did not start: ended with 1"):
        call(module.size, b"abc")
    assert not issubclass(quarantine.ChildStartError, DECODE_ERRORS)


def children() -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process().children()]
