"""What makes the networks fast changes no number: memory formats, what is kept for the backward pass, compilation."""

import ast
import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap

import model.unet
from model.config import UNET_PRESETS, VAE_PRESETS
from model.functions import GroupNormFunction, gate, group_norm, plain_gate
from model.layers import BasicTransformerBlock, GroupNorm, ResBlock
from model.speed import compile_blocks
from model.unet import UNet
from model.vae import VAE

ROOT = Path(__file__).parents[2]
CHANNELS, EMBED, CONTEXT = 32, 24, 20


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks(randomized):
    torch.manual_seed(0)
    return randomized(ResBlock(CHANNELS, 64, EMBED, 8)), randomized(BasicTransformerBlock(CHANNELS, CONTEXT, 2))


def block_inputs(block, batch, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch * height * width)
    x = torch.randn(batch, CHANNELS, height, width, generator=generator)
    if isinstance(block, ResBlock):
        given = x.to(memory_format=torch.channels_last), torch.randn(batch, EMBED, generator=generator)
    else:
        given = x.flatten(2).transpose(1, 2), torch.randn(batch, 77, CONTEXT, generator=generator)
    return [value.to(dtype) for value in given]


def gradients(block, given):
    given = [value.detach().requires_grad_() for value in given]
    found = torch.autograd.grad(block(*given).float().square().mean(), [*given, *block.parameters()])
    return [value.double() for value in found]


def unet_inputs(config, batch=2, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 4, height, width, generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randn(batch, 77, config.context_dim, generator=generator),
        torch.randn(batch, config.vector_dim, generator=generator),
    )


