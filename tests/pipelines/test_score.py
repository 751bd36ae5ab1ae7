"""Computed scores: the right ones, once for each image and set of weights, and limits on them that read no pixel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs.checks import check_scores, check_scoring
from pipelines.config import SourceConfig, StageResources
from pipelines.images import content_id
from pipelines.lease import lease
from pipelines.originals import Originals
from pipelines.preprocess.config import AlertConfig, BucketConfig, FilterConfig, ScoreLimits, ScoringConfig
from pipelines.preprocess.pipeline import Outcome, build_index
from pipelines.preprocess.score import Scorer, fingerprint
from pipelines.preprocess.write import FAILURE
from pipelines.schema import Column
from pipelines.storage import Storage, StorageOptions
from tests.reference import kept_rows

OPTIONS = StorageOptions()
CLIP_SHAPE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CAPTIONS = {"a": "a red fox", "b": "two boats", "c": None, "d": "a house"}


class Here:
    """As much of a Ray dataset as the stages use, in this process."""

    scored = 0

    def __init__(self, units: list[pa.Table]) -> None:
        self.units = units

    def map_batches(self, stage: Any, fn_constructor_args: tuple = (), **_: Any) -> Here:
        if stage is Scorer:
            Here.scored += sum(unit.num_rows for unit in self.units)
            stage = Scorer(*fn_constructor_args)
        return Here([stage(unit) for unit in self.units])

    def iter_rows(self) -> Any:
        return (row for unit in self.units for row in unit.to_pylist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, caption) in enumerate(CAPTIONS.items()):
        picture(tmp_path / f"images/{name}.png", number, caption)
    (tmp_path / "images/broken.png").write_bytes(b"broken")
    (tmp_path / "images/broken.txt").write_text("words")
    torch.manual_seed(3)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_SHAPE}))
    save_file(open_clip.CLIP(**CLIP_SHAPE).state_dict(), tmp_path / "clip/open_clip_model.safetensors")
    for name in ("one", "two"):
        save_file({"weight": torch.randn(1, 16), "bias": torch.randn(1)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def picture(path: Path, seed: int, caption: str | None) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def scoring(folder: Path, head: str | None = "one") -> ScoringConfig:
    aesthetic = head and str(folder / f"{head}.safetensors")
    return ScoringConfig(model=f"local-dir:{folder}/clip", aesthetic_head=aesthetic, rows_per_file=3, batch=2)


def index(folder: Path, monkeypatch: pytest.MonkeyPatch, head: str | None = "one", **limits: ScoreLimits) -> Outcome:
    """The index as it is after one more run."""
    Here.scored = 0
    monkeypatch.setattr("pipelines.preprocess.pipeline.dataset_of", Here)
    monkeypatch.setattr("pipelines.preprocess.pipeline.attempt", lambda: 0)
    with lease(Storage(str(folder / "index"))) as held:
        return build_index(
            sources=[SourceConfig(path=str(folder / "images"))],
            filters=FilterConfig(scores=limits, min_caption_characters=0),
            buckets=BucketConfig(resolution=64, multiple=8),
            held=held,
            rows_per_file=4,
            resources=StageResources(),
            alerts=AlertConfig(),
            begin=lambda: None,
            scoring=scoring(folder, head),
        )


def kept(folder: Path, outcome: Outcome) -> dict[str, float | None]:
    """The aesthetic scores of what is kept."""
    rows = kept_rows(Storage(str(folder / "index")), outcome.manifest).to_pylist()
    return {row[Column.PATH].removesuffix(".png"): row[Column.AESTHETIC_SCORE] for row in rows}


def expected(folder: Path, name: str) -> tuple[float, float]:
    """(similarity, aesthetic score) as open_clip alone gives them."""
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}/clip")
    head = open_clip_head(folder)
    with torch.no_grad():
        image = model.eval().encode_image(prepare(Image.open(folder / f"images/{name}.png"))[None])
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}/clip")([CAPTIONS[name] or ""]))
        return torch.cosine_similarity(image, text).item(), head(image / image.norm()).item()


def open_clip_head(folder: Path) -> torch.nn.Linear:
    layer = torch.nn.Linear(16, 1)
    layer.load_state_dict(load_file(folder / "one.safetensors"))
    return layer


def test_scores_are_those_of_the_model_and_the_head(folder, monkeypatch):
    outcome = index(folder, monkeypatch)
    assert (Here.scored, outcome.told.failures) == (4, {})  # what cannot be read has no score
    similarity, aesthetic = expected(folder, "b")
    assert kept(folder, outcome)["b"] == pytest.approx(aesthetic, abs=1e-5)
    below = index(folder, monkeypatch, clip_similarity=ScoreLimits(min=similarity - 1e-4))
    above = index(folder, monkeypatch, clip_similarity=ScoreLimits(min=similarity + 1e-4))
    assert ("b" in kept(folder, below), "b" in kept(folder, above)) == (True, False)
    required = index(folder, monkeypatch, clip_similarity=ScoreLimits(required=True))
    assert set(kept(folder, required)) == {"a", "b", "d"}  # nothing was said of c


def test_a_changed_limit_scores_nothing_and_other_weights_score_all(folder, monkeypatch):
    first = index(folder, monkeypatch)
    scores = sorted(score for score in kept(folder, first).values() if score is not None)
    assert len(scores) == 4
    for path in (folder / "images").glob("?.png"):  # whoever reads a pixel from here on reads garbage
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    limited = index(folder, monkeypatch, aesthetic_score=ScoreLimits(min=scores[2]))
    assert (Here.scored, sorted(kept(folder, limited).values())) == (0, scores[2:])
    assert limited.manifest.counts["low_score"] == 2
    assert index(folder, monkeypatch).manifest.digest == first.manifest.digest
    other = index(folder, monkeypatch, head="two")
    assert (Here.scored, len(other.told.failures)) == (4, 4)  # by other weights, and the files are garbage now
    assert set(kept(folder, other).values()) == {None}
    assert kept(folder, first) == kept(folder, index(folder, monkeypatch))


def test_a_new_image_alone_is_scored(folder, monkeypatch):
    index(folder, monkeypatch)
    picture(folder / "images/e.png", 9, "a tree")
    assert (index(folder, monkeypatch).done, Here.scored) == (1, 1)


def test_of_several_captions_the_best_one_counts(folder):
    data = (folder / "images/a.png").read_bytes()
    originals = Originals([SourceConfig(name="s", path=str(folder / "images"))], OPTIONS)
    known = {"id": content_id(data), "source": "s", "path": "a.png", "file": None, "offset": None}
    told = [["a red fox"], ["two boats"], ["a red fox", " ", "two boats"], [" "], None]
    rows = [known | {"key": str(number), "captions": captions} for number, captions in enumerate(told)]
    table = Scorer(scoring(folder, None), originals, 10_000, OPTIONS)(pa.Table.from_pylist(rows))
    fox, boats, both, *none = table.column(Column.CLIP_SIMILARITY).to_pylist()
    assert fox != boats
    assert both == pytest.approx(max(fox, boats), abs=1e-6)
    assert none == [None, None]
    assert set(table.column(Column.AESTHETIC_SCORE).to_pylist()) == {None}  # without a head


def test_an_image_that_changed_is_named_and_the_others_are_scored(folder):
    config = scoring(folder)
    originals = Originals([SourceConfig(name="s", path=str(folder / "images"))], OPTIONS)
    rows = [
        {
            "key": name,
            "id": "0" * 32,
            "source": "s",
            "path": f"{name}.png",
            "file": None,
            "offset": None,
            "captions": None,
        }
        for name in ("a", "gone")
    ]
    table = Scorer(config, originals, 10_000, OPTIONS)(pa.Table.from_pylist(rows))
    reasons = table.column(FAILURE).to_pylist()
    assert reasons[0] == "the file has changed since it was indexed"
    assert "FileNotFoundError" in reasons[1]
    assert str(folder) not in reasons[1]


def test_a_head_that_does_not_fit_is_refused_with_what_it_has(folder):
    save_file({"weight": torch.zeros(1, 8)}, folder / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"narrow\.safetensors has weight \[1, 8\]; a weight \[1, 16\]"):
        fingerprint(scoring(folder, "narrow"), OPTIONS)
    with pytest.raises(FileNotFoundError, match="missing"):
        fingerprint(scoring(folder, "missing"), OPTIONS)


def test_weights_are_named_by_a_path_and_pickles_only_on_request():
    check_scoring("scoring", ScoringConfig(model="ViT-L-14", weights="s3://b/clip.safetensors"))
    check_scoring("scoring", ScoringConfig(model="ViT-L-14", weights="clip.pt", allow_pickle=True))
    for wrong, message in (
        ({"model": "ViT-L-14"}, "name the file"),
        ({"model": "local-dir:x", "weights": "y.safetensors"}, "not both"),
        ({"model": "ViT-L-14", "weights": "clip.pt"}, "allow_pickle"),
        ({"model": "local-dir:x", "aesthetic_head": "head.pth"}, "convert it"),
    ):
        with pytest.raises(ValueError, match=message):
            check_scoring("scoring", ScoringConfig(**wrong))


def test_limits_on_a_score_that_nobody_computes_are_refused():
    limits, sources = {"clip_similarity": ScoreLimits(min=0.2)}, [SourceConfig(path="x")]
    check_scores("filters.scores", limits, sources, computed=True)
    with pytest.raises(ValueError, match=r"filters\.scores\.clip_similarity: is computed where scoring names"):
        check_scores("filters.scores", limits, sources)
