"""The whole way from prompts to pictures equals the published pipelines', on small networks with the same weights."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import VaeImageProcessor

from model.config import (
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    Conditioning,
    DiffusionConfig,
    PredictionType,
    SamplerName,
    Spacing,
)
from model.diffusion import Diffusion, gaussian
from model.noise_levels import noise_levels
from model.publish import Model, is_refiner, scheduler_config, write_pipeline
from model.sampler import noised, sample, step_noise
from model.tensors import stored
from model.text import TextEncoders, random_text_encoders, text_states, tokenize
from model.unet import UNet
from model.vae import VAE, scale, unscale
from pipelines.config import SamplingConfig
from pipelines.sampling import Told, base_denoiser, generate, refiner_denoiser

PROMPTS = ["a red fox asleep in the snow", "Größe: two lighthouses, it's 1 oil on canvas."]
NEGATIVES = ["blurry, low quality", "a photo"]
SIZE, SHAPE = (48, 32), (4, 12, 8)  # (height, width) of the pictures in pixels, and the shape of their latents
SQUARE, NOISE_OF_SQUARE = (48, 48), gaussian(0, 0, 2, (4, 12, 12))
NOISE = gaussian(0, 0, 2, SHAPE)
FRESH = step_noise([(0, 0), (0, 1)], SHAPE)
TEXT = TEXT_PRESETS["tiny"]
UNETS = {name: replace(UNET_PRESETS[f"tiny-{name}"], num_res_blocks=1) for name in ("base", "refiner")}
VAE_CONFIG = replace(VAE_PRESETS["tiny"], scaling_factor=0.13025)
SAMPLING = SamplingConfig(spacing=Spacing.LEADING, steps=10, scale=4.0)
TRAILING = replace(SAMPLING, spacing=Spacing.TRAILING)
DIFFUSION = Diffusion(DiffusionConfig())
ZERO_SNR = Diffusion(DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True))
PLAIN = {"original_size": SIZE, "crop_top_left": (0, 0), "target_size": SIZE}


def with_large_weights(module, seed):
    """Weights that all take part, unlike those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            fan_in = max(weight[0].numel(), 8)
            weight.normal_(mean=float(weight.ndim == 1) * 0.5, std=fan_in**-0.5, generator=generator)
    return module.eval()


@dataclass(frozen=True)
class Networks:
    """The same networks twice: ours, and the published pipelines of theirs."""

    base: UNet
    refiner: UNet
    vae: VAE
    text: TextEncoders
    pipeline: StableDiffusionXLPipeline
    base_again: StableDiffusionXLImg2ImgPipeline
    refiner_pipeline: StableDiffusionXLImg2ImgPipeline


def written(folder, unet, vae, text):
    """Writes a diffusers folder of our networks."""
    states = {"unet": stored(unet.state_dict()), "vae": stored(vae.state_dict()), **text_states(text)}
    if is_refiner(unet.config):
        del states["clip_l"]
    model = Model(unet=unet.config, vae=vae.config, text=TEXT, diffusion=DIFFUSION.config, states=states)
    write_pipeline(folder, model, resolution=SQUARE[0])
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    unets = {name: with_large_weights(UNet(config), 3) for name, config in UNETS.items()}
    with torch.no_grad():  # one score among the sizes should be seen
        unets["refiner"].label_emb[0][0].weight[:, -UNETS["refiner"].conditioning_embed_dim :] *= 5.0
    vae, text = with_large_weights(VAE(VAE_CONFIG), 4), random_text_encoders(TEXT, 0)
    root = tmp_path_factory.mktemp("written")
    base, refiner = (written(root / name, unet, vae, text) for name, unet in unets.items())
    pipelines = (
        StableDiffusionXLPipeline.from_pretrained(base),
        StableDiffusionXLImg2ImgPipeline.from_pretrained(base),
        StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner),
    )
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        # Pictures as the VAE gives and takes them, in place of clamped ones.
        pipeline.image_processor = VaeImageProcessor(pipeline.vae_scale_factor, do_normalize=False)
    return Networks(unets["base"], unets["refiner"], vae, text, *pipelines)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Gives diffusers the noise of our steps, in the order in which it asks, from asked["first"] on."""
    asked = {"first": 0}

    def noise(*args, **settings):
        asked["first"] += 1
        return FRESH(asked["first"] - 1)

    for module in (
        EulerAncestralDiscreteScheduler.__module__,
        DDIMScheduler.__module__,
        StableDiffusionXLImg2ImgPipeline.__module__,
    ):
        monkeypatch.setattr(f"{module}.randn_tensor", noise)
    return asked


def scheduler(sampling, diffusion=DIFFUSION):
    """diffusers' counterpart of our sampler, set up from the scheduler_config.json that we write."""
    kind = {
        SamplerName.EULER: EulerDiscreteScheduler,
        SamplerName.EULER_ANCESTRAL: EulerAncestralDiscreteScheduler,
        SamplerName.DPMPP_2M: DPMSolverMultistepScheduler,
        SamplerName.DDIM: DDIMScheduler,
    }[sampling.sampler]
    spacing = {"timestep_spacing": sampling.spacing.value}
    if sampling.spacing is Spacing.KARRAS:
        spacing = {"timestep_spacing": "linspace", "use_karras_sigmas": True}  # over the whole schedule
    return kind.from_config(scheduler_config(diffusion.config), **spacing)


