"""What a configuration must hold, checked before any work."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema.config import (
    CONTINUOUS,
    Config,
    Diffusion,
    flat,
    micro_batches,
    to_dict,
)
from diffusion_jax.lab.schema.sampling import Sampling, override, problems, resolve

AT_LEAST = {
    "data.image_size": 4,
    "diffusion.num_steps": 2,
    "net.channels": 4,
    "net.blocks": 1,
    "net.groups": 1,
    "net.classes": 0,
    "optimizer.ema_snapshots": 0,
    "optimizer.warmup": 0,
    "optimizer.replicas": 1,
    "train.steps": 1,
    "train.stop_at": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.devices": 1,
    "train.fsdp": 1,
    "train.seed": 0,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.keep": 1,
    "train.keep_every": 1,
    "train.max_skipped": 1,
    "sample.every": 1,
    "sample.count": 1,
    "sample.steps": 1,
    "sample.label": 0,
}
_WIDTHS = "net.channels times each of net.multipliers"
# Beyond every serious network, and still traced in seconds. A file from elsewhere may
# ask for anything, and what it asks for would take all time or memory before any of
# its weights is looked at. Of a list it is the most entries.
AT_MOST = {
    "data.image_size": 4096,
    "diffusion.num_steps": 1_000_000,
    "net.channels": 4096,
    "net.multipliers": 12,
    _WIDTHS: 65_536,
    "net.blocks": 64,
    "net.attention": 12,
    "net.classes": 1_000_000,
    "net.fourier": 32,
    "train.batch_size": 2**20,
    "sample.count": 2**20,
    # JAX reads no more than 32 bits of a seed: beyond, two would be the same.
    "train.seed": 2**32 - 1,
}
# Of other whole numbers: what a counter on a device can hold.
MOST = 2**31 - 1


def validate(config: Config) -> None:
    """Raises ConfigError where a value is out of range or two do not fit together."""
    _check_ranges(config)
    _check_run(config)
    _check_network(config)
    for name, must, got in (*objective(config.diffusion), *conditioning(config)):
        _fail(name, must, got)
    for name, must, got in problems(config.sample):
        _fail(f"sample.{name}", must, got)
    _check_optimizer(config)
    _check_batches(config)
    for key, value in flat(to_dict(config)).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            # Which a file of JSON could not give back.
            _fail(key, "finite", value)


def _check_ranges(config: Config) -> None:
    for key, value in flat(to_dict(config)).items():
        low = AT_LEAST.get(key)
        if low is not None and value is not None and not value >= low:
            _fail(key, f"at least {low}", value)
        counted = isinstance(value, int) and not isinstance(value, bool)
        if key not in AT_MOST and not counted:
            continue
        several, most = isinstance(value, list), AT_MOST.get(key, MOST)
        size, of_what = (len(value), " entries") if several else (value, "")
        if size is not None and size > most:
            _fail(key, f"at most {most}{of_what}", size)


def _check_run(config: Config) -> None:
    train, channels = config.train, config.data.channels
    if not config.name or "/" in config.name or config.name.startswith("."):
        _fail("name", "a plain folder name", repr(config.name))
    length = len(config.name.encode("utf-8", "surrogatepass"))
    if length > 200:  # of the 255 of a file system: some go to endings of our own
        _fail("name", "at most 200 bytes long", length)
    if channels not in (1, 3):
        _fail("data.channels", "1 or 3", channels)
    if train.keep_every and train.keep_every % train.checkpoint_every:
        must = f"a multiple of train.checkpoint_every, {train.checkpoint_every}"
        _fail("train.keep_every", must, train.keep_every)


def _check_network(config: Config) -> None:
    data, diffusion, net = config.data, config.diffusion, config.net
    factor = 2 ** (len(net.multipliers) - 1)
    if not net.multipliers or data.image_size % factor:
        _fail(
            "data.image_size",
            f"a multiple of {factor}, since there are {len(net.multipliers)} levels",
            data.image_size,
        )
    for width in (net.channels * multiplier for multiplier in net.multipliers):
        if width < 1 or width % net.groups:
            _fail(_WIDTHS, f"a multiple of net.groups = {net.groups}", width)
        if width > AT_MOST[_WIDTHS]:
            _fail(_WIDTHS, f"at most {AT_MOST[_WIDTHS]}", width)
    for power in net.fourier:
        # In float32 2^24 x has no fraction left, and its sine is 0.
        if not 0 <= power <= 23:
            _fail("net.fourier", "from 0 to 23", power)
    if net.variant == "diffusers" and net.channels % 8:
        _fail("net.channels", "a multiple of 8 in the variant diffusers", net.channels)
    sides = {data.image_size // 2**i for i in range(len(net.multipliers))}
    for side in net.attention:
        if side not in sides:
            _fail("net.attention", f"among the resolutions {sorted(sides)}", side)
    if not 0 <= net.dropout < 1:
        _fail("net.dropout", "at least 0 and below 1", net.dropout)
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        ends = f"{diffusion.beta_start} and {diffusion.beta_end}"
        _fail("diffusion.beta_start and beta_end", "0 < start <= end < 1", ends)


def _check_optimizer(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    if not optimizer.ema_decay:
        _fail("optimizer.ema_decay", "at least one decay", "none")
    for name, values in (("ema_decay", optimizer.ema_decay), ("b2", (optimizer.b2,))):
        for value in values:
            if not 0 <= value < 1:
                _fail(f"optimizer.{name}", "at least 0 and below 1", value)
    tracked = (*optimizer.ema_decay, *optimizer.ema_lengths)
    if len(set(tracked)) < len(tracked):
        _fail("optimizer.ema_decay", "different from each other and lengths", tracked)
    for value in optimizer.ema_lengths:
        if not 0 < value <= 0.28:
            _fail("optimizer.ema_lengths", "above 0 and at most 0.28", value)
    if optimizer.ema_snapshots and not optimizer.ema_lengths:
        _fail("optimizer.ema_lengths", "given, for there to be snapshots", "none")
    for name in ("learning_rate", "clip_norm"):
        value = getattr(optimizer, name)
        if not (value > 0 and math.isfinite(value)):
            _fail(f"optimizer.{name}", "above 0 and finite", value)
    if optimizer.decay == "cosine" and optimizer.warmup >= train.steps:
        _fail(
            "optimizer.warmup", f"below train.steps = {train.steps}", optimizer.warmup
        )


def _check_batches(config: Config) -> None:
    train, num_steps = config.train, config.diffusion.num_steps
    if config.optimizer.preset == "official" and train.accumulate != 1:
        _fail(
            "train.accumulate",
            "1 with the official preset, which cuts the batch into "
            "optimizer.replicas parts already",
            train.accumulate,
        )
    if train.fsdp > 1 and train.parallel != "mesh":
        _fail("train.parallel", f"mesh with train.fsdp {train.fsdp}", train.parallel)
    parts = micro_batches(config)
    if train.batch_size % parts:
        _fail("train.batch_size", f"a multiple of {parts}", train.batch_size)
    steps = config.sample.steps
    if steps is not None and steps > num_steps:
        _fail("sample.steps", f"at most diffusion.num_steps = {num_steps}", steps)


def objective(diffusion: Diffusion) -> Iterator[tuple[str, str, object]]:
    """Yields what does not fit together, as (field, what must hold, what was got)."""
    d, real = diffusion, diffusion.schedule in CONTINUOUS
    learned = d.variance in ("learned", "range")
    if learned and d.loss not in ("vlb", "hybrid"):
        must = f"vlb or hybrid where the variance is {d.variance}"
        yield "diffusion.loss", must, d.loss
    if d.loss == "hybrid" and not learned:
        must = "learned or range with the loss hybrid, which trains it"
        yield "diffusion.variance", must, d.variance
    if d.weighting != "simple" and d.loss != "eps":
        must = f"eps with the weighting {d.weighting}, which weighs its error"
        yield "diffusion.loss", must, d.loss
    if d.weighting == "sigmoid" and d.density in ("log_normal", "logit_normal"):
        must = "uniform with the weighting sigmoid, which is of evenly drawn times"
        yield "diffusion.density", must, d.density
    value = d.weighting_value
    if value is not None and d.weighting in ("min_snr", "p2") and not value > 0:
        yield "diffusion.weighting_value", "above 0", value
    if d.weighting_value is not None and d.weighting in ("simple", "edm"):
        must = f"left out with the weighting {d.weighting}"
        yield "diffusion.weighting_value", must, d.weighting_value
    if d.schedule == "learned" and d.loss != "vlb":
        must = "vlb with a learned schedule, which any other loss would lead astray"
        yield "diffusion.loss", must, d.loss
    if real and learned:
        must = "small or large in continuous time, where steps have no variance"
        yield "diffusion.variance", must, d.variance
    for name in ("prediction", "loss"):
        if real and getattr(d, name) == "mean":
            must = "no mean of a step in continuous time"
            yield f"diffusion.{name}", must, "mean"
    if real and d.density == "importance":
        must = "uniform, log_normal or logit_normal with a continuous schedule"
        yield "diffusion.density", must, d.density
    if not real and d.density in ("log_normal", "logit_normal"):
        must = f"uniform or importance with the discrete schedule {d.schedule}"
        yield "diffusion.density", must, d.density
    if d.density != "uniform" and real and d.loss == "vlb":
        must = "uniform with the continuous bound"
        yield "diffusion.density", must, d.density
    if abs(d.logsnr_shift) > 100:
        # With e^-100 of noise, or of signal, there is nothing to learn.
        yield "diffusion.logsnr_shift", "from -100 to 100", d.logsnr_shift
    if d.logsnr_shift and d.schedule in ("sub_vp", "ve", "flow", "learned"):
        must = "0 where the schedule does not preserve variance, or is learned"
        yield "diffusion.logsnr_shift", must, d.logsnr_shift
    if not d.sigma_data > 0:
        yield "diffusion.sigma_data", "above 0", d.sigma_data
    if not 0 < d.sigma_min < d.sigma_max:
        got = f"{d.sigma_min} and {d.sigma_max}"
        yield "diffusion.sigma_min and sigma_max", "0 < min < max", got


def conditioning(config: Config) -> Iterator[tuple[str, str, object]]:
    """Yields what is wrong about labels and guidance, as `objective` does."""
    net, sample, variance = config.net, config.sample, config.diffusion.variance
    if not 0 <= net.label_dropout < 1:
        yield "net.label_dropout", "at least 0 and below 1", net.label_dropout
    if sample.variance in ("learned", "range") and sample.variance != variance:
        must = "one that the network was trained for"
        yield "sample.variance", must, sample.variance
    chosen = sample.variance or variance
    total = config.diffusion.num_steps
    steps = resolve(sample, total).get("steps", total)
    if sample.sampler == "ddpm" and chosen == "learned" and steps < total:
        must = f"{total}, all, with a learned variance, which is that of single steps"
        yield "sample.steps", must, steps
    for name in ("guidance", "guidance_interval"):
        given = getattr(sample, name)
        if given is not None and not (net.classes and net.label_dropout):
            must = "left out where no labels were dropped in training"
            yield f"sample.{name}", must, given
    if sample.threshold is not None and sample.classifier_guidance:
        must = "left out with classifier guidance, which comes after it"
        yield "sample.threshold", must, sample.threshold
    if sample.guidance_interval is not None and sample.guidance is None:
        yield "sample.guidance", "given with an interval", None
    if sample.label is not None:
        if not (net.classes or sample.classifier_guidance):
            must = "left out where the network has no classes and no classifier guides"
            yield "sample.label", must, sample.label
        if net.classes and sample.label >= net.classes:
            must = f"below {net.classes}, the number of classes"
            yield "sample.label", must, sample.label
    asked = net.classes or sample.classifier_guidance
    if asked and sample.label is None and sample.sampler == "ode":
        must = "given with the sampler ode, which draws one at a time"
        yield "sample.label", must, None
    grid = resolve(sample, total).get("grid")
    if config.diffusion.schedule == "learned" and grid in ("logsnr", "karras"):
        must = "uniform or quadratic where the schedule is learned"
        yield "sample.grid", must, grid


def of_training(config: Config) -> None:
    """Raises ConfigError for what only a trained network can be drawn with."""
    if config.sample.variance == "analytic":
        must = "small, large, learned or range in training: it is estimated afterwards"
        _fail("sample.variance", must, "analytic")
    if config.sample.classifier_guidance:
        must = "left out in training: the classifier is trained afterwards"
        _fail("sample.classifier_guidance", must, config.sample.classifier_guidance)


def require_positive(options: Any, *names: str) -> None:
    """Raises ConfigError where one of a command's options is given and below 1.

    Or above what a counter on a device can hold.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            _fail(name, "at least 1", value)
        if value is not None and value > MOST:
            _fail(name, f"at most {MOST}", value)


def require_seed(seed: int, *, sets: int = 1) -> None:
    """Raises ConfigError where JAX would take a seed for another one.

    Args:
      seed: of a command.
      sets: how many seeds there are, each one above the one before.
    """
    most = AT_MOST["train.seed"]
    if not 0 <= seed <= most - (sets - 1):
        _fail("seed", f"from 0 to {most - (sets - 1)}", seed)


def with_data(config: Config, source: str | None) -> Config:
    """Returns the configuration with other data, where they are given."""
    if source is None:
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=source)
    )


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


def _fail(key: str, must: str, got: object) -> typing.NoReturn:
    flags = key.replace("_", "-")
    raise ConfigError(f"{key} must be {must}; got {got}. Change it with --{flags}.")
