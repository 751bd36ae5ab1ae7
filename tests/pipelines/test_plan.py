import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pipelines.schema import DataFile, digest
from pipelines.train.config import BatchConfig
from pipelines.train.plan import Plan, cut_step

SQUARE, WIDE, TALL = (32, 32), (16, 64), (64, 16)


def files(sizes: dict[tuple[int, int], list[int]]) -> list[DataFile]:
    return [
        DataFile(name=f"{h}x{w}/{n}", rows=rows, bucket=(h, w))
        for (h, w), all_ in sizes.items()
        for n, rows in enumerate(all_)
    ]


def plan(sizes: dict, size: int, *, seed: int = 0, shuffle: int = 8192) -> Plan:
    return Plan(files(sizes), BatchConfig(global_size=size, micro_size=1, seed=seed, shuffle_rows=shuffle))


def steps(of: Plan, count: int) -> list[tuple]:
    return [(of.step(n).bucket, of.step(n).rows.tolist()) for n in range(count)]


DATASETS = {
    "larger than a batch": {SQUARE: [5, 7, 3], WIDE: [11], TALL: [8, 8]},
    "one row in a bucket": {SQUARE: [10, 10], WIDE: [1], TALL: [3]},
    "one row": {SQUARE: [1]},
    "one row in each": {SQUARE: [1], WIDE: [1], TALL: [1]},
    "smaller than a batch in all": {SQUARE: [2, 1], WIDE: [2]},
    "many files": {SQUARE: [1] * 9, WIDE: [4, 1, 6, 2]},
}
each_dataset = pytest.mark.parametrize("sizes", DATASETS.values(), ids=DATASETS)
each_batch = pytest.mark.parametrize("size", [1, 3, 8])


@each_dataset
@each_batch
@pytest.mark.parametrize("shuffle", [1, 4, 8192])
def test_every_row_is_seen_as_often_as_every_other_and_none_is_lost(sizes, size, shuffle):
    """After any number of steps each row has been seen floor or ceil of its bucket's images over its bucket's rows."""
    made = plan(sizes, size, shuffle=shuffle)
    listed = files(sizes)
    seen: Counter[tuple[int, int]] = Counter()
    images: Counter[tuple[int, int]] = Counter()
    totals = {bucket: sum(rows) for bucket, rows in sizes.items()}
    last = made.steps_before(7)
    for number in range(last):
        batch = made.step(number)
        assert len(batch.rows) == size
        images[batch.bucket] += size
        seen.update(map(tuple, batch.rows.tolist()))
        if number % 5 and number != last - 1:
            continue
        for file, described in enumerate(listed):
            for row in range(described.rows):
                low, over = divmod(images[described.bucket], totals[described.bucket])
                assert low <= seen[file, row] <= low + bool(over)
    assert set(seen) <= {(file, row) for file, described in enumerate(listed) for row in range(described.rows)}


WEIGHTS = [0.3, 1.0, 2.0, 0.0, 0.3, 1.0, 2.0, 1.7]
each_mixture = pytest.mark.parametrize("sizes", [DATASETS[n] for n in ("larger than a batch", "many files")], ids=str)


def weighted(sizes: dict, size: int, weights: list[float], shuffle: int = 4) -> tuple[Plan, list[DataFile]]:
    listed = [
        replace(file, weight=weight) for file, weight in zip(files(sizes), itertools.cycle(weights), strict=False)
    ]
    return Plan(listed, BatchConfig(global_size=size, micro_size=1, shuffle_rows=shuffle)), listed


@each_mixture
@pytest.mark.parametrize("epochs", [1, 3, 10])
def test_each_row_is_seen_by_its_weight(sizes, epochs):
    """After e epochs a row of weight w has been seen floor(e w) or ceil(e w) times."""
    made, listed = weighted(sizes, 1, WEIGHTS)  # batches of one: nothing is carried over to the next epoch
    seen = Counter(row for n in range(made.steps_before(epochs)) for row in map(tuple, made.step(n).rows.tolist()))
    for number, file in enumerate(listed):
        for row in range(file.rows):
            assert math.floor(epochs * file.weight) <= seen[number, row] <= math.ceil(epochs * file.weight)


