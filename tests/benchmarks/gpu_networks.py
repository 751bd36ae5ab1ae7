"""The networks on one device: step rate, memory and text, ours eager and compiled beside diffusers and transformers.

    python tests/benchmarks/gpu_networks.py                                      # on a GPU, SDXL's own sizes, bf16
    python tests/benchmarks/gpu_networks.py --device cpu --preset tiny-base      # what a test runs

Needs torch alone; what diffusers, transformers and open_clip are needed for is left out, and named, where they are
missing. All sides share one set of random weights, are checked to give the same answer, and take turns in one process;
figures are medians with the least and the greatest. It has run on CPUs only: no GPU was there when it was written.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS, TextConfig, UNetConfig, VAEConfig
from model.layers import GroupNorm
from model.speed import compile_blocks
from model.unet import UNet
from model.vae import VAE

H200_TFLOPS = 989.0  # dense bf16, NVIDIA's data sheet
TRAIN = {1024: 8, 512: 32, 256: 64}  # micro-batch by side in pixels
TINY_TRAIN = {64: 2, 32: 2}
BUCKETS = ((1, 1), (3, 4), (4, 3), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (1, 4))  # (height, width) in parts
NORM_CHANNELS, NORM_OFFSET = 128, 10.0  # a map whose mean is ten deviations: where rounded statistics would show
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are per call, and None is what was not measured."""

    what: str
    side: str
    seconds: float | None = None
    least: float | None = None
    greatest: float | None = None
    per_second: float | None = None  # images or prompts
    mfu: float | None = None  # share of the device's peak
    peak_gib: float | None = None  # greatest memory during the call, weights included; CUDA only
    note: str = ""