def told(networks, texts, sizes):
    return Told(
        networks.text(tokenize(texts, TEXT)),
        {Conditioning(name): torch.tensor([pair] * len(texts)) for name, pair in sizes.items()},
    )


def decoded(networks, latents):
    with torch.no_grad():
        return networks.vae.decode(unscale(latents, VAE_CONFIG.scaling_factor))


def drawn(networks, sampling, negatives=None, *, diffusion=DIFFUSION, sizes=PLAIN, negative_sizes=PLAIN, noise=NOISE):
    """Our pictures of the prompts."""
    positive = told(networks, PROMPTS, sizes)
    negative = None if negatives is None else told(networks, negatives, negative_sizes)
    base = base_denoiser(networks.base, diffusion, positive, negative, sampling)
    return decoded(networks, generate(base, None, noise, diffusion, sampling, FRESH))


def published(networks, sampling, negatives=None, *, count=2, diffusion=DIFFUSION, **settings):
    """The published pipeline's pictures of the prompts."""
    networks.pipeline.scheduler = scheduler(sampling, diffusion)
    return networks.pipeline(
        PROMPTS[:count],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.scale,
        guidance_rescale=sampling.rescale,
        eta=sampling.eta or 0.0,
        negative_prompt=negatives,
        latents=NOISE[:count],
        **{"output_type": "pt", **settings},
    ).images


def test_a_folder_of_ours_gives_our_picture_with_nothing_but_a_prompt(networks, relative_error):
    """The pipeline's own scheduler, steps, size and guidance, which are the published ones."""
    networks.pipeline.scheduler = EulerDiscreteScheduler.from_config(scheduler_config(DIFFUSION.config))
    expected = networks.pipeline(PROMPTS, latents=NOISE_OF_SQUARE, output_type="pt").images
    sizes = dict.fromkeys(("original_size", "target_size"), SQUARE) | {"crop_top_left": (0, 0)}
    found = drawn(networks, SamplingConfig(spacing=Spacing.LEADING), sizes=sizes, noise=NOISE_OF_SQUARE)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, spacing=Spacing.KARRAS),
        TRAILING,
        replace(SAMPLING, sampler=SamplerName.EULER_ANCESTRAL),
        replace(TRAILING, sampler=SamplerName.EULER_ANCESTRAL),
        replace(TRAILING, sampler=SamplerName.DPMPP_2M),
        replace(SAMPLING, sampler=SamplerName.DDIM),
        replace(TRAILING, sampler=SamplerName.DDIM, eta=0.5),
        replace(SAMPLING, rescale=0.7),
        replace(SAMPLING, scale=1.0),
    ],
    ids=[
        "euler",
        "karras",
        "trailing",
        "euler_ancestral",
        "trailing euler_ancestral",
        "dpmpp_2m",
        "ddim",
        "ddim with noise",
        "rescaled guidance",
        "no guidance",
    ],
)
def test_pictures_of_prompts_and_negative_prompts(networks, relative_error, sampling):
    expected = published(networks, sampling, NEGATIVES)
    found = drawn(networks, sampling, NEGATIVES)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(found[1:], expected[:1]) > 0.1


