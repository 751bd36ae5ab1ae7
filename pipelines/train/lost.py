"""Images that are gone or have changed since the index was made: a run, pinned to its index, goes on without.

Another image of the same bucket and source stands for such a one: the next by place that can be used and is held out or
not, as the lost one is. It depends on what is stored alone, so a resumed run, on any number of workers, takes the same.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field

import torch

from pipelines.storage import Storage

LOST = "lost_images"  # folder below a run's output, a file for each
FEWEST_READ = 1_000  # images that a share is taken of, at least
NEIGHBOURS = 64  # that are tried in place of one


@dataclass(frozen=True)
class LostImage:
    """An image that could not be used."""

    image_id: str
    """Its id in the index."""
    name: str
    """source:path."""
    reason: str
    """Why, for a person."""
    instead: str
    """The image that stands for it, likewise."""


@dataclass
class LostImages:
    """What one worker has lost. Threads that read call it at the same time."""

    most_share: float = 0.0
    """Share of the images read that may be lost; above it `add` raises."""
    held_out_share: float = 0.0
    """The run's batch.validation_share."""
    count: int = field(default=0, init=False)
    """Images lost since the worker started, each as often as it was to be read."""
    _read: int = field(default=0, init=False)
    _new: dict[str, LostImage] = field(default_factory=dict, init=False)
    _recorded: int | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def saw(self, count: int) -> None:
        """Take in that so many images were asked for."""
        with self._lock:
            self._read += count

    def add(self, image: LostImage) -> None:
        """Take in a lost image. Raises RuntimeError where they are too many."""
        with self._lock:
            self.count += 1
            self._new[image.image_id] = image
            if self.count > self.most_share * max(self._read, FEWEST_READ):
                raise RuntimeError(
                    f"{image.name}: the index keeps it, and it cannot be used now: {image.reason}. It is lost image "
                    f"{self.count} of {self._read} that this worker has read, above task.lost_share, "
                    f"{self.most_share:g}. Put them back, or raise task.lost_share; or bring the index up to date and "
                    "go on from this run's weights in another output"
                )

    def take(self) -> list[LostImage]:
        """Those that were lost since the last call, each once."""
        with self._lock:
            new, self._new = list(self._new.values()), {}
        return new

    def record(self, output: Storage, images_seen: int, device: torch.device) -> float:
        """Write a file into the run's folder for each image that was lost since the last call; gives, on worker 0, how
        many images the run has lost, in all of its attempts. All workers call it together."""
        new = self.take()
        for image in new:
            output.write_json(f"{LOST}/{image.image_id}.json", {"images_seen": images_seen, **asdict(image)})
        written = torch.tensor(len(new), device=device)
        torch.distributed.all_reduce(written)
        if torch.distributed.get_rank() == 0 and (written or self._recorded is None):
            self._recorded = len(output.list(LOST))
        return float(self._recorded or 0)