def test_the_gate_that_keeps_its_input_alone_has_the_plain_gates_gradient():
    halves = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gate(halves), plain_gate(halves))
    assert torch.autograd.gradcheck(gate, (halves,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gate(halves)
    assert kept == [halves.data_ptr()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("run", [group_norm, GroupNormFunction.apply])  # on a CPU and elsewhere
def test_group_norm_in_half_precision_is_as_near_to_exact_as_rounding_its_results(
    layout, dtype, mean, run, relative_error
):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    norm = GroupNorm(8, 64)
    with torch.no_grad():
        norm.weight.copy_(draw(64))
        norm.bias.copy_(draw(64))
    norm = norm.to(dtype)
    x = draw(2, 64, 24, 32).mul(3).add(mean).to(dtype, memory_format=layout).requires_grad_()
    gradient = draw(2, 64, 24, 32).to(dtype)

    def results(run, *given):
        result = run(*given)
        return [result, *torch.autograd.grad(result, given, gradient.to(result.dtype))]

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = results(lambda x, *affine: run(x, 8, *affine, norm.eps), x, norm.weight, norm.bias)
    exact = results(
        lambda x, *affine: F.group_norm(x, 8, *affine), *(given.double() for given in (x, norm.weight, norm.bias))
    )
    for ours, expected in zip(found, exact, strict=True):
        assert relative_error(ours, expected) < 1.1 * relative_error(expected.to(dtype), expected)
    assert all(map_.is_contiguous(memory_format=layout) for map_ in found[:2])
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]  # no copy in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_stay_channels_last_through_every_layer(dtype, randomized, monkeypatch):
    monkeypatch.setattr(model.unet, "map_format", lambda device: torch.channels_last)  # as on a GPU
    config = UNET_PRESETS["tiny-base"]
    unet = randomized(UNet(config)).to(dtype)
    other = []

    def check(module, _, result):
        if result.ndim == 4 and not result.is_contiguous(memory_format=torch.channels_last):
            other.append(type(module).__name__)

    for module in unet.modules():
        if not isinstance(module, nn.ModuleList | UNet):
            module.register_forward_hook(check)
    unet(*unet_inputs(config)).float().square().mean().backward()
    assert other == []


def test_compilation_changes_no_key_and_a_network_without_blocks_is_refused():
    for network, count in ((UNet(UNET_PRESETS["tiny-base"]), 18), (VAE(VAE_PRESETS["tiny"]), 13)):
        before = {key: value.data_ptr() for key, value in network.state_dict().items()}
        assert compile_blocks(network) == count
        assert {key: value.data_ptr() for key, value in network.state_dict().items()} == before
    with pytest.raises(ValueError, match="Linear has no block"):
        compile_blocks(nn.Linear(1, 1))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_buckets_after_the_second_compile_nothing(randomized, checkpointed):
    config = UNET_PRESETS["tiny-refiner"]
    unet = randomized(UNet(config))
    compiled = copy.deepcopy(unet)
    counter = CompileCounterWithBackend("eager")
    assert compile_blocks(compiled, counter) == 18
    unet.activation_checkpointing = compiled.activation_checkpointing = checkpointed
    counts = []
    for height, width in ((8, 8), (8, 12), (16, 8), (6, 20), (12, 12)):
        given = unet_inputs(config, height=height, width=width)
        unet.zero_grad()
        compiled.zero_grad()
        for network in (unet, compiled):
            network(*given).square().mean().backward()
        for ours, plain in zip(compiled.parameters(), unet.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-6)
        counts.append(counter.frame_count)
    assert 18 <= counts[0] <= counts[1] == counts[-1] <= 2 * 18


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients_equal_eager_ones_in_fp32_and_are_near_them_in_bf16(randomized, relative_error):
    """Inductor, channels-last, every gradient: convolutions and norms once had silently wrong ones in bf16."""
    for block in blocks(randomized):
        exact = gradients(block, block_inputs(block, 2, 8, 6))
        plain = copy.deepcopy(block).bfloat16()
        eager = gradients(plain, block_inputs(block, 2, 8, 6, torch.bfloat16))
        compile_blocks(nn.ModuleList([plain]))
        bf16 = gradients(plain, block_inputs(block, 2, 8, 6, torch.bfloat16))
        for expected, *found in zip(exact, bf16, eager, strict=True):
            errors = [relative_error(value, expected) for value in found]
            assert max(errors) < 2e-2, errors
        if isinstance(block, ResBlock):  # once is enough to tell a wrong graph from a rounded one
            single = copy.deepcopy(block)
            compile_blocks(nn.ModuleList([single]))
            for value, expected in zip(gradients(single, block_inputs(block, 2, 8, 6)), exact, strict=True):
                assert relative_error(value, expected) < 1e-4


def test_the_gpu_script_fills_every_row_at_tiny_size():
    script = ROOT / "tests/benchmarks/gpu_networks.py"
    command = [sys.executable, str(script), "--device", "cpu", "--preset", "tiny-base", "--rounds", "1"]
    done = subprocess.run([*command, "--backend", "eager"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("G1 train", "G2 train", "G3 VAE encode", "VAE decode", "G7", "G8", "G9", "U-Net forward,", "backward"):
        assert f"| {row}" in done.stdout or row in done.stdout
    assert "| 0 graphs after the second |" in done.stdout.replace("  ", " ")
    assert "left out" not in done.stdout


def test_the_gpu_script_imports_torch_alone():
    """What functions of it import later is for its peers, and it leaves out those that are missing."""
    seen, left, others = set(), [ROOT / "tests/benchmarks/gpu_networks.py"], set()
    while left:
        file = left.pop()
        seen.add(file)
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            own = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("model.")}
            left += sorted(own - seen - set(left))
            others |= {name.partition(".")[0] for name in names} - {"model"} - sys.stdlib_module_names
    assert {"unet.py", "vae.py", "layers.py", "functions.py"} < {file.name for file in seen}
    assert others == {"torch"}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_torch_func_gives_each_samples_gradient(randomized, relative_error, dtype, bound):
    for block in blocks(randomized):
        block.to(dtype)
        given = block_inputs(block, 3, 4, 6, dtype)
        weights = dict(block.named_parameters())

        def loss(weights, *sample, block=block):
            return functional_call(block, weights, tuple(x[None] for x in sample)).float().square().mean()

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *given)
        for k in range(3):
            block.zero_grad()
            loss(weights, *(x[k] for x in given)).backward()
            for name, weight in weights.items():
                assert relative_error(per_sample[name][k].float(), weight.grad.float()) < bound


def test_second_derivatives_are_refused_and_double_precision_is_exact(randomized):
    norm, halves = GroupNorm(4, 16), torch.randn(2, 6, requires_grad=True)
    x = torch.randn(2, 16, 5, 3, dtype=torch.bfloat16, requires_grad=True)
    norm = norm.bfloat16()
    normed = GroupNormFunction.apply(x, 4, norm.weight, norm.bias, norm.eps)
    for result, given in ((normed, x), (gate(halves), halves)):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(result.float().square().sum(), given, create_graph=True)
    assert norm(x[:0]).shape == (0, 16, 5, 3)
    block, given = ResBlock(CHANNELS, 64, EMBED, 8), blocks(randomized)[0]
    block.load_state_dict(given.state_dict())
    block = block.double()
    exact = block(*block_inputs(block, 1, 4, 4, torch.float64))
    rounded = block.float()(*block_inputs(block, 1, 4, 4))
    assert exact.dtype == torch.float64
    assert 1e-9 < float((rounded - exact).abs().max()) < 1e-4
