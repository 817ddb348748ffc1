"""The configuration of an experiment: frozen dataclasses, to and from JSON."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.facts import (
    FREE,
    HOW,
    SHAPE,
    Count,
    Entries,
    Must,
    Positive,
    Seed,
    Share,
    Whole,
    between,
    marked,
)
from diffusion_jax.lab.schema.few import Few
from diffusion_jax.lab.schema.json_fields import flat, read
from diffusion_jax.lab.schema.sampling import Sample

ScheduleName = Literal[
    "linear",
    "quad",
    "const",
    "jsd",
    "warmup10",
    "warmup50",
    "cosine",
    "sigmoid",
    "vp",
    "sub_vp",
    "ve",
    "continuous_cosine",
    "flow",
    "learned",
]
CONTINUOUS = ("vp", "sub_vp", "ve", "continuous_cosine", "flow", "learned")
GIVEN = "given:"
"""Prefix of the source of images given in memory; their digest follows."""
RESIZED = ("folder:", "hf:")
"""How the sources begin whose images are cut and resized to what is wanted."""
UNKNOWN = "unknown"
"""Source of the data where a network came without saying it."""
# The bounds of fields are beyond every serious network, and still traced in seconds: a
# file from elsewhere may ask for a network that takes all time or memory to trace.
FEWEST_STEPS, MOST_STEPS = 2, 1_000_000
MOST_CLASSES = 1_000_000


def _are_sides(size: int | tuple[int, ...]) -> bool:
    sides = size if isinstance(size, tuple) else (size, size)
    return len(sides) == 2 and all(4 <= side <= 4096 for side in sides)


_SIDES = Must("one side or height and width, from 4 to 4096", _are_sides)


@dataclass(frozen=True)
class Data:
    """What to learn from."""

    source: str = "digits"
    """digits, cifar10, fashion_mnist, mnist, tfds:<name>, folder:<path> (a folder or a
    zip; with net.classes a subfolder is a class, unless dataset.json says them),
    hf:<path>[,<column of labels>] (Parquet files), npz:<path> or
    idx:<images>[,<labels>]."""
    path: Annotated[str | None, FREE] = None
    """Where the files are, when they are not in the usual place: a folder, or the
    official CIFAR-10 archive."""
    image_size: Annotated[int | tuple[int, int], _SIDES] = 8
    """Pixels a side; or two numbers, height and width. Smaller images are padded with
    black; those of a folder are cut to that shape and resized."""
    channels: Annotated[int, Must("1 or 3", lambda n: n in (1, 3)), SHAPE] = 1
    """1 for grey, 3 for RGB."""
    flip: bool = False
    """Whether to mirror half of the images, left to right."""
    random_crop: Whole = 0
    """Pixels a side by which images are loaded larger, to be cut to image_size at a
    random place each time (random crop); what is measured takes the middle. Of folder
    and hf."""
    rotate: Annotated[float, between(0, 180)] = 0.0
    """Degrees by which an image is turned at most, either way, at random; what was
    outside is mirrored into the corners."""
    hold_out: Share = 0.0
    """Share of images held out of training; always the same ones. Their loss is in
    metrics.jsonl, and other commands take them for the test images."""
    download: Annotated[bool, FREE] = True
    """Whether a missing official archive may be downloaded."""
    skip_unreadable: bool = False
    """Whether the files of a folder that cannot be read are left out, and counted."""
    latent: str | None = None
    """Autoencoder in whose latents the network learns (latent diffusion): a run, or a
    folder of diffusers' AutoencoderKL."""
    latent_draw: Literal["sample", "mode"] = "sample"
    """Which latents of an image: drawn anew at each step, or always their mean."""

    def __post_init__(self) -> None:
        """Makes (n, n) the number n, so that equal sizes compare equal."""
        size = self.image_size
        if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1]:
            object.__setattr__(self, "image_size", size[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns height, width and channels of an image."""
        size = self.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width, self.channels

    @property
    def loaded(self) -> tuple[int, int, int]:
        """Returns the shape of an image in a batch, before it is cut to `shape`."""
        height, width, channels = self.shape
        more = self.random_crop if self.source.startswith(RESIZED) else 0
        return height + more, width + more, channels


@dataclass(frozen=True)
class Diffusion:
    """The forward process and what the network learns of it."""

    schedule: ScheduleName = "linear"
    """Noise schedule. From vp on they are continuous: the network learns at real times,
    samples and bounds are made on a chain of num_steps. learned is that of VDM, and is
    trained with the network."""
    num_steps: Annotated[int, between(FEWEST_STEPS, MOST_STEPS)] = 1000
    """T, diffusion steps."""
    beta_start: float = 1e-4
    """Variance of the first step; of linear, quad and the warm-ups."""
    beta_end: float = 0.02
    """Variance of the last step; of linear, quad, const and the warm-ups."""
    sigma_min: float = 0.002
    """Smallest sigma of ve."""
    sigma_max: float = 80.0
    """Largest sigma of ve."""
    logsnr_shift: Annotated[float, between(-100, 100)] = 0.0
    """Added to the log-SNR at every time: 2 log(64 / image size) for the shifted cosine
    of images larger than 64."""
    prediction: Literal["eps", "x0", "v", "score", "mean", "edm", "velocity"] = "eps"
    """What the network puts out. edm is preconditioned; velocity is eps - x0."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data, for edm."""
    loss: Literal[
        "eps", "x0", "v", "score", "mean", "edm", "velocity", "vlb", "hybrid"
    ] = "eps"
    """The coordinate of the mean squared error; or vlb, the variational bound (of a
    continuous schedule that in continuous time); or hybrid: eps, and a little of the
    bound that reaches only the learned variance."""
    weighting: Literal["simple", "min_snr", "p2", "sigmoid", "edm"] = "simple"
    """Of the loss eps, as a function of log-SNR; simple is 1 everywhere."""
    weighting_value: float | None = None
    """gamma of min_snr (5 when not given) and of p2 (1), bias of sigmoid (-3)."""
    variance: Literal["small", "large", "learned", "range"] = "large"
    """Variance of the reverse steps. learned and range, between small and large in
    logarithms, need the loss vlb or hybrid."""
    spread: Literal["uniform", "low_discrepancy", "antithetic"] = "uniform"
    """How the times of a batch are spread: each on its own, evenly, or in pairs."""
    density: Literal["uniform", "importance", "log_normal", "logit_normal"] = "uniform"
    """Distribution of the times: uniform; more of those with a large loss (discrete
    schedules); log-normal noise or logit-normal times (continuous schedules)."""


# In float32 2^24 x has no fraction left, and its sine is 0.
_Octave = Annotated[int, between(0, 23)]


@dataclass(frozen=True)
class Net:
    """The U-Net."""

    channels: Annotated[int, between(4, 4096), SHAPE] = 128
    """Width of the first level."""
    multipliers: Annotated[tuple[int, ...], Entries(12), SHAPE] = (1, 2, 2, 2)
    """Width of each level in units of channels; each level halves the resolution."""
    blocks: Annotated[int, between(1, 64), SHAPE] = 2
    """Residual blocks a level."""
    attention: Annotated[tuple[int, ...], Entries(12)] = (16,)
    """Resolutions (pixels of the shorter side) with attention; the middle always has
    one."""
    dropout: Share = 0.1
    """Share of activations dropped in training."""
    groups: Annotated[Count, SHAPE] = 32
    """Groups of every GroupNorm."""
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], HOW] = "float32"
    """Type of the activations. Parameters, statistics, loss, optimizer and averages are
    float32 in any case. float64 takes JAX_ENABLE_X64=1 in training; to sample exactly
    or to compress, every network is evaluated in it, however it was trained."""
    conv: Annotated[Literal["auto", "xla", "matmul"], HOW, FREE] = "auto"
    """How a convolution is computed; auto is xla, but on CPU matmul where a
    gradient is taken inside a loop."""
    remat: Annotated[bool, HOW, FREE] = False
    """Whether to compute activations again in the backward pass instead of storing
    them (rematerialisation)."""
    classes: Annotated[int, between(0, MOST_CLASSES), SHAPE] = 0
    """Classes to condition on; 0 for none. The data must have as many labels."""
    label_dropout: Annotated[Share, SHAPE] = 0.1
    """With classes: share of labels left out in training, so that the network can also
    do without, as classifier-free guidance (CFG) asks of it."""
    variant: Annotated[Literal["official", "diffusers"], SHAPE] = "official"
    """Whose constants: those of the authors' code, or the defaults of diffusers, for
    networks that were trained with them."""
    fourier: Annotated[tuple[_Octave, ...], Entries(32), SHAPE] = ()
    """With each n the network also sees sin and cos of 2^n pi x: fine detail, for the
    bound."""


