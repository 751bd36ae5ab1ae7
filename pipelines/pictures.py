"""Pictures for people: tensors to pixels, grids for the MLflow page, and labelled contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 6  # pixels around each picture
LABEL_LINES, LABEL_SIZE = 2, 11
BACKGROUND, INK = (245, 245, 245), (40, 40, 40)


def to_pixels(image: Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] of images [B,3,H,W] in [-1, 1]; what lies outside is clipped."""
    scaled = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(rows: Sequence[np.ndarray], least_side: int = 96) -> np.ndarray:
    """Rows of pictures [B, H, W, 3] one below the other, uint8 [H', W', 3]; small pictures are magnified."""
    scale = max(1, -(-least_side // min(rows[0].shape[1:3])))
    padded = [np.pad(row, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255) for row in rows]
    lines = [np.concatenate(list(row), axis=1) for row in padded]
    sheet = np.concatenate(lines, axis=0)
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def contact_sheet(
    cells: Sequence[tuple[str, Sequence[Image.Image]]], columns: int, side: int, title: str = ""
) -> Image.Image:
    """Cells of a label and the pictures beside each other above it; each picture fits a square of `side` pixels."""
    font = ImageFont.load_default(LABEL_SIZE)
    line = LABEL_SIZE + 4
    per_cell = max(len(pictures) for _, pictures in cells)
    width = per_cell * (side + MARGIN) + MARGIN
    height = side + 2 * MARGIN + LABEL_LINES * line
    top = 2 * line if title else 0
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, top + rows * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font)
    for number, (label, pictures) in enumerate(cells):
        left = MARGIN + number % columns * (width + MARGIN)
        upper = top + MARGIN + number // columns * (height + MARGIN)
        draw.rectangle((left, upper, left + width, upper + height), fill=BACKGROUND)
        for place, picture in enumerate(pictures):
            fitted = _fit(picture, side)
            x = left + MARGIN + place * (side + MARGIN) + (side - fitted.width) // 2
            sheet.paste(fitted, (x, upper + MARGIN + (side - fitted.height) // 2))
        characters = max(8, int((width - 2 * MARGIN) / (LABEL_SIZE * 0.56)))
        text = textwrap.wrap(label, characters, max_lines=LABEL_LINES, placeholder=" …")
        draw.text((left + MARGIN, upper + side + 2 * MARGIN), "\n".join(text), fill=INK, font=font)
    return sheet


def _fit(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
