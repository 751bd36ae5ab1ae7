"""Does a new version of the index look as data like this should? A schedule runs where nobody looks, so it asks.

Two questions are asked of what a commit would change. The share of rejected images among the new ones leaves its band:
the commit is made, and a person should look. Nearly all new images are rejected, or many that were kept are not any
more, as when half of a source is not mounted: the commit waits for a person, and the dataset stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.preprocess.config import AlertConfig


class HeldError(RuntimeError):
    """The commit waits for a person."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a commit does to the index, in rows."""

    new: int
    """Inputs that the committed index does not have."""
    new_rejected: int
    """Rejected ones among them."""
    kept_before: int
    """Kept rows of the committed index."""
    kept: int
    """Kept rows of the one to be committed."""

    @property
    def reject_share(self) -> float:
        """Rejected of new inputs."""
        return self.new_rejected / max(1, self.new)

    @property
    def loss_share(self) -> float:
        """Kept rows that are gone, of those that were."""
        return max(0, self.kept_before - self.kept) / max(1, self.kept_before)


def judge(change: Change, alerts: AlertConfig) -> str | None:
    """What a person should look at, or None where all is as expected. Raises HeldError to withhold the commit."""
    enough = change.new >= alerts.min_new
    share, of = change.reject_share, f"{change.new_rejected} of {change.new} new images are rejected"
    if enough and share > alerts.hold_reject_share:
        raise HeldError(
            f"{of}, a share of {share:.3f}, and alerts.hold_reject_share is {alerts.hold_reject_share:g}: the index "
            "stays as it was. If that is right, run again with alerts.hold_reject_share=1; nothing is measured twice"
        )
    if change.loss_share > alerts.hold_loss_share:
        raise HeldError(
            f"{change.kept} rows would be kept after {change.kept_before}, a loss of {change.loss_share:.3f}, and "
            f"alerts.hold_loss_share is {alerts.hold_loss_share:g}: the index stays as it was. Is all of the source "
            "there, and are the filters as meant? If so, run again with alerts.hold_loss_share=1"
        )
    least, most = alerts.reject_share
    if enough and not least <= share <= most:
        return f"{of}, a share of {share:.3f}, outside alerts.reject_share [{least:g}, {most:g}]"
    return None
