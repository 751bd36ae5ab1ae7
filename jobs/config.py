"""What each job is: one strict class per job; those that train are in training_config.py. All checks that can be made
before anything starts are made here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Gt, Le
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.checks import (
    check_encode,
    check_fits_text,
    check_generate,
    check_lpips,
    check_outputs,
    check_preset,
    check_scores,
    check_scoring,
    check_sources,
    check_text,
)
from model.config import (
    SSIM_WINDOW,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    Conditioning,
    DiffusionConfig,
)
from pipelines.capacity import CPUPool, GPUPool, PlannedStage, Store
from pipelines.config import (
    Count,
    CropConfig,
    DriverConfig,
    Positive,
    RetentionConfig,
    SourceConfig,
    StageResources,
    TextWeightsConfig,
    TrackingConfig,
    WeightsConfig,
    all_sources,
)
from pipelines.evaluate.config import EvaluateConfig, GenerateConfig, ReconstructConfig
from pipelines.preprocess.config import (
    AlertConfig,
    BucketConfig,
    EncodeConfig,
    FilterConfig,
    ScoringConfig,
)
from pipelines.storage import StorageOptions


class RayConfig(BaseModel):
    """The cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    """Address of a running cluster, "auto" for this machine's; None joins the one that the job was submitted to (or
    RAY_ADDRESS), and else starts one for the job."""
    cpus: Count | None = None
    """CPU cores of a cluster that is started here; None takes all."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that the job's work runs on, and of those that it makes an autoscaler start; none: any."""


class Job(BaseModel):
    """What every job can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    TRACKS: ClassVar[bool] = True  # whether it tells MLflow of its runs

    storage: StorageOptions = Field(default_factory=StorageOptions)
    """How to reach S3."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""
    ray: RayConfig = Field(default_factory=RayConfig)
    """Ray."""


class PreprocessJob(Job):
    """Images to index, and index to latents."""

    stages: tuple[Literal["index", "latents"], ...] = ("index", "latents")
    """Which of the two to bring up to date."""
    source: SourceConfig | None = None
    """Where the images are."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of `source`, several, each with a name of its own."""
    index: str
    """Folder of the index dataset."""
    latents: str | None = None
    """Folder of the latents dataset; needed by the latents stage."""
    filters: FilterConfig = Field(default_factory=FilterConfig)
    """What is rejected."""
    scoring: ScoringConfig | None = None
    """The networks whose scores the index stage computes; None computes none."""
    alerts: AlertConfig = Field(default_factory=AlertConfig)
    """When the index stage asks for a person."""
    buckets: BucketConfig = Field(default_factory=BucketConfig)
    """The sizes that images are brought to."""
    crop: CropConfig = Field(default_factory=CropConfig)
    """Where the crop lies."""
    vae: WeightsConfig = Field(default_factory=lambda: WeightsConfig(preset="sdxl"))
    """The VAE that encodes; the latents stage needs its path."""
    text: TextWeightsConfig = Field(default_factory=TextWeightsConfig)
    """The text encoders."""
    encode: EncodeConfig = Field(default_factory=EncodeConfig)
    """How the latents stage encodes."""
    tasks: StageResources = Field(default_factory=StageResources)
    """One task of the CPU stages."""
    driver: DriverConfig = Field(default_factory=DriverConfig)
    """The process that lists, plans and commits."""
    index_rows_per_file: Count = 1024
    """Images per task and per Parquet file of the index."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The source, or the sources."""
        return all_sources(self.source, self.sources)

    @model_validator(mode="after")
    def _check(self) -> Self:
        from pipelines.preprocess.bucket import bucket_table

        if not self.stages:
            raise ValueError("stages: name index, latents or both")
        least, most = self.alerts.reject_share
        if least > most:
            raise ValueError(f"alerts.reject_share: at least {least:g} and at most {most:g}")
        if not bucket_table(self.buckets):
            raise ValueError("buckets.table: has no size")
        check_sources("", self.source, self.sources)
        check_outputs({"index": self.index, "latents": self.latents}, self.all_sources)
        shortest, longest = self.filters.min_caption_characters, self.filters.max_caption_characters
        if shortest > longest:
            raise ValueError(f"filters.max_caption_characters: {longest} is below min_caption_characters, {shortest}")
        check_scoring("scoring", self.scoring)
        check_scores("filters.scores", self.filters.scores, self.all_sources, computed=self.scoring is not None)
        check_preset("vae.preset", self.vae.preset, VAE_PRESETS)
        if "latents" in self.stages:
            check_text("text", self.text)
        if "latents" in self.stages and self.latents is None:
            raise ValueError("latents: the latents stage needs a folder to write to")
        if ("latents" in self.stages) and self.vae.path is None:
            raise ValueError("vae.path: the latents stage needs a trained VAE")
        multiple, down = self.buckets.multiple, VAE_PRESETS[self.vae.preset].downsample
        if multiple % down:
            raise ValueError(f"buckets.multiple: {multiple} is not a multiple of vae.preset's reduction, {down}")
        for size in bucket_table(self.buckets):
            for side in size:
                if side % multiple:
                    raise ValueError(f"buckets: side {side} of {size[0]} x {size[1]} is not a multiple of {multiple}")
        check_encode(self.encode, self.crop, down)
        return self


