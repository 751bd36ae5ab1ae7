"""The command line of every job: CONFIG.toml, key=value overrides, --dry-run. A setting is a field, never a flag."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import signal
import socket
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jobs.config import Job
from jobs.remedies import remedy
from jobs.watch import watch
from pipelines.config import HIDDEN, without_secrets
from pipelines.lease import InUseError, Lease, lease
from pipelines.runs import give_memory_back
from pipelines.storage import Storage
from pipelines.version import started_module

J = TypeVar("J", bound=Job)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
USAGE_ERROR, FAILURE = 2, 1  # exit codes: nothing was started; something failed on its way
STOPPED = 130  # by control-C, as shells call it, and by SIGTERM
LOOK, HELD = 3, 4  # done, and a person should look at it; not done, until a person has looked
KNOCK_SECONDS = 20.0  # longest wait for a cluster's head to take a connection
NOTHING = "null"  # as an override's value
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job
PATHS = ("output", "index", "latents", "path", "file", "parquet", "trunk", "heads")  # settings that are paths
SECRETS = (  # environment variables that no message tells
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
)
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a death is noticed
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again, after it has asked what has arrived
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with its password; pipelines/tracking.py tells it without
    "RAY_USAGE_STATS_ENABLED": "0",
}


class JobError(Exception):
    """What ends a job, in words for the user."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


def main(
    kind: type[J],
    run: Callable[[J], None],
    plan: Callable[[J], None],
    argv: Sequence[str] | None = None,
    *,
    needs_ray: bool = True,
) -> None:
    """Parse the command line into a `kind`, then `plan` it (--dry-run) or start Ray and `run` it. Ends the process.

    A job without `needs_ray` runs in this process alone, or starts Ray itself when there is work for it.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {started_module()}",
        description=kind.__doc__,
        epilog="Each override names a setting by its dotted path, e.g. optimizer.lr=3e-5; values are TOML, and "
        f"{NOTHING} takes the setting out of the file.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="the job's settings")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what would run; start nothing")
    arguments = parser.parse_intermixed_args(argv)
    try:
        job = load(kind, arguments.config, arguments.overrides)
    except JobError as error:
        sys.exit(_complain(f"{arguments.config}: {error}", USAGE_ERROR))
    print(json.dumps(settings(job), indent=2, ensure_ascii=False))
    os.environ.update({name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()})
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # a log holds no colours
    signal.signal(signal.SIGTERM, _interrupt)
    give_memory_back()
    try:
        if arguments.dry_run:
            plan(job)
        else:
            if needs_ray:
                start_ray(job)
            run(job)
    except JobError as error:
        sys.exit(_complain(str(error), error.code))
    except KeyboardInterrupt:
        print("stopped: what is finished stays, and the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not os.path.abspath(frame.filename).startswith(PROJECT):
            print(_hidden(traceback.format_exc()), file=sys.stderr)  # not one of our own messages
        sys.exit(_complain(f"{error} ({os.path.relpath(frame.filename)}:{frame.lineno})", FAILURE))
    except Exception as error:
        print(_hidden(traceback.format_exc()), file=sys.stderr)
        sys.exit(_complain(f"{type(error).__name__}: {error}", FAILURE))
    sys.exit(0)


def load(kind: type[J], path: str, overrides: Sequence[str]) -> J:
    """The job that a TOML file and overrides describe. Raises JobError naming every key that is wrong."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise JobError(f"cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"not TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    _refuse_lost_outputs(kind, values)
    _make_absolute(values)
    try:
        job = kind.model_validate(values)
    except ValidationError as error:
        raise JobError("\n  ".join(["wrong settings:", *(_explain(kind, e) for e in error.errors())])) from error
    return job


def settings(job: Job) -> dict[str, Any]:
    """The resolved configuration as JSON values, to be shown and kept: passwords in addresses are left out."""
    return without_secrets(job.model_dump(mode="json"))


def start_ray(job: Job) -> None:
    """Join the configured or surrounding cluster, or start one on this machine."""
    import ray

    if job.ray.label_selector:
        from pipelines.stages import run_on

        run_on(job.ray.label_selector)
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # the plan of every dataset, in the middle of a bar
    joins = job.ray.address is not None or "RAY_ADDRESS" in os.environ
    address = job.ray.address or os.environ.get("RAY_ADDRESS", "")
    _knock(address)
    ray.init(
        address=job.ray.address if joins else "local",
        num_cpus=None if joins else job.ray.cpus,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}},
    )
    if not address.startswith("ray://"):  # whose client has errors of its own
        watch(ray.get_runtime_context().gcs_address, _complain_in_time)


@contextmanager
def sole_writer(folder: Storage) -> Iterator[Lease]:
    """Hold the folder's lease for the block. Raises JobError, of a job that started nothing, where another has it."""
    try:
        with lease(folder) as held:
            yield held
    except InUseError as error:
        raise JobError(str(error), USAGE_ERROR) from error


