"""One network in training: DeepSpeed's engine, the learning rate's way, and the average of the weights.

DeepSpeed enters the project here only. The average is kept of the fp32 master weights that the ZeRO optimizer shards
over workers, so each worker averages its own shard: no worker holds a full copy, and no update communicates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.ema import EMA
from pipelines.checkpoints import ema_file
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.guard import GatedAdamW, Guard

TAG = "state"  # DeepSpeed's name for the one checkpoint in a folder


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
        self.name, self.network = name, network
        self._optimizer, self._schedule, self._batch, self._lr_scale = optimizer, schedule, batch, lr_scale
        self.guard = Guard(optimizer.guard)
        self._loss = torch.zeros(())  # mean over this step's passes so far
        self._refusal: str | None = None
        self._judged = False
        adamw = GatedAdamW(
            network.parameters(),
            may_step=self._may_step,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=workers.gpu or None,
        )
        exact = [parameter.detach().float().cpu().clone() for parameter in network.parameters()]
        self._engine, *_ = deepspeed.initialize(
            model=network, optimizer=adamw, config=deepspeed_config(optimizer, batch, workers)
        )
        if workers.dtype != "float32":
            self._restore_masters(exact)
        self.ema = EMA(self._masters(), ema.halflife_images, ema.rampup) if ema else None

    def __call__(self, *inputs: Tensor) -> Any:
        """The network's forward pass.

        It goes past DeepSpeed's own, which hangs hooks on the outputs: they would take the gradients of the adaptive
        weight for the step's backward pass. `backward` does what they are for.
        """
        return self.network(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss; workers are averaged."""
        self._loss = self._loss.to(loss.device) + loss.detach().float() / self._engine.gradient_accumulation_steps()
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
            self.ema.update(self._masters(), images_seen, self._batch.global_size)
        if last:
            self._loss = torch.zeros_like(self._loss)

    def refusal(self) -> str | None:
        """Why the last step was refused; None if it was taken, and after it has been asked."""
        refusal, self._refusal = self._refusal, None
        return refusal

    def _may_step(self) -> bool:
        """The guard's verdict on this step, which it gives once."""
        if not self._judged:
            loss = float(self._loss) / torch.distributed.get_world_size()
            self._refusal, self._judged = self.guard.judge(loss, self._norm()), True
        return self._refusal is None

    def _norm(self) -> float:
        norm = self._engine.optimizer._global_grad_norm
        return float(norm) if norm is not None else 0.0

    def learning_rate(self, images_seen: int) -> float:
        """The rate of the step that ends at `images_seen`."""
        left = self._schedule.images - images_seen + self._batch.global_size
        return self._lr_scale * learning_rate(self._optimizer, images_seen, left)

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping."""
        return self._norm()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in place; training's own come back at the end."""
        if self.ema is None:
            raise RuntimeError(f"{self.name} is not averaged")
        self._exchange()
        try:
            yield self.network.eval()
        finally:
            self._exchange()
            self.network.train()

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in fp32, on the CPU, gathered from the workers' shards: in full on worker 0, empty elsewhere."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.network.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            if torch.distributed.get_rank() == 0:
                weights[name] = full.to("cpu", copy=True)
        return weights

    def save(self, folder: Path) -> None:
        """Write this worker's part of the checkpoint below `folder`."""
        target = folder / self.name
        target.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(target), tag=TAG)
        if self.ema is not None:
            torch.save(self.ema.state_dict(), target / ema_file(torch.distributed.get_rank()))

    def load(self, folder: Path) -> None:
        """Take up a checkpoint. Raises FileNotFoundError where a part of it is missing."""
        target = folder / self.name
        path, _ = self._engine.load_checkpoint(str(target), tag=TAG)
        if path is None:  # DeepSpeed only warns, and would train from scratch
            raise FileNotFoundError(f"{target} holds no DeepSpeed checkpoint {TAG!r}")
        if self.ema is not None:
            part = target / ema_file(torch.distributed.get_rank())
            self.ema.load_state_dict(torch.load(part, map_location="cpu", weights_only=True))

    def _restore_masters(self, exact: list[Tensor]) -> None:
        """Give the master weights the digits that they lost: DeepSpeed rounds the network before it copies them."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in zip(self.network.parameters(), exact, strict=True):
            safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def _masters(self) -> list[Tensor]:
        """This worker's shards of the fp32 weights."""
        return [shard for group in self._engine.basic_optimizer.param_groups for shard in group["params"]]

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap averaged and master weights, shard by shard, and give every worker the full network of the latter."""
        assert self.ema is not None
        for average, master in zip(self.ema.shadow, self._masters(), strict=True):
            kept = master.data.clone()
            master.data.copy_(average)
            average.copy_(kept)
        self._engine.optimizer.update_lp_params()


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


def deepspeed_config(optimizer: OptimizerConfig, batch: BatchConfig, workers: WorkersConfig) -> dict[str, Any]:
    """DeepSpeed's settings."""
    return {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": batch.global_size // (batch.micro_size * workers.count),
        "gradient_clipping": optimizer.clip_norm,
        "zero_optimization": {"stage": workers.zero_stage},
        "bf16": {"enabled": workers.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # and so does a sum over many passes
        "communication_data_type": "fp32",  # a sum over many workers loses digits in bf16
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # AdamW with a gate
        "steps_per_print": 10**9,
    }


def _deepspeed(gpu: bool) -> Any:
    """The library, told not to compile anything: its shared-memory all-reduce for CPUs gives way to gloo."""
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when the library is first imported
    import deepspeed

    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
