"""Which code this is, for a run to remember: the commit where there is one, and what the files are in any case."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parent.parent
FLOORS = ("model", "pipelines", "jobs")
GIT_SECONDS = 5.0


@cache
def code_tags() -> dict[str, str]:
    """Tags of an MLflow run: which job made it of which code.

    "code" is a digest of all source files; git's commit stands beside it, marked where files differ from it. A job that
    was submitted runs in a copy of the directory, which has no history: its code is known by the digest.
    """
    digest = hashlib.sha256()
    for path in sorted(path for floor in FLOORS for path in (PROJECT / floor).rglob("*.py")):
        digest.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes() + b"\0")
    tags = {"code": digest.hexdigest()[:32], "mlflow.source.name": started_module(), "mlflow.source.type": "JOB"}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--", *FLOORS)
        tags["mlflow.source.git.commit"] = commit
        tags["code_is_committed"] = str(changed == "").lower()
    return tags


def started_module() -> str:
    """The module that this process was started with, e.g. jobs.preprocess."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "jobs"


def _git(*arguments: str) -> str | None:
    """What git says of the project; None where there is no git, or no history."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
