"""Tells that the cluster is gone before Ray ends the driver for it.

Where the head, or the way to it, is gone for `RAY_gcs_rpc_server_reconnect_timeout_s`, Ray ends every process that had
joined the cluster from its own C++ (`_Exit(1)`): nothing is raised, no `finally` runs, and its message has no remedy.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0  # seconds, where the environment does not say otherwise
SHARE = 0.8  # of Ray's patience, after which it is told
LOOKS = 30  # in that time


def watch(address: str, tell: Callable[[str], object], seconds: float | None = None) -> threading.Event:
    """Look in the background whether somebody listens at HOST:PORT, and `tell` it, once, where nobody does for long.

    Ray ends the process `seconds` after the head is gone; None reads the environment. What is given ends the watch.
    """
    ended = threading.Event()
    patience = seconds or float(os.environ.get(RAYS_PATIENCE[0], RAYS_PATIENCE[1]))
    threading.Thread(target=_look, args=(address, tell, patience, ended), daemon=True, name="watch").start()
    return ended


def _look(address: str, tell: Callable[[str], object], patience: float, ended: threading.Event) -> None:
    answered = time.monotonic()
    while not ended.wait(patience / LOOKS):
        if _answers(address, patience / LOOKS):
            answered = time.monotonic()
        elif (silent := time.monotonic() - answered) > SHARE * patience:
            tell(
                f"the Ray cluster at {address} has not answered for {silent:.0f} s: its head, or the way there, is "
                f"gone, and after {patience:.0f} s Ray ends this process"
            )
            return


def _answers(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError:
        return False
    return True
