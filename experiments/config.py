"""The configuration of an experiment: frozen dataclasses, checked before any work."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.sampling import Sample, Sampling, override, problems

ScheduleName = Literal[
    "linear", "quad", "const", "jsd", "warmup10", "warmup50", "cosine"
]


class ConfigError(ValueError):
    """A configuration that cannot be run."""


@dataclass(frozen=True)
class Data:
    """What to learn from."""

    source: str = "digits"
    """digits, cifar10, fashion_mnist, mnist, tfds:<name>, folder:<path>, npz:<path> or
    idx:<images>[,<labels>]."""
    path: str | None = None
    """Where the files are, when they are not in the usual place: a folder, or the
    official CIFAR-10 archive."""
    image_size: int = 8
    """Pixels a side. Smaller images are padded with black; those of a folder are
    cropped and resized."""
    channels: int = 1
    """1 for grey, 3 for RGB."""
    flip: bool = False
    """Whether half of the images are mirrored left to right, at random."""
    download: bool = True
    """Whether a missing official archive may be downloaded."""


@dataclass(frozen=True)
class Diffusion:
    """The forward process and what the network learns of it."""

    schedule: ScheduleName = "linear"
    """Noise schedule."""
    num_steps: int = 1000
    """T, diffusion steps."""
    beta_start: float = 1e-4
    """Variance of the first step; not used by const, jsd and cosine."""
    beta_end: float = 0.02
    """Variance of the last step; not used by jsd and cosine."""
    prediction: Literal["eps", "x0", "v", "mean"] = "eps"
    """What the network puts out."""
    loss: Literal["eps", "x0", "v", "mean", "vlb"] = "eps"
    """The coordinate of the mean squared error, or vlb: the variational bound."""
    variance: Literal["small", "large", "learned"] = "large"
    """Variance of the reverse steps; learned needs the loss vlb."""


@dataclass(frozen=True)
class Net:
    """The U-Net."""

    channels: int = 128
    """Width of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Width of each level in units of channels; each level halves the resolution."""
    blocks: int = 2
    """Residual blocks a level."""
    attention: tuple[int, ...] = (16,)
    """Resolutions (pixels a side) with attention; the middle always has one."""
    dropout: float = 0.1
    """Share of activations dropped in training."""
    groups: int = 32
    """Groups of every GroupNorm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters stay float32."""
    conv: Literal["auto", "xla", "matmul"] = "auto"
    """How a convolution is computed; auto is xla, but on CPU matmul where a
    gradient is taken inside a loop."""
    remat: bool = False
    """Whether to compute activations again instead of storing them."""


@dataclass(frozen=True)
class Optimizer:
    """Adam, and the average of the weights."""

    preset: Literal["official", "modern"] = "modern"
    """official: Adam with TensorFlow's epsilon, the gradient of each of `replicas`
    parts of the batch clipped by itself, a moving average without ramp. modern: Adam
    as published, the whole gradient clipped, an average whose decay rises."""
    learning_rate: float = 2e-4
    """After the warm-up."""
    warmup: int = 5000
    """Steps over which the rate rises from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the rate does after the warm-up: stay, or fall to 0 at the last step."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    replicas: int = 8
    """Parts of the batch that the official preset clips one by one: the TPU cores of
    the original."""
    ema_decay: float = 0.9999
    """Decay of the moving average a step."""


@dataclass(frozen=True)
class Train:
    """The run."""

    steps: int = 800_000
    """Updates to make in all."""
    stop_at: int | None = None
    """Step to stop at, with a checkpoint, before the run is complete; the same command
    without this goes on."""
    batch_size: int = 128
    """Images a step, over all devices and hosts."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to save memory."""
    seed: int = 0
    """Of the initial weights, the order of the data and the noise."""
    parallel: Literal["mesh", "pmap", "shard_map"] = "mesh"
    """How a step is spread over the devices."""
    devices: int | None = None
    """How many devices to use; all that there are when not given."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl, each the mean since the last."""
    checkpoint_every: int = 10_000
    """Steps between two checkpoints; the last step always has one."""
    keep: int = 3
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class Config:
    """An experiment."""

    name: str = "digits"
    """Name of the run: everything goes to <output>/<name>."""
    output: str = "runs"
    """Folder of all runs."""
    data: Data = field(default_factory=Data)
    diffusion: Diffusion = field(default_factory=Diffusion)
    net: Net = field(default_factory=Net)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)


# Fields that may differ between the run that wrote a checkpoint and the one that goes
# on from it: they change what is shown or how fast, not what is learned. (train.steps
# too, unless the learning rate falls towards the last step.)
MAY_CHANGE = (
    "name",
    "output",
    "data.path",
    "data.download",
    "net.conv",
    "net.remat",
    "train.stop_at",
    "train.parallel",
    "train.devices",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "sample",
)


def replace(config: Config, section: str, **fields: Any) -> Config:
    """Returns the configuration with fields of one section changed.

    >>> replace(Config(), "train", batch_size=32).train.batch_size
    32
    """
    changed = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: changed})


