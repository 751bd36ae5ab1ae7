"""Workers that train small networks under DeepSpeed, for tests/pipelines/test_engine.py: what each of them finds."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import nn

from model.config import UNET_PRESETS, VAELossConfig
from model.ema import EMA
from pipelines.config import WeightsConfig
from pipelines.storage import Storage
from pipelines.train.config import (
    BatchConfig,
    EMAConfig,
    GuardConfig,
    OptimizerConfig,
    ScheduleConfig,
    WorkersConfig,
)
from pipelines.train.plan import cut_step
from tests.in_process import forget_workers

STEPS, GLOBAL, WORKERS = 4, 8, 4
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_images=16, decay_images=16, clip_norm=0.5)
SCHEDULE = ScheduleConfig(images=STEPS * GLOBAL, checkpoint_images=GLOBAL)
HALFLIFE = 20
UNEVEN = ((6, 1), (7, 2))  # rows of a step, and of a pass: four workers, some of which have a row less


@dataclass(frozen=True)
class Case:
    """How a network is trained."""

    stage: int
    dtype: str = "float32"
    offload: bool = False
    passes: int = 2
    plain: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}{'o' if self.offload else ''}{'p' if self.plain else ''}-{self.dtype}"


PAIRS = (
    (Case(0), Case(1), Case(2), Case(1, plain=True), Case(1, "bfloat16"), Case(2, "bfloat16")),
    (Case(3), Case(2, offload=True), Case(3, offload=True), Case(3, "bfloat16"), Case(0, "bfloat16", passes=1)),
)
CASES = {case.name: case for pair in PAIRS for case in pair}
EXACT, HALF = (sorted(name for name in CASES if word in name) for word in ("float32", "bfloat16"))
MOVES = (("0-float32", "3"), ("1-float32", "0"), ("2-float32", "3o"), ("3-float32", "1"), ("3o-float32", "2"))


def network() -> nn.Module:
    torch.manual_seed(0)  # values that bfloat16 does not hold
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(GLOBAL, 5, generator=generator), torch.randn(GLOBAL, 3, generator=generator)) for _ in range(STEPS)
    ]


def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Weights, averaged weights and losses of the same training without DeepSpeed."""
    model = network()
    parameters, losses = list(model.parameters()), []
    adamw = torch.optim.AdamW(parameters, lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)
    average = EMA([p.data for p in parameters], HALFLIFE)
    for step, (x, y) in enumerate(batches()):
        seen = (step + 1) * GLOBAL
        left = SCHEDULE.images - seen + GLOBAL
        for group in adamw.param_groups:
            group["lr"] = OPTIMIZER.lr * min(1, seen / OPTIMIZER.warmup_images, left / OPTIMIZER.decay_images)
        adamw.zero_grad()
        loss = (model(x) - y).square().mean(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        adamw.step()
        average.update([p.data for p in parameters], seen, GLOBAL)
        losses.append(float(loss.detach()))
    return [p.detach() for p in parameters], average.shadow, losses


def parent(_: int, *arguments: Any) -> None:
    """Fork the workers from one process that has imported what they need, which takes longer than all else."""
    import torch._dynamo

    from pipelines.train.engine import _deepspeed

    _deepspeed(gpu=False)
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage at every turn
    torch.multiprocessing.start_processes(worker, arguments, WORKERS, start_method="fork")


def worker(rank: int, ports: tuple[int, ...], folder: str) -> None:
    """Two pairs of workers with half the cases each, then all four together."""
    from pipelines.train import engine

    engine.WHOLE_VALUES = 0  # parameters as small as these stay whole otherwise
    pair, place = divmod(rank, 2)
    join(place, 2, ports[pair])
    for case in PAIRS[pair]:
        torch.save(trained_by_a_pair(case, Path(folder)), Path(folder, f"{case.name}.{place}.pt"))
    others = {
        "unet": unet_losses((1, 3)[pair]),
        "vae": vae_losses((1, 3)[pair]),
        "norms": norms_of_unequal_passes((1, 2, 3)[pair * 2 : pair * 2 + 2]),
    }
    torch.save(others, Path(folder, f"others{pair}.{place}.pt"))
    torch.distributed.destroy_process_group()
    forget_workers()
    join(rank, WORKERS, ports[2])
    moved = {f"{name} to {stage}": moved_to_four(name, stage, Path(folder)) for name, stage in MOVES}
    torch.save(moved, Path(folder, f"moved.{rank}.pt"))
    torch.save(uneven_norms(rank), Path(folder, f"uneven.{rank}.pt"))
    torch.distributed.destroy_process_group()


def join(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = str(world)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)


def mine() -> None:
    """The run is this job's."""


def trained_by_a_pair(case: Case, folder: Path) -> dict[str, Any]:
    """What a run of four steps leaves, and one that is broken off after two and taken up again."""
    from pipelines.train.checkpointing import Checkpointer

    run = Storage(str(folder / case.name))
    engine = new_engine(case, 2)
    found: dict[str, Any] = {"start": engine.full_weights()}
    checkpointer = Checkpointer(run, 1, mine)
    found["nothing"] = checkpointer.restore({"net": engine})
    losses = train(engine, case, 0, 1)
    checkpointer.save({"net": engine}, 1, GLOBAL)
    losses += train(engine, case, 1, 2)
    checkpointer.save({"net": engine}, 2, 2 * GLOBAL)  # while it is written
    found["half"] = state_of(engine)
    found["losses"] = losses + train(engine, case, 2, STEPS)
    checkpointer.finish()
    before = state_of(engine)
    with engine.averaged() as averaged:
        found["inside"] = [p.detach().clone() for p in averaged.parameters()]
        x = batches()[0][0].to(found["inside"][0].dtype)
        found["called"] = torch.equal(engine(x), averaged(x))
    with engine.averaged(here=torch.distributed.get_rank() == 0) as averaged:
        found["alone"] = [p.detach().clone() for p in averaged.parameters() if not p.is_meta]
    found |= {"untouched": same(before, state_of(engine)), "end": state_of(engine), "norm": engine.gradient_norm()}
    resumed = new_engine(case, 2)
    found["steps"] = Checkpointer(run, 1, mine).restore({"net": resumed})
    train(resumed, case, 2, STEPS)
    found["resumed"] = same(found["end"], state_of(resumed))
    found["refused"] = list(refusals(case))
    return found


def moved_to_four(name: str, stage: str, folder: Path) -> dict[str, Any]:
    """The state that four workers take up under `stage`, and what the two steps that were left make of it."""
    from pipelines.train.checkpointing import Checkpointer

    case = Case(int(stage[0]), offload=stage.endswith("o"), passes=1)
    engine = new_engine(case, WORKERS)
    run = Storage(str(folder / name))
    steps = Checkpointer(run, 1, mine).restore({"net": engine})
    found = {"half": state_of(engine), "steps": steps, "losses": train(engine, case, 2, STEPS)}
    return found | {"end": state_of(engine)}


def new_engine(
    case: Case,
    world: int,
    guard: GuardConfig | None = None,
    net: nn.Module | None = None,
    batch: BatchConfig | None = None,
) -> Any:
    from pipelines.train.engine import Engine

    return Engine(
        "net",
        (net or network()).train(),
        optimizer=replace(OPTIMIZER, guard=guard or GuardConfig(), implementation="plain" if case.plain else "auto"),
        schedule=SCHEDULE,
        batch=batch or BatchConfig(global_size=GLOBAL, micro_size=GLOBAL // world // case.passes),
        workers=WorkersConfig(count=world, zero_stage=case.stage, dtype=case.dtype, offload_optimizer=case.offload),  # type: ignore[arg-type]
        ema=EMAConfig(halflife_images=HALFLIFE),
    )


def train(engine: Any, case: Case, first: int, last: int) -> list[float]:
    """The steps' losses, means over workers."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share, losses = GLOBAL // world, []
    for step, (x, y) in list(enumerate(batches()))[first:last]:
        total = torch.zeros(())
        for start in range(rank * share, (rank + 1) * share, share // case.passes):
            part = slice(start, start + share // case.passes)
            loss = (engine(x[part].to(engine._dtype)).float() - y[part]).square().mean(1).mean()
            engine.backward(loss)
            engine.step((step + 1) * GLOBAL)
            total += loss.detach() / case.passes / world
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """All that a checkpoint brings back, in full: fp32 weights, average and moments; and what the network gives."""
    found = {
        f"{role} {name}": value.clone()
        for role, tensors in engine.sharded.all().items()
        for name, value in engine.sharded.gathered(tensors)
    }
    found["updates"] = torch.tensor(engine.sharded.updates)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        found["output"] = engine(torch.randn(3, 5, generator=generator).to(engine._dtype)).clone()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusals(case: Case) -> Iterator[tuple[str | None, bool, bool]]:
    """For each of five steps: why it was refused, whether anything changed, and whether the run ends.

    Worker 1's loss is no number in the first, before any step was taken, and in the fourth and fifth; in the third it
    is a thousand times what it was.
    """
    case = replace(case, passes=1)
    engine = new_engine(case, 2, GuardConfig(spike_factor=100, window_steps=1, most_in_a_row=3))
    rank, (x, y) = torch.distributed.get_rank(), batches()[0]
    part = slice(rank * 4, rank * 4 + 4)
    for step, factor in enumerate((math.nan, 1.0, 1e3, math.nan, math.nan)):
        before = state_of(engine)
        loss = (engine(x[part].to(engine._dtype)).float() - y[part]).square().mean()
        engine.backward(loss * factor if rank == 1 else loss)
        engine.step((step + 1) * GLOBAL)
        yield engine.refusal(), not same(before, state_of(engine)), engine.guard.ends_the_run


def norms_of_unequal_passes(stages: tuple[int, ...]) -> dict[int, float]:
    """Norms of a gradient that is the mean over passes of 1 and three times 2^-9, which bf16 does not add to 1."""
    norms = {}
    for stage in stages:
        case = Case(stage, "bfloat16", passes=4)
        engine = new_engine(case, 2, net=nn.Linear(1, 1, bias=False))
        for value in (1.0, 2**-9, 2**-9, 2**-9):
            engine.backward(engine(torch.tensor([[value]], dtype=torch.bfloat16)).float().mean())
            engine.step(GLOBAL)
        norms[stage] = engine.gradient_norm()
    return norms


def uneven_norms(rank: int) -> dict[str, list[float]]:
    """Norm of the gradient, and of the weights after the step, where four workers share six rows, or seven."""
    found, (x, y) = {}, batches()[0]
    for stage in range(4):
        for rows, micro in UNEVEN:
            batch = BatchConfig(global_size=rows, micro_size=micro)
            engine = new_engine(Case(stage), WORKERS, batch=batch)
            for part in cut_step(batch, rank, WORKERS):
                own = slice(part.start, part.stop)
                engine.backward((engine(x[own]) - y[own]).square().mean() * part.weight)
                engine.step(GLOBAL)
            weights = torch.cat([value.flatten() for _, value in engine.sharded.gathered(engine.sharded.weights)])
            found[f"{stage}-{rows}"] = [engine.gradient_norm(), float(weights.norm())]
    return found


def unet_losses(stage: int) -> list[float]:
    """Losses of three steps of the tiny base, with activation checkpointing."""
    from model.unet import UNet

    torch.manual_seed(0)
    net = UNet(UNET_PRESETS["tiny-base"])
    nn.init.normal_(net.out[2].weight, std=0.1)  # starts at zero, and nothing else would learn
    net.activation_checkpointing = True
    engine, config = new_engine(Case(stage), 2, net=net), net.config
    generator, losses = torch.Generator().manual_seed(torch.distributed.get_rank()), []
    x, context = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 77, config.context_dim, generator=generator),
    )
    vector = torch.randn(2, config.vector_dim, generator=generator)
    for step in range(3):
        for _ in range(2):
            loss = (engine(x, torch.tensor([10, 900]), context, vector) - x).square().mean()
            engine.backward(loss)
            engine.step((step + 1) * GLOBAL)
        losses.append(float(loss.detach()))
    with engine.averaged() as averaged, torch.no_grad():
        losses.append(float(averaged(x, torch.tensor([10, 900]), context, vector).square().mean()))
    return losses


def vae_losses(stage: int) -> list[float]:
    """Losses of three steps of the tiny VAE against its discriminator, and of their average."""
    from model.config import DISCRIMINATOR_PRESETS, VAE_PRESETS
    from model.vae import VAE
    from model.vae_loss import PatchDiscriminator
    from pipelines.train import engine
    from pipelines.train.autoencoder import VAETask
    from pipelines.train.batches import ImageBatch
    from pipelines.train.config import VAETaskConfig

    engine.WHOLE_VALUES = 500  # the last layer's, and few others
    torch.manual_seed(0)
    task: Any = object.__new__(VAETask)  # without a dataset
    task._vae, task._discriminator = VAE(VAE_PRESETS["tiny"]), PatchDiscriminator(DISCRIMINATOR_PRESETS["tiny"])
    loss_config = VAELossConfig(adversarial_start_images=0)
    task._config = VAETaskConfig(vae=WeightsConfig(preset="tiny"), discriminator="tiny", index="", loss=loss_config)
    task._batch, task._device, task._lpips = BatchConfig(global_size=GLOBAL, micro_size=2), torch.device("cpu"), None
    stages = {"vae": stage, "discriminator": min(stage, 2)}
    engines = {name: new_engine(Case(stages[name]), 2, net=net) for name, net in task.networks().items()}
    rank, losses = torch.distributed.get_rank(), []
    image = torch.rand(GLOBAL, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for step in range(3):
        places = [rank * 4 + part * 2 for part in range(2)]
        passes = [ImageBatch(step * GLOBAL + first, (32, 32), image[first : first + 2]) for first in places]
        prepared = task.prepare(engines, [(batch, 1.0) for batch in passes])
        for batch in passes:
            for loss in task.losses(engines, batch, prepared):
                engines[loss.engine].backward(loss.per_sample.mean())
                engines[loss.engine].step((step + 1) * GLOBAL)
                losses += [float(loss.per_sample.detach().mean())]
                losses += [float(loss.terms["adaptive_weight"])] if loss.engine == "vae" else []
    with engines["vae"].averaged() as averaged, torch.no_grad():
        losses.append(float(averaged.encode(image).mean.square().mean()))
    engine.WHOLE_VALUES = 0
    return losses