@pytest.mark.parametrize("sampler", SamplerName)
def test_pictures_from_a_level_without_signal(networks, relative_error, sampler):
    sampling = replace(TRAILING, sampler=sampler, rescale=0.7)
    expected = published(networks, sampling, NEGATIVES, diffusion=ZERO_SNR)
    assert relative_error(drawn(networks, sampling, NEGATIVES, diffusion=ZERO_SNR), expected) < 1e-4


def test_a_negative_prompt_that_is_absent_is_zeros_and_not_the_empty_prompt(networks, relative_error):
    found = drawn(networks, SAMPLING)
    assert relative_error(found, published(networks, SAMPLING)) < 1e-4
    assert relative_error(drawn(networks, SAMPLING, ["", ""]), published(networks, SAMPLING, ["", ""])) < 1e-4
    assert relative_error(drawn(networks, SAMPLING, ["", ""]), found) > 1e-2


def test_a_picture_does_not_depend_on_the_others(networks, relative_error):
    sampling = replace(SAMPLING, sampler=SamplerName.EULER_ANCESTRAL)
    together = drawn(networks, sampling, NEGATIVES)
    positive, negative = (told(networks, texts[1:], PLAIN) for texts in (PROMPTS, NEGATIVES))
    base = base_denoiser(networks.base, DIFFUSION, positive, negative, sampling)
    alone = generate(base, None, NOISE[1:], DIFFUSION, sampling, step_noise([(0, 1)], SHAPE))
    assert relative_error(decoded(networks, alone), together[1:]) < 1e-4


def test_sizes_of_prompt_and_negative_prompt(networks, relative_error):
    sizes = {"original_size": (512, 640), "crop_top_left": (32, 8), "target_size": (1024, 768)}
    away = {"original_size": (100, 90), "crop_top_left": (7, 3), "target_size": (1000, 700)}
    settings = {  # one prompt at a time: of several, the published pipeline gives prompts the negative sizes
        "count": 1,
        "original_size": sizes["original_size"],
        "crops_coords_top_left": sizes["crop_top_left"],
        "target_size": sizes["target_size"],
        "negative_original_size": away["original_size"],
        "negative_crops_coords_top_left": away["crop_top_left"],
        "negative_target_size": away["target_size"],
    }
    expected = published(networks, SAMPLING, NEGATIVES[:1], **settings)
    found = drawn(networks, SAMPLING, NEGATIVES, sizes=sizes, negative_sizes=away)[:1]
    assert relative_error(found, expected) < 1e-4
    same = drawn(networks, SAMPLING, NEGATIVES, sizes=sizes, negative_sizes=sizes)[:1]
    assert relative_error(same, expected) > 1e-2


def published_refined(networks, sampling, latents, negatives, **settings):
    networks.refiner_pipeline.scheduler = scheduler(sampling)
    return networks.refiner_pipeline(
        PROMPTS,
        image=latents,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.refiner_scale,
        guidance_rescale=sampling.rescale,
        negative_prompt=negatives,
        original_size=SIZE,
        target_size=SIZE,
        aesthetic_score=sampling.aesthetic_score,
        negative_aesthetic_score=sampling.negative_aesthetic_score,
        output_type="pt",
        **settings,
    ).images


def drawn_by_both(networks, sampling, negatives):
    """Our pictures of base and refiner; None for no negative prompts, which the refiner takes for empty ones."""
    positive = told(networks, PROMPTS, PLAIN)
    negative = told(networks, negatives or [""] * len(PROMPTS), PLAIN)
    base = base_denoiser(networks.base, DIFFUSION, positive, negative if negatives else None, sampling)
    refiner = refiner_denoiser(networks.refiner, DIFFUSION, positive, negative, sampling)
    return decoded(networks, generate(base, refiner, NOISE, DIFFUSION, sampling, FRESH))


BOTH = replace(SAMPLING, refiner_scale=2.0, aesthetic_score=6.5, negative_aesthetic_score=2.0)