_Length = Annotated[float, Must("above 0 and at most 0.28", lambda n: 0 < n <= 0.28)]


@dataclass(frozen=True)
class Optimizer:
    """Adam, and the average of the weights (EMA)."""

    preset: Literal["official", "modern"] = "modern"
    """official: Adam with TensorFlow's epsilon, the gradient of each of `replicas`
    parts of the batch clipped by itself, a moving average without ramp. modern: Adam
    as published, the whole gradient clipped, an average whose decay rises."""
    learning_rate: Positive = 2e-4
    """Learning rate after the warm-up."""
    warmup: Whole = 5000
    """Steps over which the rate rises from 0; at most a quarter of the run."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the rate does after the warm-up: stay, or fall to 0 at the last step."""
    b2: Share = 0.999
    """Adam's decay of the second moment."""
    clip_norm: Positive = 1.0
    """Largest global norm of the gradient."""
    replicas: Count = 8
    """Parts of the batch that the official preset clips one by one: the TPU cores of
    the original."""
    ema_decay: tuple[Share, ...] = (0.9999,)
    """Decay of the moving average (EMA) a step; of several, the first is the one to
    sample from."""
    ema_lengths: tuple[_Length, ...] = ()
    """Lengths of power-function averages beside them, as shares of the run: 0.05 0.1,
    say."""
    ema_snapshots: Whole = 0
    """Steps between two snapshots of the power-function averages, from which an average
    of any length can be made afterwards; 0 for none."""