class GenerateJob(Job):
    """Make pictures."""

    output: str
    """Folder of the pictures."""
    generate: GenerateConfig
    """Networks, prompts and settings."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_generate("generate", self.generate)
        return self


class EvaluateJob(Job):
    """Measure a trained network, or each checkpoint of a run as it appears."""

    output: str
    """Folder of the figures and of what was made for them; the same command on it measures what is missing."""
    evaluate: EvaluateConfig
    """What is measured, and how."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        config = self.evaluate
        needed, other = ("reconstruct", "generate") if config.network == "vae" else ("generate", "reconstruct")
        if getattr(config, needed) is None or getattr(config, other) is not None:
            raise ValueError(f"evaluate.{needed}: the {config.network} is measured by it, and by no evaluate.{other}")
        check_sources("evaluate.", config.source, config.sources)
        if config.lpips is not None:
            check_lpips("evaluate.lpips", config.lpips)
        for name, resources in (("resources", config.resources), ("generate.resources", config.generate)):
            pool = resources.resources if isinstance(resources, GenerateConfig) else resources
            if pool is not None and pool.workers[0] > pool.workers[1]:
                raise ValueError(f"evaluate.{name}.workers: at least {pool.workers[0]} and at most {pool.workers[1]}")
        if config.generate is not None:
            self._check_pictures(config.generate)
        if config.reconstruct is not None:
            self._check_vae(config.reconstruct)
        if config.watch and (config.weights.path or "").endswith(".safetensors"):
            raise ValueError(f"evaluate.watch: {config.weights.path} is a file, and no run's folder")
        if config.weights.path == self.output:
            raise ValueError(f"output: {self.output} is the folder of what is measured; choose another")
        return self

    def _check_pictures(self, generate: GenerateConfig) -> None:
        check_generate("evaluate.generate", generate)
        if generate.prompts.index is None:
            raise ValueError("evaluate.generate.prompts.index: is missing; pictures are compared with its images")
        if self.evaluate.network == "refiner" and generate.refiner is None:
            raise ValueError("evaluate.generate.refiner: is missing, and is what is measured")
        if self.evaluate.inception is None and self.evaluate.clip is None:
            raise ValueError("evaluate: name the weights of inception, of clip, or of both")

    def _check_vae(self, reconstruct: ReconstructConfig) -> None:
        check_preset("evaluate.reconstruct.vae.preset", reconstruct.vae.preset, VAE_PRESETS)
        if reconstruct.vae.path is None:
            raise ValueError("evaluate.reconstruct.vae.path: is missing, and is what is measured")
        down = VAE_PRESETS[reconstruct.vae.preset].downsample
        if any(side % down or side < SSIM_WINDOW for side in reconstruct.size):
            raise ValueError(
                f"evaluate.reconstruct.size: {reconstruct.size} has no multiples of {down} from {SSIM_WINDOW} on"
            )


