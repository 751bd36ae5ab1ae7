"""The perceptual distance against the published package, and what a training loss needs of it."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import LPIPS_PRESETS, LPIPSConfig
from model.lpips import LPIPS, load_lpips

TINY = LPIPS_PRESETS["tiny"]


def images(count: int = 2, height: int = 24, width: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(TINY)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The published network with random weights in its trunk and its own heads, and the two files to load it from."""
    import lpips
    import torchvision

    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    trunk = torchvision.models.vgg16(weights=None, init_weights=False).features
    trunk.load_state_dict(
        {
            f"{number}.{name}": value
            for part in (getattr(theirs.net, f"slice{level}") for level in range(1, 6))
            for number, layer in part.named_children()
            for name, value in layer.state_dict().items()
        }
    )
    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    weights = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    torch.save(weights | {"classifier.6.bias": torch.zeros(3)}, path)
    return theirs, path, Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"


def test_distance_equals_the_published_package(package, relative_error):
    theirs, trunk, heads = package
    ours = load_lpips(trunk, heads, LPIPS_PRESETS["vgg16"], allow_pickle=True)
    for height, width in ((16, 16), (64, 48), (35, 70)):
        one = images(3, height, width)
        for other in (images(3, height, width, seed=1), one + 0.02 * images(3, height, width, seed=2)):
            with torch.no_grad():
                assert relative_error(ours(one, other), theirs(one, other).flatten()) < 1e-5


def test_gradients_equal_the_published_packages(package, relative_error):
    theirs, trunk, heads = package
    ours = load_lpips(trunk, heads, LPIPS_PRESETS["vgg16"], allow_pickle=True)
    found = []
    for network in (ours, theirs):
        other = images(2, 32, 32, seed=1).requires_grad_()
        found.append(torch.autograd.grad(network(images(2, 32, 32), other).sum(), other)[0])
    assert relative_error(*found) < 1e-4


def test_an_image_is_at_distance_zero_from_itself_and_nearer_to_what_resembles_it():
    network, image, other = tiny(), images(), images(seed=1)
    assert network(image, image).tolist() == [0.0, 0.0]
    torch.testing.assert_close(network(image, other), network(other, image))
    ladder = torch.stack([network(image, torch.lerp(image, other, share)) for share in (0.0, 0.1, 0.3, 1.0)])
    assert (ladder.diff(dim=0) > 0).all()


def test_a_sample_is_judged_apart_from_its_neighbours():
    network, image, other = tiny(), images(3), images(3, seed=1)
    whole = network(image, other)
    assert whole.shape == (3,)
    torch.testing.assert_close(whole[1:2], network(image[1:2], other[1:2]))
    other[0] = image[0]
    assert network(image, other)[0] == 0
    assert torch.equal(network(image, other)[1:], whole[1:])


def test_gradients_reach_the_reconstruction_alone_and_checkpointing_does_not_change_them():
    network, found = tiny(), []
    for network.activation_checkpointing in (False, True):
        image, other = images(), images(seed=1).requires_grad_()
        network(image, other).sum().backward()
        assert image.grad is None
        found.append(other.grad)
    assert all(weight.grad is None for weight in network.parameters())
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_gradients_are_finite_where_no_feature_answers():
    network = tiny()
    for weight in network.features.parameters():
        weight.fill_(-1.0)  # every ReLU is shut
    other = torch.ones(1, 3, 8, 8, requires_grad=True)
    network(torch.ones(1, 3, 8, 8), other).sum().backward()
    assert other.grad.isfinite().all()


def test_the_distance_is_computed_in_fp32_whatever_the_image_is():
    network, image = tiny(), images().bfloat16()
    near = (image.float() + 1e-3 * images(seed=1)).float()
    assert network(image, near).dtype == torch.float32
    torch.testing.assert_close(network(image, near), network(image.float(), near))
    assert (network(image, near) > 0).all()


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16 pixels or more"):
        LPIPS(LPIPSConfig(channels=(2,) * 5, convolutions=(1,) * 5))(images(1, 15, 16), images(1, 15, 16))
    with pytest.raises(ValueError, match="twice"):
        tiny()(images(1), images(2))


def parts(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in state.items() if k.startswith(prefix)} for prefix in ("features.", "lin")]


def test_both_kinds_of_file_load_the_same_and_a_pickle_asks_first(tmp_path):
    state = tiny().state_dict()
    for name, part in zip(("trunk", "heads"), parts(state), strict=True):
        save_file(part, tmp_path / f"{name}.safetensors")
        torch.save(part, tmp_path / f"{name}.pth")
    safe = load_lpips(tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors", TINY)
    pickled = load_lpips(tmp_path / "trunk.pth", tmp_path / "heads.pth", TINY, allow_pickle=True)
    for network in (safe, pickled):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match=r"trunk.pth is no .safetensors file; set allow_pickle"):
        load_lpips(tmp_path / "trunk.pth", tmp_path / "heads.safetensors", TINY)


def test_a_pickle_runs_no_code(tmp_path):
    heads = tmp_path / "heads.pth"
    torch.save({"lin0.model.1.weight": Path("x")}, heads)
    save_file(parts(tiny().state_dict())[0], tmp_path / "trunk.safetensors")
    with pytest.raises(pickle.UnpicklingError):
        load_lpips(tmp_path / "trunk.safetensors", heads, TINY, allow_pickle=True)


def test_files_that_do_not_fit_are_named_with_every_key(tmp_path):
    trunk, heads = parts(tiny().state_dict())
    trunk["features.0.weight"] = torch.zeros(1)
    del trunk["features.3.bias"]
    heads["lin9"] = torch.zeros(1)
    save_file(trunk, tmp_path / "trunk.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=r"trunk.*features.3.bias is missing; features.0.weight \(1,\): expected"):
        load_lpips(tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors", TINY)
    save_file(parts(tiny().state_dict())[0], tmp_path / "trunk.safetensors")
    with pytest.raises(ValueError, match=r"heads.*lin9 is unexpected"):
        load_lpips(tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors", TINY)