@dataclass(frozen=True)
class Train:
    """The run."""

    steps: Count = 800_000
    """Updates to make in all."""
    epochs: Annotated[Positive | None, FREE] = None
    """In place of steps: how often every image is seen."""
    stop_at: Annotated[Count | None, FREE] = None
    """Step to stop at, with a checkpoint; the same command without this goes on
    (resumes)."""
    batch_size: Annotated[int, between(1, 2**20)] = 128
    """Images a step, over all devices and hosts."""
    accumulate: Count = 1
    """Micro-batches of a batch, to save memory (gradient accumulation)."""
    seed: Seed = 0
    """Of the initial weights, the order of the data and the noise."""
    parallel: Annotated[Literal["mesh", "pmap", "shard_map"], FREE] = "mesh"
    """How a step is spread over the devices."""
    devices: Annotated[Count | None, FREE] = None
    """How many devices to use; all that there are when not given."""
    fsdp: Annotated[Count, FREE] = 1
    """Devices that share one copy of parameters, moments and averages; 1 for a copy on
    every device."""
    input: Annotated[Literal["auto", "device", "grain", "host"], FREE] = "auto"
    """Where batches come from: images that stay on the device; grain, which prepares
    them in the background; or the host, just before each step. auto is the device
    where the images fit, else grain where it is installed."""
    log_every: Annotated[Count, FREE] = 100
    """Steps between two lines of metrics.jsonl, each the mean since the last."""
    checkpoint_every: Annotated[Count, FREE] = 10_000
    """Steps between two checkpoints; the last step always has one."""
    keep: Annotated[Count, FREE] = 3
    """How many of the newest checkpoints stay; so does the one of the lowest loss, or
    distance where that is measured."""
    keep_every: Annotated[Count | None, FREE] = None
    """Checkpoints of steps that are multiples of it stay for good."""
    measure_every: Annotated[Count | None, FREE] = None
    """Steps between two measurements of how far samples are from the images (FID, or
    the distance by a classifier, as eval_fid says); a multiple of checkpoint_every.
    Results go to eval/results.jsonl, and the checkpoint of the lowest stays."""
    measure_count: Annotated[Count, FREE] = 2500
    """Samples of each measurement; more than the extractor has features."""
    tensorboard: Annotated[bool, FREE] = False
    """Whether to write metrics and grids of samples for TensorBoard too, into the run's
    folder."""
    max_skipped: Annotated[Count, FREE] = 20
    """Steps skipped in a row, as not finite, at which the run is given up."""
    deterministic: Annotated[bool, FREE] = False
    """Whether a GPU computes the same bits in every run, by XLA's flag
    xla_gpu_deterministic_ops: slower, and without autotuning. On a CPU they are the
    same without it."""


