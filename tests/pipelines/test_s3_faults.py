"""An S3 server that fails: what is read is what was written, or an error; what is written is whole, or not there."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.remedies import remedy
from pipelines import storage as module
from pipelines.config import SourceConfig, StageResources
from pipelines.lease import lease
from pipelines.preprocess.config import AlertConfig, BucketConfig, FilterConfig
from pipelines.preprocess.pipeline import build_index
from pipelines.schema import data_files, require_manifest
from pipelines.storage import Storage, StorageOptions
from tests.conftest import S3
from tests.faulty import Fault, Proxy, faulty
from tests.in_process import without_ray

SMALL, LARGE = np.random.default_rng(0).bytes(3000), np.random.default_rng(1).bytes(9_000_000)  # one request; two parts
TABLE = pa.table({"number": np.arange(20_000), "value": np.random.default_rng(2).random(20_000)})
ATTEMPTS = 2
FAILING = (Fault.BUSY, Fault.LOST_ANSWER, Fault.RESET, Fault.RESET_HALFWAY, Fault.CUT, Fault.CUT_UNNOTICED)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)  # the least that S3 takes


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[Proxy]:
    with faulty(s3.endpoint) as running:
        yield running


@pytest.fixture(scope="module")
def direct(s3: S3) -> Storage:
    """The folder, past the proxy, with what the tests read."""
    storage = Storage(f"s3://{s3.bucket}/faults", StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1"))
    storage.write("small", SMALL)
    storage.write("large", LARGE)
    storage.write("tiny", b"ok")
    storage.write_table("table.parquet", TABLE)
    return storage


def through(proxy: Proxy, direct: Storage, attempts: int = ATTEMPTS) -> Storage:
    options = StorageOptions(
        s3_endpoint=proxy.endpoint, s3_region="us-east-1", s3_attempts=attempts, s3_timeout_seconds=20
    )
    return Storage(direct.uri, options)


def read_range(storage: Storage) -> bool:
    target = bytearray(500_000)
    storage.open("large").read_into(memoryview(target), 1_000_000)
    return target == LARGE[1_000_000:1_500_000]


READS: dict[str, Callable[[Storage], bool]] = {
    "small": lambda storage: storage.read("small") == SMALL,
    "large": lambda storage: storage.read("large") == LARGE,
    "range": read_range,
    "stream": lambda storage: storage.stream("large", len(LARGE)).read(2_000_000) == LARGE[:2_000_000],
    "table": lambda storage: storage.read_table("table.parquet").equals(TABLE),
    "column": lambda storage: storage.read_table("table.parquet", ["value"]).equals(TABLE.select(["value"])),
}
FEW = {name: READS[name] for name in ("small", "table")}  # where Arrow's own attempts are all there is


@pytest.mark.parametrize("fault", [*FAILING, Fault.SLOW])
def test_what_is_read_past_a_fault_is_exactly_what_was_written(proxy, direct, fault):
    for name, read in READS.items() if fault is Fault.CUT_UNNOTICED else FEW.items():
        storage = through(proxy, direct)
        proxy.inject(fault, "GET")
        assert read(storage), name
        assert len(proxy.seen) >= 1 + (fault is not Fault.SLOW)


@pytest.mark.parametrize("fault", FAILING)
def test_a_fault_that_stays_is_an_error_after_as_many_requests_as_are_set(proxy, direct, fault):
    for name, read in FEW.items():
        storage = through(proxy, direct)
        proxy.inject(fault, "GET", times=1000)
        with pytest.raises((OSError, RuntimeError)) as error:
            read(storage)
        assert remedy(str(error.value)) is not None, name
        assert len(proxy.seen) <= 2 * ATTEMPTS  # curl asks once more by itself, where a kept connection was reset


def test_an_error_that_is_longer_than_the_file_is_asked_again(proxy, direct):
    """Arrow gives up at once where an error's text does not fit the bytes that it asked for."""
    storage = through(proxy, direct, attempts=3)
    proxy.inject(Fault.BUSY, "GET", times=2)
    assert storage.read("tiny") == b"ok"
    proxy.inject(Fault.BUSY, "GET", times=1000)
    with pytest.raises(OSError, match="tiny, 3 times"):
        storage.read("tiny")


