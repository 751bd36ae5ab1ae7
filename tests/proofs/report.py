"""What a proof hands over: a table and a picture, written by one command line for all of them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.pictures import to_pixels

FIRST_SEED = 10  # trials while a proof was set up had others
LINE, MARGIN, LEAST_WIDTH = 16, 4, 640  # pixels of a sheet


@dataclass(frozen=True)
class Proof:
    """What a proof has found."""

    name: str
    claim: str
    set_up: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    holds: bool
    verdict: str
    picture: Image.Image


Prove = Callable[[int, Sequence[int], int], Iterator[Proof]]
"""From pictures to train on, seeds and samples to measure on: what is found after each seed."""


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean over the seeds, and the least and greatest of them."""
    least, greatest = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({least:.{digits}f} to {greatest:.{digits}f})"


def sheet(rows: Sequence[tuple[str, Tensor]], side: int = 64) -> Image.Image:
    """Rows of pictures, each map `side` pixels high, a label above each row."""
    lines = []
    for label, maps in rows:
        scale = max(1, side // maps.shape[2])
        row = np.pad(to_pixels(maps).repeat(scale, 1).repeat(scale, 2), ((0, 0), (1, 1), (1, 3), (0, 0)))
        lines.append((label, Image.fromarray(np.concatenate(list(row), axis=1))))
    width = max(LEAST_WIDTH, *(line.width for _, line in lines)) + 2 * MARGIN
    height = sum(line.height + LINE + MARGIN for _, line in lines) + 2 * MARGIN
    page, top = Image.new("RGB", (width, height), "white"), MARGIN
    for label, line in lines:
        ImageDraw.Draw(page).text((MARGIN, top), label, fill="black", font=ImageFont.load_default(12))
        page.paste(line, (MARGIN, top + LINE))
        top += line.height + LINE + MARGIN
    return page


def main(prove: Prove, images: int, samples: int, first_seed: int = FIRST_SEED) -> None:
    """Run a proof from the command line: write table and picture into a folder after each seed, and print the last."""
    parser = argparse.ArgumentParser(description=prove.__doc__)
    parser.add_argument("--images", type=int, default=images, help="pictures that each network is trained on")
    parser.add_argument("--samples", type=int, default=samples, help="pictures that each figure is measured on")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--out", type=Path, default=Path("docs/proofs"))
    parser.add_argument("--first-seed", type=int, default=first_seed, help="of data, networks and noise")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    torch.set_num_threads(1)
    begun = time.process_time()
    for number, proof in enumerate(prove(options.images, seeds, options.samples), start=1):
        effort = (
            f"{options.images:,} pictures for each network, {number} of each kind, {options.samples} samples a figure"
        )
        text = write(proof, options.out, f"{effort}; {(time.process_time() - begun) / 60:.1f} minutes of one core.")
    print(text)


def write(proof: Proof, folder: Path, effort: str) -> str:
    """The proof as Markdown, written as NAME.md beside NAME.png."""
    table = [proof.columns, ["---"] * len(proof.columns), *proof.rows]
    lines = [f"# {proof.claim}", "", proof.set_up, effort, "", *("| " + " | ".join(row) + " |" for row in table), ""]
    lines += [
        f"**{'Shown' if proof.holds else 'Not shown'}**: {proof.verdict}",
        "",
        f"![pictures]({proof.name}.png)",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    proof.picture.save(folder / f"{proof.name}.png", optimize=True)
    (folder / f"{proof.name}.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)
