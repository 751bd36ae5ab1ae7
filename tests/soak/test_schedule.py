"""A schedule left running on a source that grows, while drivers, tasks and encoders are killed: all is accounted for.

    python -m pytest tests/soak/test_schedule.py -s --soak 6

The command that infra's CronJob submits is started at an interval, whether or not the one before has ended, as by a
cron that forbids no overlap: the lease alone keeps them apart. Images come in two halves, their captions before or
after them; some are replaced, some go. Most kills wait for a sign that a run is at work, its claim or a worker, and
then a random while. Now and then a process of another machine, a process namespace of its own here, holds the lease,
and is killed: nobody can ask for its pid.
"""

from __future__ import annotations

import io
import itertools
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from pipelines.lease import FOLDER as LEASES
from pipelines.lease import SILENT_SECONDS, _claims
from pipelines.schema import Column, data_files, read_manifest
from pipelines.storage import Storage
from tests.conftest import ROOT
from tests.pipelines.test_lease import HOLD
from tests.soak.killing import OwnCluster, Tally, write_vae
from tests.soak.test_preprocess import TITLES, compare, nothing_is_left, runs_by_status, where_in

INTERVAL, TOGETHER = 15.0, 2  # seconds between starts, and most at a time
MEAN_SECONDS = 8.0  # from one kill to when the next one looks for its victim
KINDS = {"driver": 0.1, "driver at work": 0.4, "task": 0.25, "encoder": 0.25}
LONGEST = {"driver": 10.0, "driver at work": 12.0, "task": 1.0, "encoder": 1.5}  # seconds from the sign to the kill
MOST_WORKERS = 3  # that are killed during one run: Ray starts a task or an actor again as often
FOREIGN = 6  # every how many starts another machine holds the lease
LAST = 300.0  # seconds that a run which nobody kills may take
SETTINGS = """
index_rows_per_file = 4
[source]
path = "{root}/images"
[buckets]
table = [[16, 48], [24, 40], [32, 32], [40, 24], [48, 16]]
multiple = 8
[vae]
preset = "tiny"
path = "{root}/vae.safetensors"
[text]
preset = "tiny"
seed = 2
[encode]
rows_per_file = 4
batch = 4
[tracking]
uri = "sqlite:///{root}/mlflow.db"
"""


