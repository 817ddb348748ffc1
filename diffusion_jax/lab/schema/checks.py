"""Checks configurations before any work: bounds, and fields that do not fit."""

import dataclasses
import itertools
import operator
import typing
from collections.abc import Iterator
from typing import Any

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import facts, few, latents, sampling
from diffusion_jax.lab.schema.config import (
    CONTINUOUS,
    GIVEN,
    RESIZED,
    Config,
    Diffusion,
    micro_batches,
    replace,
)
from diffusion_jax.lab.schema.sampling import Sampling, override, resolve

Problems = Iterator[tuple[str, str] | tuple[str, str, object]]
"""(field, what it must be) of what is wrong, and what was got if not its value."""
MOST_WIDTH = 65_536


def validate(config: Config) -> None:
    """Raises ConfigError where a value is out of range or two do not fit together."""
    for name, must, *got in itertools.chain(
        facts.problems(config),
        _run(config),
        latents.problems(config),
        _network(config),
        objective(config.diffusion),
        conditioning(config),
        few_steps(config),
        sampling.problems(config.sample),
        _optimizer(config),
        _batches(config),
    ):
        _fail(name, must, got[0] if got else operator.attrgetter(name)(config))


def _run(config: Config) -> Problems:
    train = config.train
    if not config.name or "/" in config.name or config.name.startswith("."):
        yield "name", "a plain folder name", repr(config.name)
    length = len(config.name.encode("utf-8", "surrogatepass"))
    if length > 200:  # file systems take 255, and some are for suffixes
        yield "name", "at most 200 bytes long", length
    for name in ("keep_every", "measure_every"):
        if (getattr(train, name) or 0) % train.checkpoint_every:
            must = f"a multiple of train.checkpoint_every, {train.checkpoint_every}"
            yield f"train.{name}", must


