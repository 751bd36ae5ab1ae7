"""A job from settings in a folder of its own."""

from pathlib import Path

import pytest

from jobs.cli import load
from tests.jobs.settings import toml


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A valid job of a kind, with overrides, loaded from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(kind: type, *overrides: str, text: str | None = None):
        Path("job.toml").write_text(toml(kind) if text is None else text)
        return load(kind, "job.toml", overrides)

    return make
