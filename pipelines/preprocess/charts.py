"""Plain HTML and SVG for a page that a person reads: no script, no outside file, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

INK, MUTED, RULE, KEPT, LOST, PALE = "#1f2933", "#69737f", "#e3e7eb", "#2f6f8f", "#c2603f", "#eef2f5"
SHADES = ("#c9dde8", "#123a52")  # of few and of many
WIDTH = 960  # of a chart, in units of its own
PAGE_STYLE = f"""
:root {{ color-scheme: light }}
body {{ margin: 0; background: #fff; color: {INK}; font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }}
main {{ max-width: 1000px; margin: 0 auto; padding: 40px 24px 80px }}
h1 {{ font-size: 28px; font-weight: 600; margin: 0 }}
h2 {{ font-size: 18px; font-weight: 600; margin: 56px 0 4px; padding-top: 18px; border-top: 1px solid {RULE} }}
h3 {{ font-size: 14px; font-weight: 600; margin: 28px 0 8px }}
p {{ margin: 4px 0 14px; color: {MUTED}; max-width: 75ch }}
code {{ font: 13px ui-monospace, "DejaVu Sans Mono", monospace; color: {INK} }}
svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif }}
.tiles {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin: 28px 0 0 }}
.tile {{ background: {PALE}; border-radius: 6px; padding: 14px 16px }}
.tile b {{ display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums }}
.tile span {{ color: {MUTED}; font-size: 13px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }}
th, td {{ text-align: right; padding: 5px 0 5px 32px; border-bottom: 1px solid {RULE} }}
th {{ font-weight: 600; color: {MUTED} }}
.words th, .words td, th:first-child, td:first-child {{ text-align: left }}
th:first-child, td:first-child {{ padding-left: 0 }}
.cards {{ display: grid; grid-template-columns: repeat(6, 1fr); gap: 16px 14px }}
.pairs {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: 20px }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 10px; padding: 10px; background: {PALE};
  border-radius: 6px }}
.pair > span {{ grid-column: 1 / 3; font-size: 12px; color: {MUTED}; overflow-wrap: anywhere }}
figure {{ margin: 0; font-size: 12px; line-height: 1.35; min-width: 0 }}
figure .frame {{ height: 136px; display: flex; align-items: center; justify-content: center; background: {PALE};
  border-radius: 4px; overflow: hidden; margin-bottom: 5px; color: {MUTED}; text-align: center; padding: 4px }}
