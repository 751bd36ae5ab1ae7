"""What training at a given size needs, stage by stage, before it is bought: python -m jobs.plan CONFIG.toml"""

from __future__ import annotations

from jobs.cli import main
from jobs.config import PlanJob
from pipelines.capacity import (
    GB,
    HOUR,
    PUBLISHED,
    SIDES,
    TFLOP,
    UNIT_COSTS,
    StageCost,
    latents_row_bytes,
    plan_capacity,
)

DAY_HOURS = 24.0
TITLES: tuple[str, ...] = ("stage", "hours", "days", "nodes", "core-hours", "GPU-hours", "TB read", "TB kept")
TITLES += ("M requests", "compute", "storage", "waits for")


def run(job: PlanJob) -> None:
    """Print the plan: a line per stage, totals, what was assumed, and how it compares with a published run."""
    costs = plan_capacity(
        images=job.images,
        kept_share=job.kept_share,
        image_bytes=job.image_bytes,
        image_megapixels=job.image_megapixels,
        stages=job.stages,
        cpu=job.cpu,
        encode_gpu=job.encode_gpu,
        train_gpu=job.train_gpu,
        store=job.store,
    )
    print(
        f"images: {job.images:,} of {job.image_bytes / 1e6:g} MB and {job.image_megapixels:g} megapixels; "
        f"{job.kept_share:.0%} of them are kept"
    )
    _print_stages(costs)
    _print_rates(job, costs)
    _print_unit_costs()
    _print_comparison(job)


plan = run  # there is nothing to start


def _print_stages(costs: list[StageCost]) -> None:
    rows = [TITLES]
    for cost in costs:
        rows.append((cost.name, *_amounts([cost], str(cost.nodes)), cost.limit))
    rows.append(("total", *_amounts(costs, ""), ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    print()
    for row in rows:
        aligned = (f"{text:>{width}}" for text, width in zip(row[1:-1], widths[1:-1], strict=True))
        print(f"{row[0]:{widths[0]}}  {'  '.join(aligned)}  {row[-1]}".rstrip())
    price = sum(cost.compute_price + cost.storage_price for cost in costs)
    print(f"in all {price:,.0f}, in the currency of the prices; stages run one after another")


def _amounts(costs: list[StageCost], nodes: str) -> list[str]:
    """The numbers of a line: of one stage, or of all together."""

    def total(name: str, unit: float = 1.0) -> float:
        return sum(getattr(cost, name) for cost in costs) / unit

    return [
        f"{total('hours'):,.1f}",
        f"{total('hours', DAY_HOURS):,.1f}",
        nodes,
        f"{total('core_hours'):,.0f}",
        f"{total('gpu_hours'):,.0f}",
        f"{total('read_bytes', 1e12):,.1f}",
        f"{total('kept_bytes', 1e12):,.1f}",
        f"{total('reads', 1e6) + total('writes', 1e6):,.1f}",
        f"{total('compute_price'):,.0f}",
        f"{total('storage_price'):,.0f}",
    ]


def _print_rates(job: PlanJob, costs: list[StageCost]) -> None:
    """What storage and network have to give."""
    print()
    for stage, cost in zip(job.stages, costs, strict=True):
        seconds = cost.hours * HOUR
        told = [f"{cost.read_bytes / seconds / GB:.2f} GB/s and {cost.reads / seconds:,.0f} requests/s of storage"]
        if stage.images_seen:
            epochs = stage.images_seen / (stage.images or job.images * job.kept_share)
            told.append(f"{stage.images_seen / seconds:,.0f} images/s, {epochs:.2f} epochs")
        elif stage.kind == "latents":
            told.append(f"rows of {latents_row_bytes(stage.resolution):,} bytes")
        print(f"{cost.name}: {'; '.join(told)}")


def _print_unit_costs() -> None:
    for source in dict.fromkeys((cost.source, cost.date) for cost in UNIT_COSTS.values()):
        print(f"\n{', '.join(source)}:")
        for name, cost in UNIT_COSTS.items():
            if (cost.source, cost.date) == source:
                print(f"  {name}: {cost.value:g} {cost.unit}")
    for name, values in TFLOP.items():
        at = ", ".join(f"{value:g} at {side}" for value, side in zip(values, SIDES, strict=True))
        print(f"  {name}: TFLOP per image, {at} pixels")
    print("from the settings, measured by nobody here: utilization of GPUs, what storage gives, prices, sizes")


def _print_comparison(job: PlanJob) -> None:
    found, pool = PUBLISHED, job.train_gpu
    hours = found.tflop / (pool.peak_tflops * pool.utilization) / HOUR
    print(
        f"\npublished: {found.what}: {found.gpu_hours:,.0f} A100-hours and ${found.dollars:,.0f} ({found.source}). "
        f"Its {found.tflop:.3g} TFLOP make that {found.utilization:.1%} of the GPUs' peak.\n"
        f"By this plan's training GPUs the same takes {hours:,.0f} GPU-hours and {hours * pool.price:,.0f}"
    )


if __name__ == "__main__":
    main(PlanJob, run, plan, needs_ray=False)
