"""Tells autoencoders and latent diffusion from the rest, and checks their fields."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from diffusion_jax.lab.schema.autoencoder import Autoencoder
from diffusion_jax.lab.schema.config import Config, Diffusion, Net, micro_batches
from diffusion_jax.lab.schema.facts import HOW, marked

Problems = Iterator[tuple[str, str] | tuple[str, str, object]]
KL_WEIGHT = {"kl": 1e-6, "vae": 1.0, "ae": 0.0}
"""Of the KL divergence where nothing is said."""


def is_latent(config: Config) -> bool:
    """Returns whether the network learns the latents of an autoencoder."""
    return config.data.latent is not None


def is_autoencoder(config: Config) -> bool:
    """Returns whether what is trained is an autoencoder."""
    return config.autoencoder.kind != "none" and not is_latent(config)


def is_named(config: Config) -> bool:
    """Returns whether a latent run's autoencoder is named, and not yet looked up."""
    return is_latent(config) and config.autoencoder.kind == "none"


def factor(config: Config) -> int:
    """Returns how many pixels a side a latent stands for."""
    return int(2 ** (len(config.autoencoder.multipliers) - 1))


def latent_shape(config: Config) -> tuple[int, int, int]:
    """Returns height, width and channels of the latents of an image."""
    height, width, _ = config.data.shape
    by = factor(config)
    return height // by, width // by, config.autoencoder.latent


def seen(config: Config) -> tuple[int, int, int]:
    """Returns the shape of what the network sees: an image, or its latents."""
    return latent_shape(config) if is_latent(config) else config.data.shape


def kl_weight(config: Config) -> float:
    """Returns the weight of the KL divergence."""
    given, kind = config.autoencoder.kl_weight, config.autoencoder.kind
    return KL_WEIGHT[kind] if given is None else given


def problems(config: Config) -> Problems:
    """Yields what does not fit an autoencoder or its latents: (field, must[, got])."""
    if is_autoencoder(config):
        yield from _structure(config)
        yield from _trained(config)
    elif is_latent(config):
        yield from _structure(config)
        yield from _of_latents(config)
    else:
        must = "left out without autoencoder.kind"
        yield from _others("autoencoder", config.autoencoder, Autoencoder(), must)
    if config.data.latent_draw != "sample" and not is_latent(config):
        yield "data.latent_draw", "left out without data.latent"


def _structure(config: Config) -> Problems:
    own, by = config.autoencoder, factor(config)
    if own.kind == "none":
        return  # the run that data.latent names says what it is
    height, width, _ = config.data.shape
    if not own.multipliers or height % by or width % by:
        yield "data.image_size", f"a multiple of {by}, as the autoencoder is f{by}"
    for wide in (own.channels * multiplier for multiplier in own.multipliers):
        if wide < 1 or wide % own.groups:
            of_what = "autoencoder.channels times each of autoencoder.multipliers"
            yield of_what, f"a multiple of autoencoder.groups = {own.groups}", wide
    levels = range(len(own.multipliers))
    for level in own.attention:
        if level not in levels:
            yield "autoencoder.attention", f"among the levels {[*levels]}", level


def _trained(config: Config) -> Problems:
    """Yields what is given though it says nothing of an autoencoder."""
    own = config.autoencoder
    must = "left out with an autoencoder, which the section autoencoder describes"
    how = {name: getattr(config.net, name) for name in marked(Net, HOW)}
    yield from _others("net", config.net, Net(**how), must)
    yield from _others("diffusion", config.diffusion, Diffusion(), must)
    if own.kind == "vae" and own.loss != "l1":
        yield "autoencoder.loss", "left out with vae, whose loss is the bound", own.loss
    yield from _judged(config)
    if own.free_bits and own.kind != "vae":
        yield "autoencoder.free_bits", "left out without kind vae"
    if own.kind == "ae" and own.kl_weight is not None:
        must = "left out with ae, which has no noise and so no KL divergence"
        yield "autoencoder.kl_weight", must
    if own.kind == "vae" and config.data.rotate:
        must = "0 with vae, whose bound is of one of 256 values a pixel"
        yield "data.rotate", must
    if config.few.method != "none":
        yield "few.method", "none with an autoencoder"
    if config.train.measure_every is not None:
        must = "left out with an autoencoder, which eval_autoencoder measures"
        yield "train.measure_every", must


def _judged(config: Config) -> Problems:
    """Yields what does not fit a discriminator or a classifier that judges."""
    own, plan = config.autoencoder, config.train
    for name in ("perceptual", "discriminator"):
        if getattr(own, name) and own.kind != "kl":
            yield f"autoencoder.{name}", "left out without kind kl"
    if own.discriminator_start and not own.discriminator:
        must = "left out without autoencoder.discriminator"
        yield "autoencoder.discriminator_start", must
    if not own.discriminator:
        return
    must = "{} with autoencoder.discriminator, whose weight is of a whole batch"
    if plan.batch_size < 2:
        yield "train.batch_size", must.format("at least 2")
    if plan.accumulate > 1:
        yield "train.accumulate", must.format("1")
    elif micro_batches(config) > 1:
        yield "optimizer.preset", must.format("modern")
    if plan.parallel != "mesh":
        yield "train.parallel", must.format("mesh")
    if min(config.data.shape[:2]) < 6:
        yield "data.image_size", "at least 6 with autoencoder.discriminator"


def _of_latents(config: Config) -> Problems:
    """Yields what cannot be done on latents."""
    data, loss = config.data, config.diffusion.loss
    for name in ("random_crop", "rotate"):
        if getattr(data, name):
            yield f"data.{name}", "0 with data.latent: the images are encoded once"
    if loss in ("vlb", "hybrid"):
        must = "other than vlb and hybrid with data.latent: latents are real numbers"
        yield "diffusion.loss", must
    if config.sample.clip:
        yield "sample.clip", "off with data.latent: no range holds latents"
    if config.sample.classifier_guidance:
        must = "left out with data.latent: the classifier sees noisy images"
        yield "sample.classifier_guidance", must
    if config.sample.threshold is not None:
        yield "sample.threshold", "left out with data.latent: no range holds latents"


def _others(section: str, given: Any, usual: Any, must: str) -> Problems:
    """Yields the fields of a section that are other than usual."""
    for field in dataclasses.fields(given):
        if getattr(given, field.name) != getattr(usual, field.name):
            yield f"{section}.{field.name}", must