class ExportJob(Job):
    """Write a trained model in a public layout. Needs no Ray, and starts none."""

    TRACKS: ClassVar[bool] = False

    output: str
    """What is written: a .safetensors file, or a folder for "diffusers"; local or s3://. Nothing may be there yet."""
    layout: Literal["single_file", "diffusers"]
    """One file that holds every network, or a diffusers pipeline's folder."""
    unet: WeightsConfig
    """The base or the refiner; a training run's folder, or one of its checkpoints, offers its averaged weights."""
    vae: WeightsConfig
    """The VAE."""
    text: TextWeightsConfig
    """The text encoders; a refiner needs bigg alone."""
    diffusion: DiffusionConfig | None = None
    """The noise schedule; None takes the one that the U-Net's file says it was trained with, or else the published."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the written weights."""
    resolution: Count = 1024
    """Side of the pictures that a diffusers pipeline makes where none is asked for, pixels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_preset("unet.preset", self.unet.preset, UNET_PRESETS)
        check_preset("vae.preset", self.vae.preset, VAE_PRESETS)
        check_preset("text.preset", self.text.preset, TEXT_PRESETS)
        unet = UNET_PRESETS[self.unet.preset]
        check_fits_text("unet.preset", unet, self.text)
        for name in ("unet", "vae"):
            if getattr(self, name).path is None:
                raise ValueError(f"{name}.path: is missing; an export needs trained weights")
        text, refiner = self.text, Conditioning.AESTHETIC_SCORE in unet.conditioning
        named = text.bigg is not None and (refiner or text.clip_l is not None)
        if (text.seed is None and not named) or (text.seed is not None and (text.clip_l or text.bigg)):
            needed = "bigg" if refiner else "both clip_l and bigg"
            raise ValueError(f"text: name {needed}, or give a seed for random weights")
        if self.output.endswith(".safetensors") != (self.layout == "single_file"):
            expected = "a .safetensors file" if self.layout == "single_file" else "a folder"
            raise ValueError(f"output: {self.output} is no name of {expected}, which layout {self.layout!r} writes")
        reduction = VAE_PRESETS[self.vae.preset].downsample * unet.downsample
        if self.resolution % reduction:
            raise ValueError(
                f"resolution: {self.resolution} is not a multiple of {reduction}, the reduction of VAE and U-Net"
            )
        return self


class PlanJob(Job):
    """Work out hours, nodes, storage and money of a training, stage by stage. Starts nothing."""

    TRACKS: ClassVar[bool] = False

    images: Count
    """Images of the source."""
    kept_share: Annotated[float, Gt(0), Le(1)]
    """Share that the filters keep."""
    image_bytes: Count
    """Mean size of an image's file, bytes."""
    image_megapixels: Positive
    """Mean size of an image, 10^6 pixels."""
    stages: tuple[PlannedStage, ...]
    """What runs, in order."""
    cpu: CPUPool
    """Machines that decode."""
    encode_gpu: GPUPool
    """GPUs of the latents stage."""
    train_gpu: GPUPool
    """GPUs of training."""
    store: Store
    """Where images, datasets and checkpoints lie."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.stages:
            raise ValueError("stages: name at least one")
        for number, stage in enumerate(self.stages):
            trains = stage.kind not in ("index", "latents")
            if trains != bool(stage.images_seen):
                raise ValueError(f"stages.{number}.images_seen: is {stage.images_seen} for {stage.kind!r}")
            if stage.resolution % 64:
                raise ValueError(f"stages.{number}.resolution: {stage.resolution} is not a multiple of 64")
        return self


class CleanJob(Job):
    """Find what nothing needs any more, and remove it if told to. Needs no Ray, and starts none."""

    TRACKS: ClassVar[bool] = False

    datasets: tuple[str, ...] = ()
    """Folders of indexes and latents, local or s3://."""
    runs: tuple[str, ...] = ()
    """Outputs of training runs; the versions of datasets that they read stay."""
    evaluations: tuple[str, ...] = ()
    """Outputs of jobs.evaluate: the versions of indexes that they measure on stay. Nothing is removed there."""
    pictures: tuple[str, ...] = ()
    """Outputs of jobs.generate."""
    keep: RetentionConfig = Field(default_factory=RetentionConfig)
    """What stays."""
    apply: bool = False
    """Whether to remove what is found; it is listed otherwise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.datasets or self.runs or self.pictures):
            raise ValueError("datasets, runs, pictures: name at least one folder")
        return self


class DemoJob(Job):
    """The whole pipeline on rendered pictures."""

    output: str = "demo-output"
    """Folder of everything that the demo makes."""
    preset: Literal["cpu", "gpu"] = "cpu"
    """Folder below jobs/configs/demo/ with the configuration of each stage."""
    images: Count | None = None
    """Pictures to render; None takes the preset's number."""
    image_pixels: Count | None = None
    """Longest side of the largest picture, pixels; None takes the preset's."""
