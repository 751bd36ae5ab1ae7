"""Progress is a bar that redraws itself on a terminal, and lines anywhere else."""

import io
import os
import pty
import select
import termios

import pytest

from pipelines.progress import progress


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn of three steps where standard error is such a file."""

    def drawn(stderr: io.TextIOBase) -> None:
        monkeypatch.setattr("sys.stderr", stderr)
        with progress("train base", 3) as bar:
            for _ in range(3):
                bar.update(1)
                bar.refresh()

    return drawn


def test_a_terminal_has_one_bar_that_is_drawn_again_and_again(drawn):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as terminal:
        drawn(terminal)
        written = b""
        while select.select([master], [], [], 0.1 if b"\n" in written else 30)[0]:  # it may arrive in pieces
            written += os.read(master, 1 << 16)
        text = written.decode().replace("\r\n", "\n")  # as terminals end lines
    os.close(master)
    assert text.count("\r") >= 4
    assert (text.count("\n"), text[-1]) == (1, "\n")
    assert "train base: 100%|" in text


def test_a_log_has_whole_lines_and_no_control_characters(drawn):
    log = io.StringIO()
    drawn(log)
    lines = log.getvalue().strip().splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("train base: ") for line in lines)
    assert "train base: 100%|" in lines[-1]
    assert " 3/3 " in lines[-1]
    assert not any(ord(character) < 32 for line in lines for character in line)
