import os
import pickle
import signal
import subprocess
import sys

import pyarrow as pa
import pytest

from pipelines import storage as module
from pipelines.storage import Storage, StorageOptions
from tests.conftest import S3

TABLE = pa.table({"name": ["b", None, "a"], "number": pa.array([1, 2, None], pa.int32())})


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "folder"))


def names(storage: Storage, folder: str = "") -> list[str]:
    return [file.name for file in storage.list(folder)]


def on_disk(tmp_path) -> list[str]:
    return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())


def fail_to_flush(monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


def killed_while_writing(storage: Storage, name: str) -> None:
    """A process of its own that dies by SIGKILL between the last byte and the rename."""
    program = (
        "import os, signal, sys\n"
        "from pipelines.storage import Storage\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Storage(sys.argv[1]).write(sys.argv[2], b'half')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, storage.uri, name], check=False)
    assert ended.returncode == -signal.SIGKILL


def test_what_is_written_is_read(storage):
    storage.write("a/b/c.bin", b"\x00\xff")
    assert storage.read("a/b/c.bin") == b"\x00\xff"
    assert storage.exists("a/b/c.bin")
    assert not storage.exists("a/b")
    assert not storage.exists("a/b/d.bin")


def test_a_write_replaces_what_is_there(storage):
    storage.write("a", b"long and old")
    storage.write("a", b"new")
    assert storage.read("a") == b"new"


def test_json_there_and_back(storage):
    value = {"ä": [1, 2.5, None, True], "nested": {"quote": '"', "line": "\u2028"}}
    storage.write_json("a.json", value)
    assert storage.read_json("a.json") == value


def test_tables_there_and_back_whole_or_by_column(storage):
    size = storage.write_table("a.parquet", TABLE, compression="zstd")
    assert size == len(storage.read("a.parquet"))
    assert storage.read_table("a.parquet").equals(TABLE)
    assert storage.read_table("a.parquet", ["number"]).equals(TABLE.select(["number"]))
    assert storage.read_table("a.parquet", []).num_columns == 0


def test_a_table_without_rows_keeps_its_schema(storage):
    storage.write_table("a.parquet", TABLE.slice(0, 0))
    assert storage.read_table("a.parquet").schema == TABLE.schema


def test_a_missing_file_is_an_error(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read_table("nothing.parquet")


def test_a_failing_write_leaves_neither_name_nor_temporary(storage, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        fail_to_flush(broken)
        with pytest.raises(OSError, match="No space"):
            storage.write("a/b", b"data")
    assert on_disk(tmp_path) == []


def test_a_failing_write_leaves_what_was_there(storage, tmp_path, monkeypatch):
    storage.write("a", b"old")
    fail_to_flush(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        storage.write("a", b"new")
    assert storage.read("a") == b"old"
    assert on_disk(tmp_path) == ["folder/a"]


def test_a_table_that_cannot_be_made_writes_nothing(storage, tmp_path):
    with pytest.raises(pa.ArrowException, match="codec"):
        storage.write_table("a.parquet", TABLE, compression="no such codec")
    assert on_disk(tmp_path) == []


def test_a_killed_writer_leaves_only_what_list_hides_and_remove_incomplete_deletes(storage, tmp_path):
    storage.write("deep/kept", b"whole")
    killed_while_writing(storage, "deep/lost")
    assert len(on_disk(tmp_path)) == 2
    assert names(storage) == ["deep/kept"]
    assert not storage.exists("deep/lost")
    assert storage.remove_incomplete() == 1
    assert on_disk(tmp_path) == ["folder/deep/kept"]
    assert storage.remove_incomplete() == 0


def test_list_is_sorted_relative_and_deep(storage):
    for name in ("b", "a/z", "a/y/x", "a.b", "c/1", "c/10", "c/2"):
        storage.write(name, name.encode())
    assert names(storage) == sorted(["b", "a/z", "a/y/x", "a.b", "c/1", "c/10", "c/2"])
    assert names(storage, "a") == ["a/y/x", "a/z"]
    assert names(storage, "nothing") == []
    assert {file.name: file.size for file in storage.list("c")} == {"c/1": 3, "c/10": 4, "c/2": 3}


def test_a_file_that_changes_changes_its_stat(storage):
    storage.write("a", b"1")
    before = storage.list()
    assert storage.list() == before
    storage.write("a", b"2")
    assert storage.list() != before


def test_a_folder_of_a_storage_is_a_storage(storage):
    storage.folder("x/y").write("z", b"1")
    assert storage.read("x/y/z") == b"1"


def test_a_file_is_uploaded_whole_and_stays_where_it_was(storage, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 1000)
    storage.write("deep/copy", b"old")
    storage.upload("deep/copy", tmp_path / "weights")
    assert storage.read("deep/copy") == (tmp_path / "weights").read_bytes()
    assert names(storage) == ["deep/copy"]


def test_an_upload_that_fails_leaves_neither_name_nor_temporary(storage, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        storage.upload("deep/copy", tmp_path / "nothing")
    (tmp_path / "weights").write_bytes(b"weights")
    fail_to_flush(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        storage.upload("deep/copy", tmp_path / "weights")
    assert on_disk(tmp_path) == ["weights"]


def written_in_pieces(storage: Storage) -> None:
    """A file that is whole, one that is broken off, and what is listed meanwhile."""
    data = os.urandom(20_000_000)
    with storage.output("folder/whole") as file:
        file.write(data[:7])
        file.write(memoryview(data)[7:])
        assert names(storage) == []
    assert storage.read("folder/whole") == data
    with pytest.raises(TypeError), storage.output("other/broken") as file:
        [file.write(part) for part in (data, "no bytes")]
    assert storage.folders() >= {"folder"}
    assert names(storage) == ["folder/whole"]


def test_what_is_written_in_pieces_is_whole_or_not_there(storage, tmp_path):
    written_in_pieces(storage)
    assert on_disk(tmp_path) == ["folder/folder/whole"]


def test_what_is_uploaded_in_pieces_is_whole_or_not_there(s3: S3, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)
    options = StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1")
    written_in_pieces(Storage(f"s3://{s3.bucket}/pieces", options))


def test_a_deleted_file_is_gone(storage):
    storage.write("a", b"1")
    storage.delete("a")
    assert names(storage) == []


def test_a_storage_travels_without_its_connection(storage):
    storage.write("a", b"1")
    assert storage.exists("a")
    assert "filesystem" in vars(storage)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert "filesystem" not in vars(copy)
    assert copy.read("a") == b"1"


def test_an_s3_folder_is_named_as_bucket_and_prefix():
    storage = Storage("s3://bucket/prefix/", StorageOptions(s3_endpoint="http://127.0.0.1:1"))
    assert not storage.is_local
    assert storage.path("a/b") == "bucket/prefix/a/b"
    assert storage.folder("c").uri == "s3://bucket/prefix/c"
    assert pickle.loads(pickle.dumps(storage)) == storage


@pytest.mark.parametrize("uri", ["gs://bucket/prefix", "file:///data", "hdfs://host/data", "S3://bucket/prefix"])
def test_a_scheme_that_is_not_served_is_refused_and_not_taken_for_a_local_folder(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=uri.partition(":")[0]):
        Storage(uri).write("a", b"1")
    assert list(tmp_path.iterdir()) == []
