"""One network in training: DeepSpeed's engine, the learning rate's way, and the average of the weights.

DeepSpeed enters the project here only. Under every ZeRO stage the average is kept of the fp32 weights that this
worker's optimizer holds: under stages 1 to 3 no worker has a full copy, and an update communicates nothing.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.ema import EMA
from pipelines.checkpoints import Shards
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.guard import Guard
from pipelines.train.optimizers import adamw
from pipelines.train.plan import cut_step
from pipelines.train.sharded import Part, Sharded

WHOLE_VALUES = 100_000  # of a parameter that stage 3 leaves whole: the VAE's last layer, which balances its losses


class Engine:
    """A network under DeepSpeed ZeRO. All workers call its methods, in the same order."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        batch: BatchConfig,
        workers: WorkersConfig,
        ema: EMAConfig | None,
        lr_scale: float = 1.0,
    ) -> None:
        """`ema` is None for a network that is not averaged (a discriminator); `lr_scale` multiplies its rate."""
        deepspeed = _deepspeed(workers.gpu)
        self.name, self.network, self.guard = name, network, Guard(optimizer.guard)
        self._optimizer, self._schedule, self._batch, self._lr_scale = optimizer, schedule, batch, lr_scale
        self._stage = workers.zero_stage
        self._own_norm: float | None = 0.0 if self._stage == 0 and workers.dtype == "float32" else None
        parameters = {key: tuple(parameter.shape) for key, parameter in network.named_parameters()}
        self._blank = _without_weights(network)
        self._loss = torch.zeros(())  # mean over this step's passes so far
        self._refusal: str | None = "DeepSpeed tries the optimizer while it is made"
        self._judged = True
        exact = {key: parameter.detach().float().cpu().clone() for key, parameter in network.named_parameters()}
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=adamw(optimizer, network.parameters(), self._may_step),
            config=deepspeed_config(optimizer, batch, workers, torch.distributed.get_world_size()),
        )
        self._dtype = torch.bfloat16 if workers.dtype == "bfloat16" else torch.float32
        self.sharded = Sharded(self._engine, network, parameters, self._stage)
        if workers.dtype != "float32":  # DeepSpeed rounds the network before it copies the fp32 weights
            self.sharded.set_weights(exact)
        del exact
        self._refusal = None
        self.ema = EMA(self.sharded.weights, ema.halflife_images, ema.rampup) if ema else None
        self.sharded.average = self.ema.shadow if self.ema else None

    def __call__(self, *inputs: Tensor) -> Any:
        """The network's forward pass; of the averaged network while `averaged` lasts.

        It goes past DeepSpeed's own, which hangs hooks on the outputs: they would take the gradients of the adaptive
        weight for the step's backward pass. `backward` does what they are for.
        """
        return self.network(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss, times its weight; passes and workers are averaged."""
        self._loss = self._loss.to(loss.device) + loss.detach().float() / self._engine.gradient_accumulation_steps()
        if self._stage > 0:
            self._engine.optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())  # clears what the last pass left, among others
        self._engine.backward(loss)

    def step(self, images_seen: int) -> None:
        """After each micro-batch; at the last of a step, update weights and average, unless the guard refuses.

        `images_seen` counts over all workers and includes this step.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = self.learning_rate(images_seen)
            torch.distributed.all_reduce(self._loss)
            self._judged = False
        self._engine.step()
        if last and self._may_step() and self.ema is not None:  # where a norm is not finite, DeepSpeed did not ask
            self.ema.update(self.sharded.weights, images_seen, self._batch.global_size)
        if last:
            self._loss = torch.zeros_like(self._loss)

    def refusal(self) -> str | None:
        """Why the last step was refused; None if it was taken, and after it has been asked."""
        refusal, self._refusal = self._refusal, None
        return refusal

    def learning_rate(self, images_seen: int) -> float:
        """The rate of the step that ends at `images_seen`."""
        left = self._schedule.images - images_seen + self._batch.global_size
        return self._lr_scale * learning_rate(self._optimizer, images_seen, left)

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        if self._own_norm is not None:
            return self._own_norm
        norm = self._engine.optimizer._global_grad_norm
        return float(norm) if norm is not None else 0.0

    @contextmanager
    def averaged(self, here: bool = True) -> Iterator[nn.Module]:
        """A network of the averaged weights, whole, in training's type; gone at the end.

        A worker that needs none says that it is not `here`, and has one on the meta device. It is another network than
        the one that learns, without DeepSpeed's hooks, and so not compiled.
        """
        if self.ema is None:
            raise RuntimeError(f"{self.name} is not averaged")
        trained = self.network
        network = copy.deepcopy(self._blank)
        for name, value in trained.named_buffers():
            owner, _, attribute = name.rpartition(".")
            network.get_submodule(owner)._buffers[attribute] = value
        for name, value in self.sharded.gathered(self.ema.shadow):
            if not here:
                continue
            owner, _, attribute = name.rpartition(".")
            weight = nn.Parameter(value.to(self._dtype, copy=True), requires_grad=False)
            setattr(network.get_submodule(owner), attribute, weight)
        self.network = network.eval()
        try:
            yield self.network
        finally:
            self.network = trained

    def full_weights(self, averaged: bool = False) -> dict[str, Tensor]:
        """All weights in fp32, on the CPU, gathered from the workers' shards: in full on worker 0, empty elsewhere."""
        if averaged and self.ema is None:
            raise RuntimeError(f"{self.name} is not averaged")
        tensors = self.ema.shadow if averaged and self.ema else self.sharded.weights
        first = torch.distributed.get_rank() == 0
        return {name: value.to("cpu", copy=True) for name, value in self.sharded.gathered(tensors) if first}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors: the same on all workers."""
        average = {"halflife_images": self.ema.halflife_images, "rampup": self.ema.rampup} if self.ema else None
        return {"updates": self.sharded.updates, "average": average, "guard": self.guard.state_dict()}

    def snapshot(self, buffers: dict[str, Tensor]) -> Part:
        """A copy of what this worker writes into a checkpoint, in `buffers`, which it may have filled before."""
        return self.sharded.snapshot(buffers)

    def load(self, shards: Shards, numbers: Mapping[str, Any]) -> None:
        """Take up a checkpoint of any number of workers and any stage.

        Raises ValueError where it is of another network, or its average has another half-life.
        """
        if numbers["average"] != self.numbers()["average"]:
            raise ValueError(f"{shards.uri}: {self.name} has the average {numbers['average']}, another than configured")
        self.sharded.load(shards, numbers["updates"])
        self.guard.load_state_dict(numbers["guard"])

    def _may_step(self) -> bool:
        """The guard's verdict on this step, which it gives once."""
        if not self._judged:
            if self._own_norm is not None:
                limit = self._optimizer.clip_norm or math.inf
                self._own_norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
            loss = float(self._loss) / torch.distributed.get_world_size()
            self._refusal, self._judged = self.guard.judge(loss, self.gradient_norm()), True
        return self._refusal is None


def learning_rate(config: OptimizerConfig, images_seen: int, left: int) -> float:
    """The rate of a step: a line up, constant, and a line or half a cosine down.

    The step ends at `images_seen`, and `left` images, its own among them, are left of the run: no step's rate is zero.
    """
    rising = min(1.0, images_seen / config.warmup_images) if config.warmup_images else 1.0
    falling = min(1.0, left / config.decay_images) if config.decay_images else 1.0
    if config.decay_shape == "cosine":
        falling = (1 - math.cos(math.pi * falling)) / 2
    floor = config.final_lr_share
    return config.lr * min(rising, floor + (1 - floor) * falling)


def deepspeed_config(
    optimizer: OptimizerConfig, batch: BatchConfig, workers: WorkersConfig, world: int
) -> dict[str, Any]:
    """DeepSpeed's settings; `world` is the number of workers that are there."""
    half, stage = workers.dtype == "bfloat16", workers.zero_stage
    zero: dict[str, Any] = {"stage": stage, "memory_efficient_linear": False}  # which replaces F.linear everywhere
    zero["stage3_param_persistence_threshold"] = WHOLE_VALUES
    if workers.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": workers.gpu}
    return {
        "train_micro_batch_size_per_gpu": batch.micro_size,  # told for its log: passes may be smaller
        "gradient_accumulation_steps": len(cut_step(batch, 0, world)),
        "gradient_clipping": optimizer.clip_norm if stage or half else 0.0,  # without either, Engine clips
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        "communication_data_type": "fp32",  # a sum over many workers loses digits in bf16
        "data_types": {"grad_accum_dtype": "fp32"} if stage else {},  # and so does a sum over many passes
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # AdamW with a gate
        "steps_per_print": 10**9,
    }


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose weights are on the meta device."""
    meta: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, meta)


def _deepspeed(gpu: bool) -> Any:
    """The library, told not to compile anything: its shared-memory all-reduce for CPUs gives way to gloo."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when the library is first imported
    import deepspeed

    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
