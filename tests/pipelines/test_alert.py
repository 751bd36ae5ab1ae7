"""When a new version of the index asks for a person, and when it waits for one."""

import pytest

from pipelines.preprocess.alert import Change, HeldError, judge
from pipelines.preprocess.config import AlertConfig


def change(new=0, new_rejected=0, kept_before=100, kept=100):
    return Change(new=new, new_rejected=new_rejected, kept_before=kept_before, kept=kept)


def test_by_default_nothing_is_asked_and_nothing_held():
    for new_rejected in (0, 1000):
        assert judge(change(1000, new_rejected, kept=0), AlertConfig()) is None


@pytest.mark.parametrize(
    ("new_rejected", "looked_at"), [(0, True), (9, True), (10, False), (50, False), (51, True), (90, True)]
)
def test_a_share_outside_its_band_asks_for_a_person(new_rejected, looked_at):
    alerts = AlertConfig(reject_share=(0.1, 0.5), hold_reject_share=0.9)
    told = judge(change(100, new_rejected), alerts)
    assert (told is not None) == looked_at
    if told:
        assert told.startswith(f"{new_rejected} of 100 new images are rejected")


def test_of_few_new_inputs_no_share_is_taken():
    alerts = AlertConfig(reject_share=(0.1, 0.5), hold_reject_share=0.6, min_new=50)
    assert judge(change(49, 49), alerts) is None
    with pytest.raises(HeldError):
        judge(change(50, 50), alerts)


def test_a_commit_is_held_where_nearly_all_is_rejected_or_much_is_lost_and_names_the_way_out():
    with pytest.raises(HeldError, match=r"91 of 100 new .* alerts\.hold_reject_share=1"):
        judge(change(100, 91), AlertConfig(hold_reject_share=0.9))
    with pytest.raises(HeldError, match=r"49 rows would be kept after 100.* alerts\.hold_loss_share=1"):
        judge(change(kept=49), AlertConfig(hold_loss_share=0.5))
    assert judge(change(kept=50), AlertConfig(hold_loss_share=0.5)) is None
    assert judge(change(kept_before=0, kept=0), AlertConfig(hold_loss_share=0.0)) is None