def with_sampling(config: Config, sampling: Sampling) -> Config:
    """Returns the configuration with another way to sample.

    Raises:
      ConfigError: a value out of range.
    """
    chosen = override(config.sample, sampling)
    changed = dataclasses.replace(config, sample=chosen)
    try:
        validate(changed)
    except ConfigError as error:
        # What training calls --sample.eta is --eta where samples are drawn.
        raise ConfigError(str(error).replace("--sample.", "--")) from None
    return changed


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON has it (tuples are lists)."""
    return typing.cast(dict[str, Any], _jsonable(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], cls: Any = Config) -> Any:
    """Returns the configuration that `to_dict` wrote.

    Raises:
      ConfigError: a key that no field has, a field without a key, or an unknown name,
        as when another version wrote it.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"the fields of {cls.__name__} must be among {', '.join(hints)}; got "
            f"{', '.join(unknown)}. Read the file with the version that wrote it."
        )
    missing = sorted(set(hints) - set(values))
    if missing:
        raise ConfigError(
            f"all fields of {cls.__name__} must be there; got none of "
            f"{', '.join(missing)}. Read the file with the version that wrote it."
        )
    fields = {}
    for key, value in values.items():
        allowed = _names(hints[key])
        if allowed and value not in allowed:
            raise ConfigError(
                f"{key} must be one of {', '.join(map(str, allowed))}; got {value!r}. "
                "Read the file with the version that wrote it."
            )
        if dataclasses.is_dataclass(hints[key]):
            fields[key] = from_dict(value, hints[key])
        else:
            fields[key] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


def differences(old: Config, new: Config) -> list[str]:
    """Returns what differs, of the fields that must not, as 'field: old -> new'."""
    may: tuple[str, ...] = MAY_CHANGE
    if new.optimizer.decay == "constant":
        may += ("train.steps",)
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    return [
        f"{key}: {before.get(key)} -> {after[key]}"
        for key in after
        if before.get(key) != after[key]
        and key not in may
        and key.split(".")[0] not in may
    ]


def validate(config: Config) -> None:
    """Raises ConfigError where a value is out of range or two do not fit together."""
    for key, value in _flat(to_dict(config)).items():
        low = _AT_LEAST.get(key)
        if low is not None and value is not None and not value >= low:
            _fail(key, f"at least {low}", value)
    data, diffusion, net = config.data, config.diffusion, config.net
    train, optimizer = config.train, config.optimizer
    if not config.name or "/" in config.name or config.name.startswith("."):
        _fail("name", "a plain folder name", repr(config.name))
    if data.channels not in (1, 3):
        _fail("data.channels", "1 or 3", data.channels)
    factor = 2 ** (len(net.multipliers) - 1)
    if not net.multipliers or data.image_size % factor:
        _fail(
            "data.image_size",
            f"a multiple of {factor}, since there are {len(net.multipliers)} levels",
            data.image_size,
        )
    for multiplier in net.multipliers:
        if multiplier < 1 or net.channels * multiplier % net.groups:
            _fail(
                "net.channels times each of net.multipliers",
                f"a multiple of net.groups = {net.groups}",
                net.channels * multiplier,
            )
    sides = {data.image_size // 2**i for i in range(len(net.multipliers))}
    for side in net.attention:
        if side not in sides:
            _fail("net.attention", f"among the resolutions {sorted(sides)}", side)
    if not 0 <= net.dropout < 1:
        _fail("net.dropout", "at least 0 and below 1", net.dropout)
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        ends = f"{diffusion.beta_start} and {diffusion.beta_end}"
        _fail("diffusion.beta_start and beta_end", "0 < start <= end < 1", ends)
    if config.sample.variance == "learned" and diffusion.variance != "learned":
        _fail("sample.variance", "one that the network was trained for", "learned")
    for name, must, got in problems(config.sample):
        _fail(f"sample.{name}", must, got)
    if diffusion.variance == "learned" and diffusion.loss != "vlb":
        _fail("diffusion.loss", "vlb where the variance is learned", diffusion.loss)
    for name in ("ema_decay", "b2"):
        value = getattr(optimizer, name)
        if not 0 <= value < 1:
            _fail(f"optimizer.{name}", "at least 0 and below 1", value)
    for name in ("learning_rate", "clip_norm"):
        value = getattr(optimizer, name)
        if not (value > 0 and math.isfinite(value)):
            _fail(f"optimizer.{name}", "above 0 and finite", value)
    if optimizer.decay == "cosine" and optimizer.warmup >= train.steps:
        _fail(
            "optimizer.warmup", f"below train.steps = {train.steps}", optimizer.warmup
        )
    if optimizer.preset == "official" and train.accumulate != 1:
        _fail(
            "train.accumulate",
            "1 with the official preset, which cuts the batch into "
            "optimizer.replicas parts already",
            train.accumulate,
        )
    parts = micro_batches(config)
    if train.batch_size % parts:
        _fail("train.batch_size", f"a multiple of {parts}", train.batch_size)
    if config.sample.steps is not None and config.sample.steps > diffusion.num_steps:
        _fail(
            "sample.steps",
            f"at most diffusion.num_steps = {diffusion.num_steps}",
            config.sample.steps,
        )


def require_positive(options: Any, *names: str) -> None:
    """Raises ConfigError where one of a command's options is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            _fail(name, "at least 1", value)


def micro_batches(config: Config) -> int:
    """Returns the number of parts that a batch is cut into, on one device."""
    if config.optimizer.preset == "official":
        return config.optimizer.replicas
    return config.train.accumulate


_AT_LEAST = {
    "data.image_size": 4,
    "diffusion.num_steps": 2,
    "net.channels": 4,
    "net.blocks": 1,
    "net.groups": 1,
    "optimizer.warmup": 0,
    "optimizer.replicas": 1,
    "train.steps": 1,
    "train.stop_at": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.devices": 1,
    "train.seed": 0,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.keep": 1,
    "sample.every": 1,
    "sample.count": 1,
    "sample.steps": 1,
}


def _fail(key: str, must: str, got: object) -> typing.NoReturn:
    flags = key.replace("_", "-")
    raise ConfigError(f"{key} must be {must}; got {got}. Change it with --{flags}.")


def _names(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal, or a Literal or None, allows; none for other types."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return parts
    named = [_names(part) for part in parts if typing.get_origin(part) is Literal]
    return (*named[0], None) if named else ()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