def _network(config: Config) -> Problems:
    data, diffusion, net = config.data, config.diffusion, config.net
    if data.random_crop and not data.source.startswith(RESIZED):
        must = f"0 with {data.source}, whose images have a size of their own"
        yield "data.random_crop", must
    if data.rotate and diffusion.loss in ("vlb", "hybrid"):
        must = (
            f"0 with the loss {diffusion.loss}, which is of one of 256 values a pixel"
        )
        yield "data.rotate", must
    if latents.is_autoencoder(config) or latents.is_named(config):
        return
    levels, sees = len(net.multipliers), latents.seen(config)[:2]
    factor = 2 ** (levels - 1)
    if not levels or any(side % factor for side in sees):
        must = f"a multiple of {factor}, since there are {levels} levels"
        if latents.is_latent(config):
            factor *= latents.factor(config)
            must = f"a multiple of {factor}, since there are {levels} levels of latents"
        yield "data.image_size", must
    for width in (net.channels * multiplier for multiplier in net.multipliers):
        of_what = "net.channels times each of net.multipliers"
        if width < 1 or width % net.groups:
            yield of_what, f"a multiple of net.groups = {net.groups}", width
        if width > MOST_WIDTH:
            yield of_what, f"at most {MOST_WIDTH}", width
    if net.variant == "diffusers" and net.channels % 8:
        yield "net.channels", "a multiple of 8 in the variant diffusers"
    sides = {min(sees) // 2**i for i in range(levels)}
    for side in net.attention:
        if side not in sides:
            yield "net.attention", f"among the resolutions {sorted(sides)}", side
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        got = f"{diffusion.beta_start} and {diffusion.beta_end}"
        yield "diffusion.beta_start and beta_end", "0 < start <= end < 1", got


def _optimizer(config: Config) -> Problems:
    optimizer = config.optimizer
    if not optimizer.ema_decay:
        yield "optimizer.ema_decay", "at least one decay", "none"
    tracked = (*optimizer.ema_decay, *optimizer.ema_lengths)
    if len(set(tracked)) < len(tracked):
        yield "optimizer.ema_decay", "different from each other and lengths", tracked
    if optimizer.ema_snapshots and not optimizer.ema_lengths:
        yield "optimizer.ema_lengths", "given with optimizer.ema_snapshots", "none"


def _batches(config: Config) -> Problems:
    train, num_steps = config.train, config.diffusion.num_steps
    if config.optimizer.preset == "official" and train.accumulate != 1:
        must = (
            "1 with the official preset, which cuts the batch into "
            "optimizer.replicas parts already"
        )
        yield "train.accumulate", must
    if train.fsdp > 1 and train.parallel != "mesh":
        yield "train.parallel", f"mesh with train.fsdp {train.fsdp}"
    parts = micro_batches(config)
    if train.batch_size % parts:
        yield "train.batch_size", f"a multiple of {parts}"
    if (config.sample.steps or 0) > num_steps:
        yield "sample.steps", f"at most diffusion.num_steps = {num_steps}"


def objective(d: Diffusion) -> Problems:
    """Yields what does not fit together in the process, the loss and the times."""
    real, learned = d.schedule in CONTINUOUS, d.variance in ("learned", "range")
    if learned and d.loss not in ("vlb", "hybrid"):
        yield "diffusion.loss", f"vlb or hybrid where the variance is {d.variance}"
    if d.loss == "hybrid" and not learned:
        must = "learned or range with the loss hybrid, which trains it"
        yield "diffusion.variance", must
    if d.weighting != "simple" and d.loss != "eps":
        must = f"eps with the weighting {d.weighting}, which weighs its error"
        yield "diffusion.loss", must
    if d.weighting == "sigmoid" and d.density in ("log_normal", "logit_normal"):
        must = "uniform with the weighting sigmoid, which is for evenly drawn times"
        yield "diffusion.density", must
    if d.weighting == "edm" and d.schedule == "jsd":
        must = "another with the weighting edm, infinite where jsd ends in noise alone"
        yield "diffusion.schedule", must
    value = d.weighting_value
    if value is not None and d.weighting in ("min_snr", "p2") and not value > 0:
        yield "diffusion.weighting_value", "above 0"
    if value is not None and d.weighting in ("simple", "edm"):
        must = f"left out with the weighting {d.weighting}"
        yield "diffusion.weighting_value", must
    if d.schedule == "learned" and d.loss != "vlb":
        must = "vlb with a learned schedule: no other loss can train it"
        yield "diffusion.loss", must
    if real and learned:
        must = "small or large in continuous time, where steps have no variance"
        yield "diffusion.variance", must
    for name in ("prediction", "loss"):
        if real and getattr(d, name) == "mean":
            must = "other than mean with a continuous schedule, which has no steps"
            yield f"diffusion.{name}", must
    if real and d.density == "importance":
        must = "uniform, log_normal or logit_normal with a continuous schedule"
        yield "diffusion.density", must
    if not real and d.density in ("log_normal", "logit_normal"):
        must = f"uniform or importance with the discrete schedule {d.schedule}"
        yield "diffusion.density", must
    if d.density != "uniform" and real and d.loss == "vlb":
        yield "diffusion.density", "uniform with the continuous bound"
    if d.logsnr_shift and d.schedule in ("sub_vp", "ve", "flow", "learned"):
        must = "0 where the schedule does not preserve variance, or is learned"
        yield "diffusion.logsnr_shift", must
    if not 0 < d.sigma_min < d.sigma_max:
        got = f"{d.sigma_min} and {d.sigma_max}"
        yield "diffusion.sigma_min and sigma_max", "0 < min < max", got


def conditioning(config: Config) -> Problems:
    """Yields what is wrong about labels, guidance and the network's own variance."""
    net, sample, variance = config.net, config.sample, config.diffusion.variance
    total = config.diffusion.num_steps
    found = resolve(sample, total)
    if sample.variance in ("learned", "range") and sample.variance != variance:
        yield "sample.variance", "one that the network was trained with"
    chosen, steps = sample.variance or variance, found.get("steps", total)
    if sample.sampler == "ddpm" and chosen == "learned" and steps < total:
        must = f"{total}, all, with a learned variance, which is that of single steps"
        yield "sample.steps", must, steps
    for name in ("guidance", "guidance_interval"):
        dropped = net.classes and net.label_dropout
        if getattr(sample, name) is not None and not dropped:
            yield f"sample.{name}", "left out where no labels were dropped in training"
    if sample.threshold is not None and sample.classifier_guidance:
        must = "left out with classifier guidance, which comes after it"
        yield "sample.threshold", must
    if sample.guidance_interval is not None and sample.guidance is None:
        yield "sample.guidance", "given with a guidance interval"
    asked = net.classes or sample.classifier_guidance
    if sample.label is not None and not asked:
        must = "left out where the network has no classes and no classifier guides"
        yield "sample.label", must
    if sample.label is not None and net.classes and sample.label >= net.classes:
        yield "sample.label", f"below {net.classes}, the number of classes"
    if asked and sample.label is None and sample.sampler == "ode":
        must = "given with the sampler ode, which draws one at a time"
        yield "sample.label", must
    grid = found.get("grid")
    if config.diffusion.schedule == "learned" and grid in ("logsnr", "karras"):
        must = "uniform or quadratic where the schedule is learned"
        yield "sample.grid", must, grid


def few_steps(config: Config) -> Problems:
    """Yields what a method of few steps cannot take, or be sampled with."""
    d, net, sample = config.diffusion, config.net, config.sample
    dropped = bool(net.classes and net.label_dropout)
    total = d.num_steps
    yield from few.problems(
        config.few, d.schedule, d.prediction, dropped=dropped, total=total
    )
    how = resolve(sample, total)
    steps, eta, grid = (how.get(name) for name in ("steps", "eta", "grid"))
    yield from few.sampling_problems(
        config.few, sample.sampler, steps, eta=eta, grid=grid
    )
    for name in ("guidance", "classifier_guidance", "threshold"):
        if getattr(sample, name) is not None and config.few.method in few.DISTILLED:
            must = f"left out with few.method {config.few.method}, whose x0 is no mean"
            yield f"sample.{name}", must


def of_training(config: Config) -> None:
    """Raises ConfigError for ways to sample that need a network trained before."""
    if config.few.method in few.DISTILLED and config.init_from is None:
        _fail("init_from", f"given with few.method {config.few.method}", None)
    if config.sample.variance == "analytic":
        must = "small, large, learned or range in training: it is estimated afterwards"
        _fail("sample.variance", must, "analytic")
    if config.sample.classifier_guidance:
        must = "left out in training: the classifier is trained afterwards"
        _fail("sample.classifier_guidance", must, config.sample.classifier_guidance)


def of_denoiser(config: Config) -> None:
    """Raises ConfigError where the network's x0 is no mean of the images at x_t."""
    method = config.few.method
    if method in few.DISTILLED:
        raise ConfigError(
            "the network must tell the mean of the images at each time; got one of "
            f"few.method {method}, whose x0 is the end of a jump. Name its teacher"
            f"{f', {config.init_from}' if config.init_from else ''}."
        )


def of_options(options: Any) -> None:
    """Raises ConfigError where an option of a command is out of its bounds.

    Those of a section, such as a way to sample, are checked where it is used.
    """
    for name, must, got in facts.problems(options):
        if "." not in name:
            _fail(name, must, got)


def with_data(config: Config, source: str | None) -> Config:
    """Returns the configuration with other data, where they are given.

    What is held out of other images than those trained on, or cut from them, is not.
    """
    if source is None:
        return config
    changed = {}
    if not config.data.source.startswith((source.partition(":")[0], GIVEN)):
        changed = {"random_crop": 0, "hold_out": 0.0}
    return replace(config, "data", source=source, **changed)


def with_sampling(config: Config, given: Sampling) -> Config:
    """Returns the configuration with another way to sample.

    Raises:
      ConfigError: a value out of range.
    """
    changed = dataclasses.replace(config, sample=override(config.sample, given))
    try:
        validate(changed)
    except ConfigError as error:
        # The flag --sample.eta of training is --eta of other commands.
        raise ConfigError(str(error).replace("--sample.", "--")) from None
    return changed


def _fail(key: str, must: str, got: object) -> typing.NoReturn:
    flag = key.split()[0].replace("_", "-")  # of several fields the first
    raise ConfigError(f"{key} must be {must}; got {got}. Change it with --{flag}.")
