"""What to do about errors of the libraries below, whose own messages do not say. Ours say it themselves.

docs/errors.md is the table for people; a test keeps the two together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One cause, and the way out."""

    cause: str
    """In a few words."""
    pattern: str
    """What the message holds, a regular expression."""
    advice: str
    """What a person does."""


REMEDIES = (
    Remedy(
        cause="S3 credentials missing or without the right",
        pattern=r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
        r"|UNRECOGNIZED_CLIENT|EXPIRED)",
        advice="Every node needs credentials for this bucket, from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a "
        "profile, or an instance role; jobs carry none. If they are there, they are wrong or lack the right "
        "to this bucket.",
    ),
    Remedy(
        cause="S3 bucket missing",
        pattern=r"AWS Error (NO_SUCH_BUCKET|RESOURCE_NOT_FOUND)",
        advice="Check the bucket's name and storage.s3_region, and make the bucket first: jobs do not.",
    ),
    Remedy(
        cause="S3 server out of reach",
        pattern=r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_|UNKNOWN \(HTTP status 5)"
        r"|answers from byte \d+ on were shorter",
        advice="Check storage.s3_endpoint and the network of every node, then run the same command again: what is "
        "finished stays. storage.s3_attempts and storage.s3_timeout_seconds say how long a job is patient.",
    ),
    Remedy(
        cause="shared memory full",
        pattern=r"/dev/shm.*No space left|No space left.*/dev/shm|shared memory segment",
        advice="Give the container more of it: shm_size in a compose file, docker run --shm-size, the sizeLimit of the "
        "emptyDir at /dev/shm on Kubernetes. Ray's objects and NCCL's buffers lie there.",
    ),
    Remedy(
        cause="disk of the driver's rows full",
        pattern=r"rows on their way fill driver\.folder",
        advice="Make room on the driver's disk, or name a folder on a larger one in driver.folder, and run the same "
        "command again.",
    ),
    Remedy(
        cause="disk full",
        pattern=r"No space left on device|Disk quota exceeded|OutOfDiskError|file_system_monitor",
        advice="Make room, or give another output, and run the same command again: what is finished stays, and "
        "nothing half-written counts.",
    ),
    Remedy(
        cause="GPU memory full",
        pattern=r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError",
        advice="Lower batch.micro_size (the global batch stays), set workers.activation_checkpointing=true, raise "
        "workers.zero_stage or workers.count, or set workers.offload_optimizer=true; when encoding or generating lower "
        "encode.batch or generate.batch. --dry-run prints memory per worker.",
    ),
    Remedy(
        cause="memory of a node full",
        pattern=r"running low on memory|OutOfMemoryError|\bOOM\b"
        r"|(DefaultCPUAllocator: can't|Unable to|Cannot) allocate",
        advice="Lower encode.rows_per_file, or raise tasks.cpus and encode.resources.cpus so that fewer tasks run on "
        "a node at once; when training lower batch.micro_size. --dry-run prints memory per worker.",
    ),
    Remedy(
        cause="weights on a hub that is out of reach",
        pattern=r"cannot find the appropriate snapshot folder|Cannot find an appropriate cached snapshot folder"
        r"|couldn't connect to 'https://huggingface\.co'",
        advice="Every process that encodes text reads them: give paths that every node reaches, local or s3://, in "
        "place of names, or open the network to the hub.",
    ),
    Remedy(
        cause="Ray or Python of another version",
        pattern=r"Version mismatch: The cluster was started with",
        advice="Client and all nodes need the same environment: install requirements.lock, or use the same image, "
        "everywhere.",
    ),
    Remedy(
        cause="Ray token missing or wrong",
        pattern=r"(?i)unauthenticated|authentication (token|failed|required)",
        advice="Set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN where the command is given; every node has "
        "the same.",
    ),
    Remedy(
        cause="Ray cluster gone under a job",
        pattern=r"the Ray cluster at .* has not answered for",
        advice="Start the cluster again, or wait until it is back, and run the same command again: what is finished "
        "stays, and a training goes on from its last checkpoint.",
    ),
    Remedy(
        cause="no Ray cluster at the address",
        pattern=r"Could not find any running Ray instance|nobody answers at|Failed to connect to GCS"
        r"|GCS (service )?.*(unavailable|timed out)",
        advice="Start one (ray start --head), correct ray.address or RAY_ADDRESS, or unset both: then a job starts "
        "Ray for itself.",
    ),
    Remedy(
        cause="machine too busy to start Ray",
        pattern=r"The current node timed out during startup",
        advice="Ray gives a node 30 seconds to start. End other programs, or wait, and run the same command again.",
    ),
    Remedy(
        cause="workers that do not reach each other",
        pattern=r"NCCL error|ncclSystemError|ncclRemoteError|ncclInternalError|Gloo.*(timed? ?out|connect)"
        r"|gloo/transport/|Connection closed by peer",
        advice="Another worker died, or the network between nodes is closed: look for the first error above. All "
        "ports have to be open between workers (infra/kubernetes/network.yaml); NCCL_DEBUG=INFO tells more. "
        "The same command goes on from the last checkpoint.",
    ),
    Remedy(
        cause="no compiler",
        pattern=r"Failed to find C compiler|No working C\+\+ compiler|InvalidCxxCompiler",
        advice="Set workers.compile=false, or install gcc and g++ on every node: compiled blocks are built there.",
    ),
    Remedy(
        cause="GPU asked for on a machine without one",
        pattern=r"No CUDA GPUs are available|Found no NVIDIA driver|CUDA driver version is insufficient",
        advice="Set workers.gpu=false and encode.resources.gpus=0 to compute on CPUs, or install the driver that the "
        "torch build needs.",
    ),
)


def remedy(message: str) -> str | None:
    """What to do about an error with this message, or None where nothing is known."""
    return next((item.advice for item in REMEDIES if re.search(item.pattern, message)), None)
