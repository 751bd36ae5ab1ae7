"""A cluster that is gone under a job is told, before Ray ends the process; on a real one by tests/soak."""

import re
import socket
import threading

from jobs.watch import watch


def test_a_head_that_answers_no_more_is_told_once():
    told, heard = [], threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        heard.set()

    with socket.create_server(("127.0.0.1", 0), backlog=1) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        ended = watch(address, tell, seconds=1.0)
        for _ in range(60):  # twice as often as it looks in that time
            head.accept()[0].close()
        assert told == []
    assert heard.wait(60)
    ended.set()
    (message,) = told
    assert re.match(rf"the Ray cluster at {address} has not answered for \d+ s: .* after 1 s Ray ends", message)


def test_a_watch_that_has_ended_tells_nothing():
    with socket.create_server(("127.0.0.1", 0)) as head:
        told: list[str] = []
        watch(f"127.0.0.1:{head.getsockname()[1]}", told.append, seconds=0.1).set()
    assert [thread for thread in threading.enumerate() if thread.name == "watch" and thread.join(60)] == []
    assert told == []
