"""C11: what is kept of pixels and of rows, and how full the VAE's passes are, on a mix of aspects.

Nothing is timed: the numbers are always the same.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.config import DriverConfig, Size
from pipelines.preprocess.bucket import blocks_by_bucket, bucket_table, nearest
from pipelines.preprocess.config import BucketConfig, EncodeConfig
from pipelines.runs import Work
from pipelines.schema import DataFile, pair_column
from pipelines.train.config import BatchConfig
from pipelines.train.plan import Plan

MIX = {  # height over width, and how many of a hundred images: our guess at a mix of cameras, phones, web and film
    (3, 4): 26,
    (2, 3): 20,
    (1, 1): 14,
    (4, 3): 11,
    (3, 2): 9,
    (9, 16): 9,
    (16, 9): 4,
    (4, 5): 2,
    (5, 4): 2,
    (1, 2.39): 2,
    (1, 3): 1,
}
ROWS, FILE_ROWS, GLOBAL_SIZE = 4000, 64, 16
MIXES = (1_000, 4_000, 20_000, 100_000)  # images


def mixed_sizes(rows: int) -> list[Size]:
    """Sizes of the mix, each trimmed by up to a tenth of a side, as people crop."""
    draws = np.random.Generator(np.random.PCG64(0))
    shares = np.array(list(MIX.values())) / sum(MIX.values())
    kinds = np.array(list(MIX))[draws.choice(len(MIX), rows, p=shares)]
    trims = draws.uniform(0.9, 1, (rows, 2))
    longest = draws.uniform(300, 4000, rows)
    return [
        (max(1, round(height)), max(1, round(width)))
        for height, width in kinds * trims * (longest / kinds.max(1))[:, None]
    ]


def test_pixels_and_rows_kept() -> None:
    sizes, table = mixed_sizes(ROWS), bucket_table(BucketConfig())
    kept, square, counts = [], [], dict.fromkeys(table, 0)
    for height, width in sizes:
        bucket = nearest((height, width), table)
        counts[bucket] += 1
        scale = max(bucket[0] / height, bucket[1] / width)
        kept.append(bucket[0] * bucket[1] / (scale**2 * height * width))
        square.append(min(height, width) / max(height, width))
    assert max(kept) <= 1 + 1e-9
    print(f"\nC11: pixels kept {np.mean(kept):.3f}, by a centre square {np.mean(square):.3f}")
    print(
        f"  ratio {np.mean(kept) / np.mean(square):.3f}; images {ROWS:,}, in {sum(map(bool, counts.values()))} buckets"
    )

    files = [
        DataFile(name=f"{bucket}/{start}", rows=min(FILE_ROWS, count - start), bucket=bucket)
        for bucket, count in counts.items()
        for start in range(0, count, FILE_ROWS)
    ]
    plan = Plan(files, BatchConfig(global_size=GLOBAL_SIZE, micro_size=GLOBAL_SIZE))
    starts = np.cumsum([0, *(file.rows for file in files)])
    seen = np.zeros(ROWS, np.int64)
    for step in range(plan.steps_before(GLOBAL_SIZE)):
        rows = plan.step(step).rows
        np.add.at(seen, starts[rows[:, 0]] + rows[:, 1], 1)  # a small bucket gives a row twice in a batch
    assert (seen == GLOBAL_SIZE).all()
    tails = sum(count % GLOBAL_SIZE for count in counts.values())
    print(f"  over {GLOBAL_SIZE} epochs each row is seen {seen.min()} to {seen.max()} times: 0 rows lost")
    print(
        f"  dropping each bucket's last batch would lose {tails:,} of {ROWS:,} rows an epoch, {100 * tails / ROWS:.1f}%"
    )


def test_places_filled_in_passes_of_the_vae() -> None:
    """Beside blocks of one source each, which is what a cut by source and bucket gives."""
    table, config = bucket_table(BucketConfig()), EncodeConfig()
    print(f"\nplaces filled in passes of {config.batch}, {config.rows_per_file} rows a task, images of 4 sources")
    for rows in MIXES:
        buckets = [nearest(size, table) for size in mixed_sizes(rows)]
        sources = np.random.Generator(np.random.PCG64(1)).choice(list("abcd"), rows, p=[0.4, 0.3, 0.2, 0.1])
        keys = [f"{number:06}" for number in range(rows)]
        named = {"key": keys, "order": keys, "crop": [0] * rows, "source": sources}
        index = pa.table(named | {"bucket": pair_column(buckets)})

        def blocks_of(some: pa.Table) -> list[pa.Table]:
            told = {"buckets": table, "sources": "abcd", "work": Work(DriverConfig())}
            return list(blocks_by_bucket([some], config.rows_per_file, **told))

        ours = blocks_of(index)
        assert sum(block.num_rows for block in ours) == rows
        by_source = [block for name in "abcd" for block in blocks_of(index.filter(sources == name))]
        filled, apart = (
            rows / sum(-(-block.num_rows // config.batch) * config.batch for block in blocks)
            for blocks in (ours, by_source)
        )
        print(f"  {rows:>7,} images: {100 * filled:.1f}%, each source for itself {100 * apart:.1f}%")