@pytest.mark.parametrize("negatives", [NEGATIVES, None], ids=["negative prompts", "none"])
@pytest.mark.parametrize(
    "sampling",
    [
        BOTH,
        replace(BOTH, spacing=Spacing.TRAILING),
        replace(BOTH, sampler=SamplerName.EULER_ANCESTRAL),
        replace(BOTH, sampler=SamplerName.DPMPP_2M, spacing=Spacing.TRAILING),
        replace(BOTH, sampler=SamplerName.DDIM, rescale=0.5),
    ],
    ids=lambda sampling: sampling.sampler.value,
)
def test_an_ensemble_hands_over_as_the_published_pipelines_do(networks, relative_error, sampling, negatives):
    sampling = replace(sampling, handover=700)
    latents = published(networks, sampling, negatives, denoising_end=0.3, output_type="latent")
    expected = published_refined(networks, sampling, latents, negatives, denoising_start=0.3)
    found = drawn_by_both(networks, sampling, negatives)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(drawn_by_both(networks, replace(sampling, aesthetic_score=2.0), negatives), found) > 1e-3


@pytest.mark.parametrize("sampler", SamplerName)
def test_a_refiner_by_sdedit_goes_back_over_the_bases_latents(networks, relative_error, asked, sampler):
    sampling = replace(BOTH, sampler=sampler, spacing=Spacing.LEADING, refiner="sdedit", strength=0.45)
    latents = published(networks, sampling, NEGATIVES, output_type="latent")
    asked["first"] = sampling.steps  # after the base's, whether it has asked for them or not
    expected = published_refined(networks, sampling, latents, NEGATIVES, strength=0.45)
    found = drawn_by_both(networks, sampling, NEGATIVES)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(found, drawn_by_both(networks, replace(sampling, strength=0.3), NEGATIVES)) > 1e-2


def test_an_image_to_image_run_of_the_base(networks, relative_error, monkeypatch):
    image, drawn_latents = gaussian(5, 0, 2, (3, *SIZE)).tanh(), gaussian(6, 0, 2, SHAPE)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *args, **settings: drawn_latents)
    networks.base_again.scheduler = scheduler(SAMPLING)
    expected = networks.base_again(
        PROMPTS,
        image=image,
        strength=0.6,
        num_inference_steps=SAMPLING.steps,
        guidance_scale=SAMPLING.scale,
        negative_prompt=NEGATIVES,
        original_size=SIZE,
        target_size=SIZE,
        output_type="pt",
    ).images
    with torch.no_grad():
        posterior = networks.vae.encode(image)
    latents = scale(posterior.mean, posterior.std, drawn_latents, VAE_CONFIG.scaling_factor)
    positive, negative = (told(networks, texts, PLAIN) for texts in (PROMPTS, NEGATIVES))
    levels = noise_levels(SAMPLING.steps, SAMPLING.spacing, DIFFUSION, sampler=SAMPLING.sampler).tail(0.6)
    base = base_denoiser(networks.base, DIFFUSION, positive, negative, SAMPLING)
    found = decoded(networks, sample(base, noised(latents, FRESH(0), levels), levels))
    assert relative_error(found, expected) < 1e-4


def test_sdedit_without_fresh_noise_is_an_error():
    def black(x, sigma, timestep):
        return torch.zeros_like(x)

    with pytest.raises(ValueError, match="needs step_noise"):
        generate(black, black, NOISE, DIFFUSION, replace(SAMPLING, refiner="sdedit"))


def test_a_score_among_the_conditions_comes_before_the_configs(networks):
    sampling = replace(BOTH, aesthetic_score=6.0, negative_aesthetic_score=2.0)
    plain = told(networks, PROMPTS, PLAIN)
    scores = {6.0: None, 2.0: None}

    def once(positive, negative):
        return refiner_denoiser(networks.refiner, DIFFUSION, positive, negative, sampling)(NOISE, 1.0, 100.0)

    for score in scores:
        column = torch.full((len(PROMPTS), 1), score)
        scores[score] = Told(plain.text, {**plain.conditions, Conditioning.AESTHETIC_SCORE: column})
    high, low = scores[6.0], scores[2.0]
    assert torch.equal(once(plain, plain), once(high, low))
    assert not torch.equal(once(plain, plain), once(low, high))