.pair .frame {{ background: #fff }}
figure img {{ max-width: 100%; max-height: 100% }}
figcaption, .note {{ overflow: hidden; overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 3 }}
.note {{ color: {MUTED} }}
@media (max-width: 760px) {{
  .tiles, .pairs {{ grid-template-columns: 1fr 1fr }}
  .cards {{ grid-template-columns: repeat(3, 1fr) }}
}}
"""


def page(title: str, digest: str, sections: Sequence[str]) -> str:
    """A whole document; the digest says what it shows."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="digest" content="{escape(digest)}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{PAGE_STYLE}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a sentence or two, and what they are about."""
    return f"<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n" + "\n".join(parts)


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """A few numbers, large, each with its words."""
    cells = (
        f'<div class="tile"><b>{escape(number)}</b><span>{escape(words)}</span></div>' for number, words in numbers
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table; numbers stand to the right, the first column and `words` to the left."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{"words" if words else "numbers"}"><tr>{top}</tr>{body}</table>'


def short(number: float) -> str:
    """A number as a person reads it: 1,234, then 12k, 3.4M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= max(unit, 1e4):
            return f"{number / unit:.3g}{letter}"
    return f"{number:,.0f}"


def percent(part: float, whole: float) -> str:
    """A share, in percent with one digit behind the point."""
    return f"{100 * part / whole:.1f}%" if whole else "none"


def funnel(steps: Sequence[tuple[str, int, int]]) -> str:
    """Bars of (name, what is left after the step, what it takes away), one below the other."""
    line, left, right = 30, 150, 190
    whole = max(1, steps[0][1])
    scale = (WIDTH - left - right) / whole
    parts = []
    for number, (name, rest, gone) in enumerate(steps):
        y = number * line
        end = left + rest * scale
        words = short(rest) + (f"  (\u2212{short(gone)})" if gone else "")
        parts.append(_text(left - 12, y + 19, name, "end"))
        parts.append(_box(left, y + 5, rest * scale, 20, KEPT))
        if gone:
            parts.append(_box(end, y + 5, max(1.5, gone * scale), 20, LOST))
        parts.append(_text(end + gone * scale + 10, y + 19, words, "start", MUTED))
    return _svg(len(steps) * line, parts)


def columns(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    axis: str,
    colour: str = KEPT,
    height: int = 220,
    upright: bool = False,
) -> str:
    """Columns side by side with a label below each that is not empty; `upright` turns labels by 90 degrees."""
    left, top, bottom = 56, 14, 92 if upright else 44
    step = (WIDTH - left) / max(1, len(values))
    highest = max([*values, 1])
    scale = (height - top) / highest
    parts = []
    for tick in _ticks(highest):
        y = height - tick * scale
        parts += [_line(left, y, WIDTH, y), _text(left - 8, y + 4, short(tick), "end", MUTED)]
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = left + place * step
        gap = min(2.0, step * 0.15)
        parts.append(
            _box(x + gap / 2, height - value * scale, step - gap, value * scale, colour, words=f"{label}: {value:,.0f}")
        )
        if label and upright:
            parts.append(_text(x + step / 2 + 4, height + 8, label, "end", MUTED, turned=-90))
        elif label:
            parts.append(_text(x + step / 2, height + 17, label, "middle", MUTED))
    parts.append(_text((left + WIDTH) / 2, height + bottom - 8, axis, "middle"))
    return _svg(height + bottom, parts)


def heat_map(counts: np.ndarray, edges: Sequence[float], *, mark: float) -> str:
    """Counts [height, width] over one logarithmic scale of pixels in both directions, with lines at the side `mark`."""
    occupied = np.flatnonzero(counts.any(0) | counts.any(1))
    low, high = (occupied[0], occupied[-1] + 1) if len(occupied) else (0, 1)
    counts, edges = counts[low:high, low:high], edges[low : high + 1]
    left, top, bottom, side = 64, 10, 48, 520
    cell, base, span = side / len(counts), top + side, math.log(edges[-1] / edges[0])
    most = max(2, int(counts.max()))
    parts = [_box(left, top, side, side, PALE)]
    for row, column in np.argwhere(counts):
        count = int(counts[row, column])
        shade = _mix(*SHADES, math.log(count) / math.log(most))
        ranges = [f"{edges[place]:.0f} to {edges[place + 1]:.0f}" for place in (row, column)]
        words = f"{count:,} of height {ranges[0]}, width {ranges[1]}"
        parts.append(_box(left + column * cell, base - (row + 1) * cell, cell + 0.3, cell + 0.3, shade, words=words))
    for value in [2**power for power in range(17)]:
        if edges[0] <= value <= edges[-1]:
            at = side * math.log(value / edges[0]) / span
            parts.append(_text(left + at, base + 18, str(value), "middle", MUTED))
            parts.append(_text(left - 8, base - at + 4, str(value), "end", MUTED))
    if edges[0] < mark < edges[-1]:
        at = side * math.log(mark / edges[0]) / span
        parts.append(_line(left + at, top, left + at, base, LOST, dashes="5 4"))
        parts.append(_line(left, base - at, left + side, base - at, LOST, dashes="5 4"))
        parts.append(_text(left + side + 10, base - at + 4, f"{mark:.0f} pixels", "start", LOST))
    parts.append(_text(left + side / 2, base + 42, "original width, pixels", "middle"))
    parts.append(_text(16, top + side / 2, "original height, pixels", "middle", turned=-90))
    x = left + side + 10
    parts += [_box(x + place * 4, base - 30, 4.3, 10, _mix(*SHADES, place / 39)) for place in range(40)]
    parts += [_text(x, base - 4, "1", "start", MUTED), _text(x + 160, base - 4, short(most), "end", MUTED)]
    parts.append(_text(x, base - 38, "images per cell (logarithmic)", "start", MUTED))
    return _svg(base + bottom, parts)


def picture(jpeg: str | None, caption: str, note: str) -> str:
    """A small picture (base64 of a JPEG file), or the words that there is none, with two texts below it."""
    inside = f'<img src="data:image/jpeg;base64,{jpeg}" alt="">' if jpeg else "no picture"
    return (
        f'<figure><div class="frame">{inside}</div><figcaption>{escape(caption)}</figcaption>'
        f'<div class="note">{escape(note)}</div></figure>'
    )


def cards(pictures: Sequence[str]) -> str:
    """Pictures in rows."""
    return f'<div class="cards">{"".join(pictures)}</div>'


def pairs(found: Sequence[tuple[str, str, str]]) -> str:
    """Pictures two by two, with words below each pair."""
    cells = (f'<div class="pair">{one}{other}<span>{escape(words)}</span></div>' for one, other, words in found)
    return f'<div class="pairs">{"".join(cells)}</div>'


def _ticks(highest: float) -> list[float]:
    """A few round numbers up to the highest."""
    step = 10 ** math.floor(math.log10(highest))
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if highest / (step * part) <= 5)
    return [step * number for number in range(int(highest / step) + 1)] if step >= 1 else [0, highest]


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _box(x: float, y: float, width: float, height: float, colour: str, *, words: str = "") -> str:
    title = f"<title>{escape(words)}</title>" if words else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">{title}</rect>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str = RULE, *, dashes: str = "") -> str:
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"{style}/>'


def _text(x: float, y: float, words: str, anchor: str, colour: str = INK, *, turned: int = 0) -> str:
    turn = f' transform="rotate({turned} {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turn}>{escape(words)}</text>'


def _mix(pale: str, deep: str, share: float) -> str:
    ends = [[int(colour[place : place + 2], 16) for place in (1, 3, 5)] for colour in (pale, deep)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))