@dataclass
class Source:
    """A folder that grows."""

    folder: Path
    random: random.Random
    whole: dict[str, float] = field(default_factory=dict)
    """Images that are there with their captions, and since when, by the monotonic clock."""
    altered: set[str] = field(default_factory=set)
    """Images that were replaced or have gone."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def grow(self) -> None:
        """Until it is over."""
        for number in itertools.count():
            if self.over.wait(self.random.uniform(0.3, 2.5)):
                return
            chance = self.random.random()
            if chance < 0.08 and len(self.whole) > 5:
                name = self._forget()
                if chance < 0.04:
                    (self.folder / name).unlink()
                    (self.folder / name).with_suffix(".txt").unlink()
                    continue
            else:
                name = f"{number:05}.png"
            self._add(name)

    def _forget(self) -> str:
        with self.lock:
            name = self.random.choice(list(self.whole))
            del self.whole[name]
            self.altered.add(name)
        return name

    def _add(self, name: str) -> None:
        path, buffer = self.folder / name, io.BytesIO()
        size = (self.random.randint(20, 90), self.random.randint(20, 90))
        Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
        data = buffer.getvalue()
        caption = "" if self.random.random() < 0.1 else f"picture {name}"
        before = self.random.random() < 0.5
        if before:
            path.with_suffix(".txt").write_text(caption)
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            self.over.wait(self.random.choice((0.0, 0.0, 0.5)))
            file.write(data[len(data) // 2 :])
        if not before:
            path.with_suffix(".txt").write_text(caption)
        with self.lock:
            self.whole[name] = time.monotonic()

    def before(self, moment: float) -> set[str]:
        """What was there at a moment, and is still as it was."""
        with self.lock:
            return {name for name, since in self.whole.items() if since < moment}


@dataclass
class Tick:
    """One start of the command."""

    process: subprocess.Popen[str]
    begun: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    ended: float | None = None
    killed: bool = False
    workers_killed: int = 0
    missed: set[str] = field(default_factory=set)
    """Images that were there when it was started, and not in the index when it had ended well."""

    @property
    def text(self) -> str:
        """What it has printed, without its settings."""
        return "\n".join(line for _, line in self.lines).partition("\n}\n")[2]

    def spans(self, stage: str) -> list[tuple[float, float]]:
        """When it was at work on a stage: from its first bar to what it says at the end, or to its own end."""
        first = [at for at, line in self.lines if re.match(rf"{stage}: +\d+%", line)][:1]
        last = [at for at, line in self.lines if re.match(rf"{stage}: \d+ made", line)][:1]
        return [(first[0], (last or [self.ended or time.monotonic()])[0])] if first else []


@dataclass
class Schedule:
    """The loop."""

    root: Path
    cluster: OwnCluster
    source: Source
    tally: Tally
    random: random.Random
    ticks: list[Tick] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    foreign: list[tuple[float, float]] = field(default_factory=list)
    """When processes of another machine held the lease."""

    def live(self) -> list[Tick]:
        """Runs that have not ended."""
        return [tick for tick in self.ticks if tick.process.poll() is None]

    def start(self) -> Tick:
        """Start the command."""
        words = [str(self.root / "job.toml"), f"index={self.root}/index", f"latents={self.root}/latents"]
        tick = Tick(
            subprocess.Popen(
                [sys.executable, "-m", "jobs.preprocess", *words],
                cwd=ROOT,
                env=self.cluster.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        self.ticks.append(tick)
        self.threads.append(threading.Thread(target=self._read, args=(tick,), daemon=True))
        self.threads[-1].start()
        return tick

    def _read(self, tick: Tick) -> None:
        assert tick.process.stdout is not None
        for line in tick.process.stdout:
            tick.lines.append((time.monotonic(), line.rstrip("\n")))
        if tick.process.wait() == 0:
            there = self.source.before(tick.begun)
            tick.missed = (there - set(paths(self.root))) & self.source.before(tick.begun)
        tick.ended = time.monotonic()

    def holders(self) -> dict[str, Tick]:
        """The run that has claimed each dataset, where it lives."""
        claims = {stage: _claims(Storage(str(self.root / stage))) for stage in ("index", "latents")}
        pids = {tick.process.pid: tick for tick in self.live()}
        return {stage: pids[claim.pid] for stage, found in claims.items() for claim in found if claim.pid in pids}

    def hunt(self) -> None:
        """Kill one after another until growth is over; those that are at work first."""
        kind = "driver at work"
        while not self.source.over.wait(self.random.expovariate(1 / MEAN_SECONDS)):
            while not (self.source.over.is_set() or self.kill(kind)):
                time.sleep(0.05)
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]

    def kill(self, kind: str) -> bool:
        """Kill one of a kind, a random while after it was seen; gives whether there was one until then."""
        live = self.live()
        if kind in TITLES:
            if not self.cluster.workers(TITLES[kind]) or any(tick.workers_killed >= MOST_WORKERS for tick in live):
                return False
            self.source.over.wait(self.random.uniform(0, LONGEST[kind]))
            workers, holders = self.cluster.workers(TITLES[kind]), self.holders().values()
            if not workers or not holders:
                return False
            for tick in self.live():  # of whichever it is
                tick.workers_killed += 1
            where = ", ".join(sorted({self.where(tick) for tick in holders}))
            self.random.choice(workers).kill()
        else:
            chosen = live if kind == "driver" else list(self.holders().values())
            if not chosen:
                return False
            tick = self.random.choice(chosen)
            self.source.over.wait(self.random.uniform(0, LONGEST[kind]))
            where = self.where(tick)
            if tick.process.poll() is not None or (kind != "driver" and where == "start"):
                return False
            tick.killed = True
            tick.process.kill()
        self.tally.killed(kind, where)
        return True

    def where(self, tick: Tick) -> str:
        """What a run is at: by what it has printed, and before its first rows by what it has claimed."""
        where = where_in(tick.text)
        claimed = [stage for stage, holder in self.holders().items() if holder is tick]
        return f"{claimed[0]}, before rows" if claimed and where in ("start", "after index") else where

    def hold_from_elsewhere(self) -> None:
        """Let a process of another machine hold the lease of the index for a while, and kill it."""
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", HOLD]
        with subprocess.Popen(
            [*command, str(self.root / "index")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            if process.stdout.readline() == "held\n":
                begun = time.monotonic()
                time.sleep(self.random.uniform(5, 15))
                process.kill()
                self.foreign.append((begun, time.monotonic()))
                self.tally.killed("elsewhere", "holding the lease")
            process.kill()


def paths(root: Path) -> list[str]:
    """The images that the index has a row of, one for each row."""
    index = Storage(str(root / "index"))
    manifest = read_manifest(index, "index")
    files = data_files(index, manifest) if manifest else []
    return [path for file in files for path in index.read_table(file.name, [Column.PATH]).column(0).to_pylist()]


def check_status(tick: Tick, schedule: Schedule) -> str:
    """Raise AssertionError where an exit status is not true; gives what it meant."""
    code, text, at = tick.process.returncode, tick.text, f"{tick.lines[-5:]}"
    assert tick.ended is not None
    if code == -9:
        assert tick.killed, at
        return "killed"
    if code == 0:
        assert not tick.missed, f"{sorted(tick.missed)} were there before, and the run says that all is done"
        stages = re.findall(r"^(index|latents): (?:nothing new|\d+ made)", text, re.MULTILINE)
        assert stages == ["index", "latents"], text
        return "nothing new" if text.count("nothing new") == 2 else "done"
    if code == 2:
        holder = re.search(r"is being written by process (\d+) on", text)
        if holder is None:
            assert "other processes start on it at the same time" in text, text
            return "refused"
        others = [other for other in schedule.ticks if other.process.pid == int(holder[1])]
        spans = [(other.begun, other.ended or tick.ended) for other in others] or schedule.foreign
        assert any(begun <= tick.ended and tick.begun <= end for begun, end in spans), f"{text}\nwas written by nobody"
        return "refused"
    assert code == 1, text
    named = re.findall(r"^  \S+:(\S+\.png)(?:, crop \d+)?: ", text, re.MULTILINE)
    assert "rows could not be made" in text, text
    assert named, text
    assert set(named) <= schedule.source.altered, text
    return "some replaced meanwhile"


@pytest.mark.timeout(0)
def test_a_schedule_accounts_for_every_image_once_whatever_dies(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seed, tally = time.time_ns() % 1_000_000, Tally("a schedule")
    tally.seeds.append(seed)
    print(f"seed {seed}", flush=True)
    (tmp_path / "images").mkdir()
    write_vae(tmp_path / "vae.safetensors")
    (tmp_path / "job.toml").write_text(SETTINGS.format(root=tmp_path))
    source = Source(tmp_path / "images", random.Random(seed))
    with OwnCluster() as cluster, tally:
        schedule = Schedule(tmp_path, cluster, source, tally, random.Random(seed + 1))
        growing = threading.Thread(target=source.grow, daemon=True)
        growing.start()
        time.sleep(5)
        tally.begun = time.monotonic()
        end = tally.begun + 60 * pytestconfig.getoption("--soak")
        start_at, elsewhere = tally.begun, []
        hunting = threading.Thread(target=schedule.hunt, daemon=True)
        hunting.start()
        for number in itertools.count():
            now = time.monotonic()
            if now > end:
                break
            if now > start_at and len(schedule.live()) < TOGETHER:
                schedule.start()
                start_at = now + INTERVAL
                if len(schedule.ticks) % FOREIGN == 0:
                    elsewhere.append(threading.Thread(target=schedule.hold_from_elsewhere))
                    elsewhere[-1].start()
            time.sleep(0.1)
            if number % 50 == 0:
                assert all(tick.ended or now - tick.begun < LAST for tick in schedule.ticks), "a run hangs"
        source.over.set()
        for thread in (growing, hunting, *elsewhere, *schedule.threads):
            thread.join(LAST)
        rest = schedule.start()
        rest.process.wait(LAST + SILENT_SECONDS)
        idle = schedule.start()
        idle.process.wait(LAST)
        for thread in schedule.threads:
            thread.join(LAST)
        statuses = Counter(check_status(tick, schedule) for tick in schedule.ticks)
        assert rest.process.returncode == 0, rest.text
        assert check_status(idle, schedule) == "nothing new", idle.text
        found = paths(tmp_path)
        assert sorted(found) == sorted(path.name for path in (tmp_path / "images").glob("*.png"))
        for stage in ("index", "latents"):
            spans = sorted(span for tick in schedule.ticks for span in tick.spans(stage))
            assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans)), (stage, spans)
            tally.counts[f"turns at {stage}, none overlapping"] = len(spans)
        folder = Storage(str(tmp_path))
        nothing_is_left(folder)
        taken_over = [file for stage in ("index", "latents") for file in folder.list(f"{stage}/{LEASES}")]
        tally.counts["claims of dead holders taken over"] = len(taken_over)
        fresh = folder.folder("fresh")
        words = [str(tmp_path / "job.toml"), f"index={fresh.uri}/index", f"latents={fresh.uri}/latents"]
        command = [sys.executable, "-m", "jobs.preprocess", *words, f"tracking.uri=sqlite:///{tmp_path}/fresh.db"]
        subprocess.run(command, cwd=ROOT, env=cluster.environment, check=True, timeout=LAST)
        compare(folder, fresh, tally)
        tally.counts |= Counter({f"runs: {status}": count for status, count in statuses.items()})
        tally.counts["images"], tally.counts["replaced or gone"] = len(found), len(source.altered)
    print("  runs on the MLflow page:", runs_by_status(tmp_path))
    assert taken_over
    assert tally.of("driver at work")
    assert "RUNNING" not in runs_by_status(tmp_path)