def _knock(address: str) -> None:
    """Raise JobError where nobody listens at HOST:PORT; Ray itself tries that for many minutes without a word."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        return  # "auto", and what else Ray finds by itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
    except OSError as error:
        raise JobError(f"ray.address: nobody answers at {address}: {error}") from error


def check_resources(job: Job, key: str, **asked: float) -> None:
    """Whether Ray has the CPU and GPU that the setting asks for, once it runs: otherwise it waits for them, silently.

    Raises JobError where this job started Ray for itself; warns where it joined a cluster, which may grow.
    """
    import ray

    have = ray.cluster_resources()
    lacking = [f"{count:g} {kind}" for kind, count in asked.items() if count > have.get(kind, 0.0)]
    if not lacking:
        return
    there = ", ".join(f"{have.get(kind, 0.0):g} {kind}" for kind in asked)
    what = f"{key}: {' and '.join(lacking)} are asked for, and Ray has {there}"
    if job.ray.address is None and "RAY_ADDRESS" not in os.environ:
        raise JobError(f"{what}: ask for less, set ray.cpus, or join a cluster (ray.address)")
    print(f"warning: {what}: it waits until the cluster has grown, without an autoscaler for ever", file=sys.stderr)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise JobError(f"{override!r} is not key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word, such as a path
    *parents, last = key.split(".")
    table: Any = values
    for parent in parents:
        if isinstance(table, list) and parent.isdecimal() and int(parent) < len(table):
            table = table[int(parent)]
        else:
            table = table.setdefault(parent, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict | list):
            raise JobError(f"{key}: {parent} is not a table")
    if not isinstance(table, dict):
        raise JobError(f"{key}: {parents[-1]} is no table with a {last}")
    if text == NOTHING:
        table.pop(last, None)  # TOML has no word for it: the setting is as if the file left it out
    else:
        table[last] = value


def _make_absolute(values: dict[str, Any]) -> None:
    """Local paths of the settings, seen from the current directory: workers run elsewhere."""
    for key, value in values.items():
        if isinstance(value, dict):
            _make_absolute(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    _make_absolute(item)
        elif isinstance(value, str) and "://" not in value:
            name_or_path = key in ("clip_l", "bigg", "weights") and os.path.exists(value)
            if key in PATHS or name_or_path:
                values[key] = os.path.abspath(value)


def _explain(kind: type[Job], error: Any) -> str:
    """One line for a person: the dotted key, what is wrong, and the nearest name that exists."""
    path = [
        str(part)
        for part in error["loc"]
        if not str(part).startswith(("function-", "tagged-")) and "[" not in str(part)
    ]
    key = ".".join(path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        others = [name for name in _names(kind) if name != path[-1]]
        near = difflib.get_close_matches(path[-1], others, n=1)
        return f"{key}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{key}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (it is {error['input']!r})" if key else message


def _names(kind: type[Job]) -> list[str]:
    """Names of all settings of a job, at any depth."""
    names: set[str] = set()

    def collect(schema: Any) -> None:
        if isinstance(schema, Mapping):
            names.update(schema.get("properties", {}))
            for value in schema.values():
                collect(value)
        elif isinstance(schema, list):
            for value in schema:
                collect(value)

    collect(TypeAdapter(kind).json_schema())
    return sorted(names)


def _refuse_lost_outputs(kind: type[Job], values: Mapping[str, Any]) -> None:
    """A submitted job runs in a temporary copy of its directory: what it writes there by a relative path is lost."""
    if SUBMITTED not in os.environ:
        return
    outputs = {
        name: values.get(name, kind.model_fields[name].default)
        for name in ("output", "index", "latents")
        if name in kind.model_fields
    }
    lost: list[str] = [name for name, v in outputs.items() if isinstance(v, str) and not v.startswith(("/", "s3://"))]
    tracking = values.get("tracking", {})
    uri = tracking.get("uri", "") if isinstance(tracking, Mapping) else ""
    address = str(uri).removeprefix("sqlite:///")
    if kind.TRACKS and "://" not in address and not address.startswith("/"):
        lost.append("tracking.uri")
    if lost:
        raise JobError(
            f"{', '.join(lost)}: a submitted job runs in a temporary copy of its directory; "
            "give absolute paths or s3:// (for tracking.uri a server, or sqlite:////absolute/path.db)"
        )


def _interrupt(number: int, frame: object) -> None:
    """End as control-C does, so that runs are closed: `ray job stop` sends SIGTERM."""
    raise KeyboardInterrupt


def _complain(message: str, code: int) -> int:
    print(f"error: {_hidden(message)}", file=sys.stderr)
    advice = remedy(message)
    if advice is not None:
        print(f"what to do: {advice}", file=sys.stderr)
    return code


def _complain_in_time(message: str) -> None:
    """As _complain, and print what waits to be printed, for which Ray leaves no time."""
    _complain(message, FAILURE)
    sys.stdout.flush()


def _hidden(text: str) -> str:
    """A message without passwords in addresses, and without the values of secret environment variables."""
    for name in SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], HIDDEN)
    return str(without_secrets(text))