@each_mixture
@each_batch
def test_after_some_epochs_a_mixture_has_given_its_share_of_steps(sizes, size):
    made, listed = weighted(sizes, size, WEIGHTS)
    for epochs in (1, 3, 10):
        rows: Counter[tuple] = Counter()
        for bucket in sizes:
            for weight in {file.weight for file in listed if file.bucket == bucket}:
                count = sum(file.rows for file in listed if (file.bucket, file.weight) == (bucket, weight))
                rows[bucket] += epochs * count * round(weight * 10) // 10
        given = Counter(made.step(n).bucket for n in range(made.steps_before(epochs)))
        assert given == Counter({bucket: count // size for bucket, count in rows.items() if count >= size})


@each_mixture
def test_any_step_of_a_mixture_is_found_without_those_before(sizes):
    made, _ = weighted(sizes, 3, WEIGHTS)
    last = made.steps_before(6)
    walked = [made.step(n).rows.tolist() for n in range(last)]
    for number in random.Random(0).sample(range(last), 20):
        fresh, _ = weighted(sizes, 3, WEIGHTS)
        assert fresh.step(number).rows.tolist() == walked[number]


def test_a_mixture_mixes_within_steps():
    made, _ = weighted({SQUARE: [400, 400]}, 100, [1.0, 3.0])
    counts = [int(np.count_nonzero(made.step(n).rows[:, 0])) for n in range(16)]
    assert sum(counts) == 1200
    assert all(55 < count < 95 for count in counts)  # 75 of 100 on average


@each_dataset
def test_one_weight_of_one_is_no_weight(sizes):
    made, _ = weighted(sizes, 3, [1.0], shuffle=8192)
    assert steps(made, 30) == steps(plan(sizes, 3), 30)


def test_a_plan_stays_the_same_from_version_to_version():
    """A resumed run sees the rows that it would have seen."""
    made = plan(DATASETS["larger than a batch"], 8, shuffle=4)
    assert digest([[list(bucket), rows] for bucket, rows in steps(made, 40)]) == "b73d26d3b1edb62876ced4772cfeb847"


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="no rows to train on"):
        weighted({SQUARE: [3]}, 1, [0.0])


@each_dataset
@each_batch
def test_after_some_epochs_a_bucket_has_given_its_share_of_steps(sizes, size):
    made = plan(sizes, size)
    for epochs in (0, 1, 2, 5, 8):
        buckets = Counter(made.step(n).bucket for n in range(made.steps_before(epochs)))
        assert buckets == {b: n for b, rows in sizes.items() if (n := epochs * sum(rows) // size)}


@each_dataset
@each_batch
def test_all_rows_of_a_step_are_of_its_bucket(sizes, size):
    made, listed = plan(sizes, size), files(sizes)
    for number in range(30):
        batch = made.step(number)
        assert {listed[file].bucket for file, _ in batch.rows} == {batch.bucket}


@each_dataset
def test_a_step_follows_from_its_number_alone(sizes):
    expected = steps(plan(sizes, 8), 40)
    order = list(range(40))
    random.Random(0).shuffle(order)
    visited = plan(sizes, 8)
    for number in order:
        batch = visited.step(number)
        assert (batch.bucket, batch.rows.tolist()) == expected[number]
    alone = plan(sizes, 8).step(39)
    assert (alone.bucket, alone.rows.tolist()) == expected[39]


@pytest.mark.parametrize("shuffle", [3, 8192])
def test_a_step_does_not_depend_on_what_is_kept_in_memory(shuffle):
    sizes = {(8, 8 * n): [3, 4, 2] for n in range(1, 12)}  # more windows than are kept
    made = plan(sizes, 4, shuffle=shuffle)
    first = steps(made, 60)
    assert steps(made, 60) == first


def test_workers_take_slices_that_together_are_the_step():
    made = plan(DATASETS["larger than a batch"], 8)
    for number in range(10):
        whole = made.step(number).rows
        for world in (1, 2, 4):
            share = 8 // world
            slices = [made.step(number).rows[rank * share : (rank + 1) * share] for rank in range(world)]
            assert np.array_equal(np.concatenate(slices), whole)


@pytest.mark.parametrize(
    ("rows", "micro", "world"), [(8, 4, 2), (8, 2, 3), (7, 2, 4), (6, 1, 4), (5, 8, 5), (2048, 10, 7)]
)
def test_every_number_of_workers_cuts_a_step_into_as_many_passes_that_weigh_what_they_hold(rows, micro, world):
    cuts = [cut_step(BatchConfig(global_size=rows, micro_size=micro), rank, world) for rank in range(world)]
    (passes,) = {len(cut) for cut in cuts}
    assert [row for cut in cuts for part in cut if part.weight for row in range(part.start, part.stop)] == [
        *range(rows)
    ]
    values = np.random.default_rng(0).normal(size=rows)
    parts = [part for cut in cuts for part in cut]
    assert all(1 <= part.stop - part.start <= micro for part in parts)
    means = [values[part.start : part.stop].mean() * part.weight for part in parts]
    assert sum(means) / passes / world == pytest.approx(values.mean())
    if rows % (micro * world) == 0:
        assert {(part.stop - part.start, part.weight) for part in parts} == {(micro, 1.0)}


def test_the_number_of_workers_and_their_passes_do_not_enter():
    sizes = DATASETS["larger than a batch"]
    other = Plan(files(sizes), BatchConfig(global_size=8, micro_size=4))
    assert steps(other, 20) == steps(plan(sizes, 8), 20)


@each_dataset
@each_batch
def test_epochs_and_steps_are_consistent(sizes, size):
    made = plan(sizes, size)
    starts = [made.steps_before(epoch) for epoch in range(60)]
    assert starts[0] == 0
    assert starts == sorted(starts)
    for number in range(starts[-1]):
        epoch = made.epoch_of(number)
        assert made.steps_before(epoch) <= number < made.steps_before(epoch + 1)


def test_a_position_far_away_is_found_at_once():
    made = plan({SQUARE: [1000] * 20, WIDE: [7]}, 64)
    number = 10**8 + 3
    epoch = made.epoch_of(number)
    assert made.steps_before(epoch) <= number < made.steps_before(epoch + 1)
    assert made.step(number).rows.shape == (64, 2)


def test_another_seed_gives_another_order():
    sizes = DATASETS["larger than a batch"]
    orders = [str(steps(plan(sizes, 4, seed=seed), 20)) for seed in (0, 1, 2, 0)]
    assert len(set(orders)) == 3
    assert orders[0] == orders[3]


def test_each_epoch_has_its_own_order():
    made = plan({SQUARE: [30]}, 1)
    orders = [[int(made.step(30 * epoch + n).rows[0, 1]) for n in range(30)] for epoch in range(4)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_buckets_are_mixed_over_an_epoch():
    made = plan({SQUARE: [64], WIDE: [64]}, 4)
    order = [made.step(n).bucket for n in range(32)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert 8 <= changes <= 24


def test_neighbours_in_a_file_are_spread_over_steps():
    made = plan({SQUARE: [100] * 4}, 4)
    files_of_a_step = [len(set(made.step(n).rows[:, 0].tolist())) for n in range(100)]
    assert np.mean(files_of_a_step) > 2.5  # 2.73 in a fair draw of four out of four files


def test_rows_of_a_step_are_sorted_by_file_then_row():
    made = plan({SQUARE: [5, 9, 4]}, 8)
    for number in range(20):
        found = made.step(number).rows.tolist()
        assert found == sorted(found)


@pytest.mark.parametrize("sizes", [[8] * 12, [3, 11, 5, 8, 1, 9, 7, 2, 10, 4, 6, 12], [1] * 40])
def test_a_small_window_bounds_the_files_that_are_read_together(sizes):
    shuffle, batch = 16, 8

    def most(window: int) -> int:
        made = plan({SQUARE: sizes}, batch, shuffle=window)
        return max(len(set(made.step(n).rows[:, 0].tolist())) for n in range(made.steps_before(6)))

    bounded, free = most(shuffle), most(8192)
    files_of_a_window = max(  # whole files whose last rows lie within one window, in the worst order
        sum(np.cumsum(sorted(sizes)) <= shuffle + max(sizes)), 1
    )
    assert bounded <= 2 * files_of_a_window
    assert len(sizes) == 40 or bounded < free


def test_rows_are_shuffled_inside_a_window_of_files():
    made = plan({SQUARE: [8] * 6}, 8, shuffle=16)
    pairs = [set(made.step(n).rows[:, 0].tolist()) for n in range(6)]
    assert all(len(pair) <= 2 for pair in pairs)
    assert any(len(pair) == 2 for pair in pairs)
    assert len({frozenset(pair) for pair in pairs}) <= 3 + 3


@pytest.mark.parametrize("listed", [[], [DataFile(name="a", rows=0, bucket=SQUARE)]])
def test_a_dataset_without_rows_is_an_error(listed):
    with pytest.raises(ValueError, match="no rows"):
        Plan(listed, BatchConfig(global_size=4, micro_size=1))


def test_a_file_without_a_bucket_is_an_error():
    with pytest.raises(ValueError, match=r"a\.parquet has no bucket"):
        Plan([DataFile(name="a.parquet", rows=3)], BatchConfig(global_size=4, micro_size=1))


def test_an_empty_file_among_others_changes_nothing_that_is_seen():
    listed = [DataFile(name=str(n), rows=rows, bucket=SQUARE) for n, rows in enumerate([0, 5, 0, 3, 0])]
    made = Plan(listed, BatchConfig(global_size=4, micro_size=1, shuffle_rows=4))
    seen = Counter(tuple(row) for n in range(4) for row in made.step(n).rows.tolist())
    assert seen == {(1, row): 2 for row in range(5)} | {(3, row): 2 for row in range(3)}