@dataclass(frozen=True)
class Config:
    """An experiment."""

    name: Annotated[str, FREE] = "digits"
    """Name of the run: everything goes to <output>/<name>."""
    output: Annotated[str, FREE] = "runs"
    """Folder of all runs."""
    init_from: str | None = None
    """Trained weights to start from: a run, .safetensors, or a folder of diffusers.
    What the network is, and what it learns, are then as there where nothing else is
    said."""
    data: Data = field(default_factory=Data)
    diffusion: Diffusion = field(default_factory=Diffusion)
    few: Few = field(default_factory=Few)
    net: Net = field(default_factory=Net)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    sample: Annotated[Sample, FREE] = field(default_factory=Sample)


class Experiment(NamedTuple):
    """An experiment, and what its file says of it."""

    config: Config
    doc: str


# Fields of earlier versions, whose values changed no number: they are ignored.
RETIRED = {"net": ("fuse", "kernels", "dropout_bits"), "optimizer": ("flat",)}


def replace(config: Config, section: str, **fields: Any) -> Config:
    """Returns the configuration with fields of one section changed.

    >>> replace(Config(), "train", batch_size=32).train.batch_size
    32
    """
    changed = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: changed})


def warmup(config: Config) -> int:
    """Returns the steps of the warm-up: those asked for, or a quarter of a short run.

    >>> warmup(Config()), warmup(replace(Config(), "train", steps=400))
    (5000, 100)
    """
    return min(config.optimizer.warmup, config.train.steps // 4)


def with_epochs(config: Config, images: int) -> Config:
    """Returns the configuration with its epochs turned into steps.

    >>> with_epochs(replace(Config(), "train", epochs=2.5), 1000).train.steps
    20
    """
    plan = config.train
    if plan.epochs is None:
        return config
    steps = max(1, math.ceil(plan.epochs * images / plan.batch_size))
    return replace(config, "train", steps=steps)


def official(config: Config) -> Config:
    """Returns the configuration with the arithmetic of the authors' code.

    float32 throughout, TensorFlow's Adam, the gradient of each of eight parts of a
    batch clipped by itself, and a moving average without a ramp.

    >>> found = official(Config())
    >>> found.net.dtype, found.optimizer.preset, found.optimizer.replicas
    ('float32', 'official', 8)
    """
    config = replace(config, "net", dtype="float32")
    return replace(config, "optimizer", preset="official")


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries for JSON (tuples are lists)."""

    def fields(values: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values}

    return dataclasses.asdict(config, dict_factory=fields)


def from_dict(values: Any) -> Config:
    """Returns the configuration that `to_dict` wrote; missing fields have defaults.

    Raises:
      ConfigError: a key that no field has, an unknown name, or values of another type
        than their fields, all of which are named: as when another version wrote them,
        or the file is damaged.

    >>> from_dict({"net": {"blocks": None}})
    Traceback (most recent call last):
    diffusion_jax.errors.ConfigError: each value of Config must be of its field's type;
    got net.blocks null, not a whole number. Correct the file, restore it, or read it
    with the version that wrote it.
    """
    for name, gone in RETIRED.items():
        if isinstance(values, dict) and isinstance(values.get(name), dict):
            kept = {key: v for key, v in values[name].items() if key not in gone}
            values = values | {name: kept}
    found, wrong = read(values, Config)
    if wrong:
        said = "; ".join(f"{key} {got}, not {must}" for key, must, got in wrong)
        raise ConfigError(
            f"each value of Config must be of its field's type; got {said}. Correct "
            "the file, restore it, or read it with the version that wrote it."
        )
    config: Config = found
    return config


def differences(old: Config, new: Config) -> list[str]:
    """Returns the fields that must not differ and do, as 'field: old -> new'."""
    return [
        f"{key}: {before} -> {after}"
        for key, (before, after) in changed(old, new).items()
        if key != "train.steps"
    ]


def changed(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the old and new values, as JSON, of what differs and alters training."""
    free = {*marked(Config, FREE)}
    if new.optimizer.decay == "constant":  # which does not depend on the last step
        free.add("train.steps")
    before, after = flat(to_dict(old)), flat(to_dict(new))
    return {
        key: (before[key], value)
        for key, value in after.items()
        if before[key] != value and not {key, key.split(".")[0]} & free
    }


def micro_batches(config: Config) -> int:
    """Returns the number of micro-batches of a batch, on one device."""
    if config.optimizer.preset == "official":
        return config.optimizer.replicas
    return config.train.accumulate