def fill(module: nn.Module) -> nn.Module:
    """Random weights in every layer, those that start at zero too; small enough that maps stay about 1."""
    generator = torch.Generator(device=next(module.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            bound = max(weight[0].numel(), 8) ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.5)
    return module


def built(network: type[nn.Module], config: object, device: str, dtype: torch.dtype) -> nn.Module:
    """A network with random weights, made where it runs: neither fp32 nor the CPU holds it first."""
    with torch.device("meta"):
        module = network(config)
    return fill(module.to(dtype).to_empty(device=device))


def twin(module: nn.Module, config: object) -> nn.Module:
    """Another network over the same weights."""
    with torch.device("meta"):
        other = type(module)(config)
    other.load_state_dict(module.state_dict(), assign=True)
    return other.requires_grad_(True)


def inputs_of(config: UNetConfig, batch: int, size: tuple[int, int], device: str, dtype: torch.dtype) -> Inputs:
    """Noisy latents [B,4,h,w], timesteps, context and vector; `size` in latent pixels."""
    generator = torch.Generator(device=device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    timesteps = torch.arange(batch, device=device) * 97 % 1000
    vector = draw(batch, config.vector_dim)
    vector[:, config.pooled_dim :] = 0.0
    vector[:, config.pooled_dim :].unflatten(1, (-1, config.conditioning_embed_dim))[
        ..., : config.conditioning_embed_dim // 2
    ] = 1.0  # the Fourier features of zero sizes
    return draw(batch, config.latent_channels, *size), timesteps, draw(batch, 77, config.context_dim), vector


def diffusers_unet(unet: nn.Module, config: UNetConfig) -> tuple[nn.Module, Callable[..., Tensor]]:
    """diffusers' U-Net over the same weights, and its call with our inputs (sizes zero, as in `inputs_of`)."""
    from diffusers import UNet2DConditionModel

    from model.layouts import diffusers_config, to_diffusers

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(diffusers_config(config))
    theirs.load_state_dict(to_diffusers(unet.state_dict(), config), assign=True)
    theirs.requires_grad_(True).train()
    scalars = sum(name.scalars for name in config.conditioning)

    def call(latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        ids = torch.zeros(len(latents), scalars, device=latents.device)
        conditions = {"text_embeds": vector[:, : config.pooled_dim], "time_ids": ids}
        return theirs(latents, timesteps, context, added_cond_kwargs=conditions).sample

    return theirs, call


def diffusers_vae(vae: nn.Module, config: VAEConfig) -> nn.Module:
    """diffusers' VAE over the same weights."""
    from diffusers import AutoencoderKL

    from model.layouts import diffusers_config, to_diffusers

    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(diffusers_config(config))
    theirs.load_state_dict(to_diffusers(vae.state_dict(), config), assign=True)
    return theirs.eval()


def text_sides(config: TextConfig, prompts: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Ours and two transformers models over the same weights; context and pooled text of each prompt in one row."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from model.config import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT
    from model.text import Tokens, random_text_encoders, text_states
    from model.text_weights import TEXT_MODEL, to_transformers, transformers_config

    ours = random_text_encoders(config, 0)
    theirs = []
    for name, kind in (("clip_l", CLIPTextModel), ("bigg", CLIPTextModelWithProjection)):
        model = kind(CLIPTextConfig(**transformers_config(getattr(config, name)))).eval()
        state = {key: value.read() for key, value in to_transformers(text_states(ours)[name]).items()}
        if not any(key.startswith(TEXT_MODEL) for key in model.state_dict()):
            state = {key.removeprefix(TEXT_MODEL): value for key, value in state.items()}
        model.load_state_dict(state, strict=True)
        theirs.append(model.to(device, dtype))
    ours = ours.to(device, dtype)
    torch.manual_seed(0)
    ids = torch.full((prompts, CONTEXT_LENGTH), END_OF_TEXT)
    ids[:, 0], ids[:, 1:20] = START_OF_TEXT, torch.randint(0, 40_000, (len(ids), 19))
    ids = ids.to(device)

    def peer() -> Tensor:
        with torch.no_grad():
            first, second = (model(ids, output_hidden_states=True) for model in theirs)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return torch.cat([context.flatten(1), second.text_embeds], 1)

    def own() -> Tensor:
        features = ours(Tokens(clip_l=ids, bigg=ids))
        return torch.cat([features.context.flatten(1), features.pooled], 1)

    return {"ours": own, "transformers": peer}


def same_answer(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError where two sides differ by more than rounding."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    limit = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert error < limit, f"relative error {error:.1e}: the sides do not compute the same"


def turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides in turns; one round before them warms up.

    On a CPU they are seconds of this process' own computing, which other programs lengthen far less than the clock's.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            _wait(device)
            begun = clock()
            run()
            _wait(device)
            seconds[name].append(clock() - begun)
    return {name: values[1:] for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Bench:
    """Collects the rows of one run."""

    def __init__(self, device: str, dtype: torch.dtype, rounds: int, peak_tflops: float, backend: str) -> None:
        self.device, self.dtype, self.rounds = device, dtype, rounds
        self.peak_flops = peak_tflops * 1e12 if device == "cuda" else None
        self.rows: list[Row] = []
        self.backend = backend
        self.left_out: list[str] = []

    def measure(
        self, what: str, sides: Mapping[str, Callable[[], object]], items: int, flops: int = 0, note: str = ""
    ) -> None:
        """A row for each side; one that does not fit into memory gets a row that says so."""
        fitting, peaks = {}, {}
        for name, run in sides.items():
            try:
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                run()  # a compiled side compiles here
                run()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
                fitting[name] = run
            except torch.OutOfMemoryError:
                self.rows.append(Row(what, name, note="does not fit into memory"))
                gc.collect()
                torch.cuda.empty_cache()
        for name, seconds in turns(fitting, self.rounds, self.device).items():
            median = statistics.median(seconds)
            mfu = flops / median / self.peak_flops if flops and self.peak_flops else None
            self.rows.append(
                Row(what, name, median, min(seconds), max(seconds), items / median, mfu, peaks[name], note)
            )

    def unet(self, preset: str, train: Mapping[int, int], has_diffusers: bool) -> None:
        """G1, G2, G7, G8, and the forward and backward pass."""
        config = UNET_PRESETS[preset]
        eager = built(UNet, config, self.device, self.dtype)
        compiled = twin(eager, config)
        compile_blocks(compiled, self.backend)
        calls: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
            "ours eager": (eager, eager),
            "ours compiled": (compiled, compiled),
        }
        if has_diffusers:
            calls["diffusers eager"] = diffusers_unet(eager, config)
        largest = max(train)
        down = 2 ** (len(VAE_PRESETS["sdxl"].channel_mult) - 1)

        def sides(inputs: Inputs, then: Callable[[nn.Module, Tensor], None]) -> dict[str, Callable[[], None]]:
            return {
                name: lambda module=module, call=call: then(module, call(*inputs))
                for name, (module, call) in calls.items()
            }

        def backward(module: nn.Module, prediction: Tensor) -> None:
            prediction.float().square().mean().backward()
            module.zero_grad(set_to_none=True)

        inputs = inputs_of(config, train[largest], (largest // down, largest // down), self.device, self.dtype)
        with torch.no_grad():
            answers = [call(*inputs) for _, call in calls.values()]
            for answer in answers[1:]:
                same_answer(answers[0], answer, self.dtype)
            del answers
            self.measure(f"U-Net forward, {largest} px", sides(inputs, lambda *_: None), train[largest])
        self.measure(f"U-Net forward and backward, {largest} px", sides(inputs, backward), train[largest])
        for module, _ in calls.values():
            if isinstance(module, UNet):
                module.activation_checkpointing = True
            else:
                module.enable_gradient_checkpointing()
        self.measure(f"the same, checkpointed, {largest} px", sides(inputs, backward), train[largest])
        for module, _ in calls.values():
            if isinstance(module, UNet):
                module.activation_checkpointing = False
            else:
                module.disable_gradient_checkpointing()
        self._buckets(compiled, config, train[min(train)], min(train) // down)
        step = self._optimizer(eager)
        for pixels, batch in train.items():
            inputs = inputs_of(config, batch, (pixels // down, pixels // down), self.device, self.dtype)
            with FlopCounterMode(display=False) as counter:
                backward(eager, eager(*inputs))
            label = "G1" if pixels == largest else "G2"
            self.measure(
                f"{label} train step, {pixels} px", sides(inputs, step), batch, counter.get_total_flops(), f"of {batch}"
            )
        ten = inputs_of(config, 10, (largest // down, largest // down), self.device, self.dtype)
        own = {name: run for name, run in sides(ten, step).items() if name.startswith("ours")}
        self.measure(f"G7 micro-batch 10, {largest} px, not checkpointed", own, 10)

    def _optimizer(self, module: nn.Module) -> Callable[[nn.Module, Tensor], None]:
        """One step of fused AdamW on fp32 masters, found by each parameter's storage: all sides share them."""
        masters = {weight.data_ptr(): weight.detach().float().clone() for weight in module.parameters()}
        adamw = torch.optim.AdamW(masters.values(), lr=1e-6, fused=True)

        def step(side: nn.Module, prediction: Tensor) -> None:
            prediction.float().square().mean().backward()
            weights = list(side.parameters())
            own = [masters[weight.data_ptr()] for weight in weights]
            for master, weight in zip(own, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

        return step

    def _buckets(self, compiled: nn.Module, config: UNetConfig, batch: int, side: int) -> None:
        """G8: the same pixels in ten shapes and in one; graphs that the shapes add after the second are counted."""
        unit = max(2 * config.downsample, side // 4)  # a side of 1 has a graph of its own
        area = [inputs_of(config, batch, (unit * h, unit * w), self.device, self.dtype) for h, w in BUCKETS]

        def run(inputs: Inputs) -> None:
            compiled(*inputs).float().square().mean().backward()
            compiled.zero_grad(set_to_none=True)

        graphs = torch._dynamo.utils.counters["stats"]
        for inputs in area[:2]:
            run(inputs)
        before = graphs["unique_graphs"]
        for inputs in area:
            run(inputs)
        added = graphs["unique_graphs"] - before
        mixed = {"ten buckets": lambda: [run(inputs) for inputs in area]}
        self.measure("G8 ten buckets, compiled", mixed, batch * len(area), note=f"{added} graphs after the second")
        single: dict[str, Callable[[], object]] = {
            f"{h}:{w}": lambda inputs=inputs: run(inputs) for (h, w), inputs in zip(BUCKETS, area, strict=True)
        }
        alone = {name: turns({name: step}, self.rounds, self.device)[name] for name, step in single.items()}
        seconds = sum(statistics.median(values) for values in alone.values())
        note = "each bucket by itself, summed"
        self.rows.append(Row("G8 ten buckets, compiled", "one at a time", seconds, note=note))

    def vae(self, preset: str, pixels: int, batch: int, has_diffusers: bool) -> None:
        """G3 and decoding."""
        config = VAE_PRESETS[preset]
        eager = built(VAE, config, self.device, self.dtype).eval()
        compiled = twin(eager, config).eval()
        compile_blocks(compiled, self.backend)
        generator = torch.Generator(device=self.device).manual_seed(2)
        image = torch.rand(batch, 3, pixels, pixels, generator=generator, device=self.device) * 2 - 1
        image = image.to(self.dtype)
        latents = torch.randn(
            batch,
            config.latent_channels,
            pixels // config.downsample,
            pixels // config.downsample,
            generator=generator,
            device=self.device,
        ).to(self.dtype)
        encode = {"ours eager": lambda: eager.encode(image).mean, "ours compiled": lambda: compiled.encode(image).mean}
        decode = {"ours eager": lambda: eager.decode(latents), "ours compiled": lambda: compiled.decode(latents)}
        if has_diffusers:
            theirs = diffusers_vae(eager, config)
            encode["diffusers eager"] = lambda: theirs.encode(image).latent_dist.mean
            decode["diffusers eager"] = lambda: theirs.decode(latents).sample
        with torch.no_grad():
            for what, sides in ((f"G3 VAE encode, {pixels} px", encode), (f"VAE decode, {pixels} px", decode)):
                first, *others = (run() for run in sides.values())
                for other in others:
                    same_answer(first, other, self.dtype)
                self.measure(what, sides, batch, note=f"of {batch}")

    def text(self, preset: str) -> None:
        """G9."""
        sides = text_sides(TEXT_PRESETS[preset], 64 if preset == "sdxl" else 4, self.device, self.dtype)
        answers = [run() for run in sides.values()]
        same_answer(*answers, self.dtype)
        self.measure("G9 text encoders", sides, len(answers[0]))

    def norm(self) -> None:
        """What bf16 GroupNorm loses here to statistics that the device may round, beside rounding its result."""
        map_ = torch.randn(2, NORM_CHANNELS, 64, 64, device=self.device).add(NORM_OFFSET).bfloat16()
        exact = F.group_norm(map_.float(), 32)
        ours = GroupNorm(32, NORM_CHANNELS).to(self.device, torch.bfloat16)
        with torch.no_grad():
            results = {"ours": ours(map_), "torch": F.group_norm(map_, 32), "rounding alone": exact.bfloat16()}
        for side, value in results.items():
            error = float((value - exact).norm() / exact.norm())
            self.rows.append(Row("GroupNorm in bf16", side, note=f"relative error {error:.1e}"))


def table(rows: list[Row]) -> str:
    """The rows in Markdown; ratios are the last side's time over this one's."""
    lines = [
        "| | side | ms | least to greatest | per s | MFU | peak GiB | times the last side | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    last = {row.what: row.seconds for row in rows}

    def shown(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
        return "" if value is None else f"{value * factor:.{digits}f}"

    for row in rows:
        spread = f"{shown(row.least, 1e3, 1)} to {shown(row.greatest, 1e3, 1)}" if row.least else ""
        reference = last[row.what]
        ratio = reference / row.seconds if reference and row.seconds else None
        cells = [row.what, row.side, shown(row.seconds, 1e3, 1), spread, shown(row.per_second, 1, 1), shown(row.mfu)]
        lines.append("| " + " | ".join([*cells, shown(row.peak_gib), shown(ratio), row.note]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(UNET_PRESETS), default="base", help="the U-Net's shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=H200_TFLOPS, help="of the GPU, dense bf16, for the MFU")
    parser.add_argument("--backend", default="inductor", help='of torch.compile; "eager" compiles nothing and is quick')
    parser.add_argument("--json", type=Path, help="where the rows are written as well")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --preset tiny-base runs without one")
    full = options.preset in ("base", "refiner")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    bench = Bench(options.device, dtype, options.rounds, options.peak_tflops, options.backend)
    has_diffusers = find_spec("diffusers") is not None
    if not has_diffusers:
        bench.left_out.append("diffusers' sides (pip install diffusers)")
    bench.norm()
    if find_spec("transformers") and find_spec("open_clip"):
        bench.text("sdxl" if full else "tiny")
    else:
        bench.left_out.append("text encoders (pip install transformers open_clip_torch)")
    bench.vae(*(("sdxl", 1024, 4) if full else ("tiny", 64, 2)), has_diffusers)
    gc.collect()
    bench.unet(options.preset, TRAIN if full else TINY_TRAIN, has_diffusers)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {options.preset}\n")
    print(table(bench.rows))
    for missing in bench.left_out:
        print(f"\nleft out: {missing}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in bench.rows], indent=2) + "\n")
    return bench.rows


if __name__ == "__main__":
    main()
