"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys

from tqdm import tqdm

LOG_INTERVAL_SECONDS = 10.0


def progress(label: str, total: int, unit: str = "images", start: int = 0) -> tqdm:
    """A bar that is advanced with .update(n) and closed by its with-statement.

    Where standard error is no terminal, as in a job's log, it prints a line every ten seconds instead of redrawing.
    """
    terminal = sys.stderr.isatty()
    return _Bar(
        desc=label,
        total=total,
        initial=start,
        unit=" " + unit,
        mininterval=0.2 if terminal else LOG_INTERVAL_SECONDS,
        maxinterval=1.0 if terminal else LOG_INTERVAL_SECONDS,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        redraw=terminal,
    )


class _Bar(tqdm):
    """tqdm, with whole lines instead of carriage returns where nothing can be redrawn."""

    def __init__(self, *args, redraw: bool, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self._redraw = redraw
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print it as a line."""
        if self._redraw:
            return bool(super().display(msg, pos))
        print(msg if msg is not None else str(self), file=sys.stderr, flush=True)
        return True
