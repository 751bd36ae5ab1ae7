"""The crops of which latents are to be made, file by file: those of all kept rows at once."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import DriverConfig, SourceConfig
from pipelines.originals import Originals
from pipelines.preprocess import kept as module
from pipelines.preprocess.crop import rows_of_crops
from pipelines.preprocess.kept import Kept
from pipelines.preprocess.write import write_rows
from pipelines.runs import Work
from pipelines.schema import COMPUTED, INDEX_SCHEMA, SCHEMA_VERSION, DataFile, Manifest, write_manifest
from pipelines.storage import Storage, StorageOptions
from tests.reference import kept_rows

WEIGHTS = {"one": 1.0, "two": 2.5}


def committed(index: Storage, draws: random.Random, computed: bool) -> Manifest:
    files, count, scores = [], 0, []
    for number in range(draws.randint(0, 5)):
        rows = []
        for row in range(draws.randint(1, 9)):
            key = f"{number:02}{row:02}"
            rejected = draws.random() < 0.3
            captions = [draws.choice(["a", "b"]) for _ in range(draws.randint(0, 2))]
            known = {"key": key, "id": key, "source": draws.choice(list(WEIGHTS)), "path": key, "file_size": 1}
            known |= {"captions": captions, "caption_weights": [1.0] * len(captions), "original_size": [1, 2]}
            known |= {"caption_reasons": [draws.choice([None, "too_long"]) for _ in captions], "bucket": [8, 8]}
            known |= {"aesthetic_score": draws.choice([None, 5.0]), "reject_reason": "blank" if rejected else None}
            rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known)
            count += not rejected
            if draws.random() < 0.7:
                scores.append({"key": key, "clip_similarity": 0.5, "aesthetic_score": draws.choice([None, 7.0])})
        files.append(DataFile(name=f"data/x/{number}.parquet", rows=len(rows)))
        write_rows(pa.Table.from_pylist(rows, INDEX_SCHEMA), index, files[-1].name, "zstd")
    draws.shuffle(scores)
    schema = [("key", pa.string()), ("clip_similarity", pa.float32()), ("aesthetic_score", pa.float32())]
    for number in range(0, len(scores), 4):
        write_rows(
            pa.Table.from_pylist(scores[number : number + 4], pa.schema(schema)), index, f"scores/s/{number}", None
        )
    facts = {COMPUTED: "scores/s"} if computed else {}
    content = {"kind": "index", "counts": {"kept": count}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}}
    return write_manifest(index, files, facts=facts, **content)


@pytest.mark.parametrize("seed", range(12))
def test_crops_are_those_of_all_kept_rows_at_once(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 12)  # one or two files together
    draws, index, crops = random.Random(seed), Storage(str(tmp_path / "index")), 1 + seed % 2
    manifest = committed(index, draws, computed=seed % 3 == 0)
    expected = {row["key"]: row for row in rows_of_crops(kept_rows(index, manifest), crops).to_pylist()}
    sources = [SourceConfig(name=name, path=str(tmp_path), weight=weight) for name, weight in WEIGHTS.items()]
    kept = Kept(index, manifest, crops, Originals(sources, StorageOptions()), Work(DriverConfig()))
    keys = pa.chunked_array([some.combine_chunks() for some in iter(kept.keys())], pa.string()).to_pylist()
    assert sorted(keys) == sorted(expected)
    assert kept.weights.tolist() == [WEIGHTS[expected[key]["source"]] for key in keys]
    assert kept.without_score == sum(row["aesthetic_score"] is None for row in expected.values())
    for place in ("pipelines.schema", "pipelines.preprocess.crop"):
        monkeypatch.setattr(f"{place}.row_digests", lambda _: pytest.fail("a key is hashed once"))
    wanted = np.array([draws.random() < 0.3 for _ in keys], bool)
    for mask in (wanted, np.ones(len(keys), bool)):
        found = [row for rows in kept.rows(mask) for row in rows.to_pylist()]
        assert found == [expected[key] for key, asked in zip(keys, mask, strict=True) if asked]


def test_a_source_that_the_settings_lack_is_named(tmp_path):
    index = Storage(str(tmp_path / "index"))
    manifest = committed(index, random.Random(0), computed=False)
    originals = Originals([SourceConfig(name="one", path=str(tmp_path))], StorageOptions())
    with pytest.raises(ValueError, match="images of the source 'two', and the settings name 'one'"):
        list(Kept(index, manifest, 1, originals, Work(DriverConfig())).keys())