def test_a_listing_is_whole_or_an_error(proxy, direct):
    storage, names = through(proxy, direct), [file.name for file in direct.list()]
    for fault in FAILING:
        proxy.inject(fault, "GET .*list-type")
        try:
            assert [file.name for file in storage.list()] == names
        except OSError:
            assert fault is Fault.CUT_UNNOTICED  # half of an XML document


WHOLE, PART, COMPLETE, BEGIN = "PUT", "PUT .*partNumber=2", r"POST .*uploadId", r"POST .*uploads"


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST_ANSWER, Fault.RESET])
@pytest.mark.parametrize("matching", [WHOLE, BEGIN, PART, COMPLETE], ids=["whole", "begin", "part", "complete"])
def test_what_is_written_past_a_fault_is_whole_and_what_fails_leaves_the_old(proxy, direct, tmp_path, fault, matching):
    data = SMALL if matching is WHOLE else LARGE
    (tmp_path / "file").write_bytes(data)

    def write_whole(at: Storage) -> None:
        at.write("target", data)

    def upload(at: Storage) -> None:
        at.upload("target", tmp_path / "file")

    def write_in_pieces(at: Storage) -> None:
        with at.output("target") as file:
            for start in range(0, len(data), 1_000_000):
                file.write(data[start : start + 1_000_000])

    for write in (write_whole, upload, write_in_pieces) if fault is Fault.RESET else (write_in_pieces,):
        storage = through(proxy, direct)
        direct.write("target", b"old")
        proxy.inject(fault, matching)
        write(storage)
        assert len(proxy.seen) == 2
        assert direct.read("target") == data
        direct.write("target", b"old")
        proxy.inject(fault, matching, times=1000)
        with pytest.raises(OSError, match=r"faults/target: writing it failed: AWS Error (SLOW|INTERNAL|NETWORK)"):
            write(storage)
        assert len(proxy.seen) == ATTEMPTS
        proxy.inject(None)
        assert direct.read("target") in ([b"old", data] if fault is Fault.LOST_ANSWER else [b"old"])
        write(storage)
        assert direct.read("target") == data


def test_what_is_broken_off_in_pieces_leaves_the_old_and_no_upload(direct):
    folder = direct.folder("broken")
    for size in (1000, 9_000_000):
        folder.write("target", b"old")
        with pytest.raises(TypeError, match="bytes-like"), folder.output("target") as file:
            [file.write(part) for part in (LARGE[:size], "no bytes")]
        assert folder.read("target") == b"old"
    bucket, _, prefix = folder.root.partition("/")
    assert "Uploads" not in folder._client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/")


def test_an_upload_that_was_completed_unheard_is_made_again(proxy, direct):
    """As servers do that forget an upload when it is completed."""
    proxy.inject(Fault.LOST_AND_GONE, COMPLETE, times=2)
    through(proxy, direct).write("target", LARGE)
    assert len(proxy.seen) == 3
    assert direct.read("target") == LARGE


def test_an_index_made_past_faults_has_the_rows_of_one_without(proxy, direct, monkeypatch):
    without_ray(monkeypatch)
    for number in range(12):
        buffer = io.BytesIO()
        Image.effect_noise((30 + number, 40), 60).save(buffer, "PNG")
        direct.write(f"images/{number}.png", buffer.getvalue() if number else buffer.getvalue()[:50])
        direct.write(f"images/{number}.txt", b"a caption")

    def index(storage: Storage, folder: str) -> list[dict]:
        with lease(storage.folder(folder)) as held:
            build_index(
                sources=[SourceConfig(path=f"{storage.uri}/images")],
                filters=FilterConfig(),
                buckets=BucketConfig(resolution=64),
                held=held,
                rows_per_file=4,
                resources=StageResources(),
                alerts=AlertConfig(),
                begin=lambda: None,
            )
        dataset = direct.folder(folder)
        files = data_files(dataset, require_manifest(dataset, "index"))
        assert sorted(file.name for file in dataset.list("data")) == [file.name for file in files]
        return [row for file in files for row in dataset.read_table(file.name).to_pylist()]

    expected = index(direct, "index")
    proxy.shower(seed=3, share=0.2, faults=(*FAILING[:5], Fault.SLOW))
    assert index(through(proxy, direct, attempts=10), "index-past-faults") == expected
    assert len(proxy.seen) > 10
    assert not proxy.conditional  # not every server knows conditions, and some ignore them
    assert len(expected) == 12
    assert sorted(row["reject_reason"] or "kept" for row in expected) == ["kept"] * 11 + ["unreadable"]
