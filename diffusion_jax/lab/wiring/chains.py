"""Builds what samples from a configuration: grids, rules, and compiled draws."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import (
    analytic,
    continuous,
    gaussian,
    grids,
    guidance,
    samplers,
    schedule,
)
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.schema import latents, sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import build, guides, latent_space
from diffusion_jax.schedule import PURE_NOISE
from diffusion_jax.storage import trees
from diffusion_jax.training import compilation, parallel


class Drawable(NamedTuple):
    """What images are drawn with: trained weights, and what sampling adds; a pytree."""

    params: Any
    """The weights, as `build.init_params` makes them."""
    x0_variance: Any = None
    """Var[x0 | x_t] for t = 0..T, [T + 1], where the variance is analytic."""
    classifier: Any = None
    """Parameters of the noisy classifier, where it guides."""
    space: latent_space.LatentSpace | None = None
    """The autoencoder, where the network learns its latents."""

    @property
    def sha256(self) -> str:
        """Returns the digest of the weights alone."""
        return trees.digest(self.params)


def make_grid(config: Config) -> np.ndarray:
    """Returns the times of a chain, from T to 0.

    Raises:
      ConfigError: it begins in pure noise, and the network predicts eps or score,
        which determine no image there.
    """
    total = config.diffusion.num_steps
    how = sampling.resolve(config.sample, total)
    if "grid" not in how:
        # One stretch for the adaptive solver, and the last step, to data.
        last = 1.0 if build.is_continuous(config) else total
        return np.array([last, last / total, 0])
    made: Callable[..., np.ndarray] = getattr(grids, how["grid"])
    levels = known_chain(config)
    times, predicted = made(levels, how["steps"]), config.diffusion.prediction
    first = np.asarray(schedule.tables(levels)[1])[int(times[0])]
    if predicted in ("eps", "score") and first < PURE_NOISE:
        raise ConfigError(
            f"cannot draw: schedule {config.diffusion.schedule} ends in pure noise, "
            f"where the prediction {predicted} gives no image. Use the grid logsnr, "
            "which begins before, or train another prediction, such as v."
        )
    return times


def known_chain(config: Config) -> schedule.Schedule:
    """Returns the chain's schedule, made without parameters, for its times.

    In place of a learned one it is cosine, of as many steps and other levels.
    """
    if config.diffusion.schedule == "learned":
        return schedule.cosine(config.diffusion.num_steps)
    return build.chain_schedule(config)


def start_std(config: Config) -> float:
    """Returns the standard deviation of the noise that chains start from."""
    if _adapts(config):
        return max(1.0, float(known_chain(config)(config.diffusion.num_steps).sigma))
    return max(1.0, float(known_chain(config)(int(make_grid(config)[0])).sigma))


def make_sampler(
    config: Config, drawable: Drawable, *, first: int | jax.Array = 0
) -> samplers.Sampler:
    """Returns the sampling rule with these weights.

    `first` is the index of the first example, for its label where classes take turns.
    """
    denoise = make_denoiser(config, drawable, first=first)
    return make_rule(config, denoise, sampling_schedule(config, drawable.params))


def make_denoiser(
    config: Config, drawable: Drawable, *, first: int | jax.Array = 0
) -> gaussian.Denoiser:
    """Returns the denoiser of the configured chains: clipped, labelled, guided."""
    levels = sampling_schedule(config, drawable.params)
    how = sampling.resolve(config.sample, config.diffusion.num_steps)
    options = {"clip": how["clip"], "threshold": config.sample.threshold}
    denoise = _jumping(config, drawable, levels, first, **options)
    if config.sample.classifier_guidance:
        denoise = _guided(config, drawable.classifier, denoise, levels, first)
    return _with_variance(denoise, drawable)


def _jumping(
    config: Config,
    drawable: Drawable,
    levels: schedule.Schedule,
    first: int | jax.Array,
    **options: Any,
) -> Callable[..., gaussian.Prediction]:
    """Returns the network as a denoiser, of jumps too where it knows them."""
    apply = build.make_apply(config, drawable.params, levels)

    def denoise(
        x: jax.Array, t: jax.Array, s: jax.Array | None = None
    ) -> gaussian.Prediction:
        told = apply
        if s is not None:
            span = jnp.broadcast_to(t - s, x.shape[:1])
            told = functools.partial(apply, span=span)
        given = _labelled(config, told, levels, first)
        return build.make_denoiser(config, given, levels, **options)(x, t)

    return denoise


def given_labels(
    config: Config,
    drawable: Drawable,
    levels: schedule.Schedule,
    label: jax.Array | None,
    *,
    clip: bool,
) -> gaussian.Denoiser:
    """Returns the denoiser for images with these labels, without guidance."""
    apply = build.make_apply(config, drawable.params, levels)
    given = functools.partial(apply, label=label)
    denoise = build.make_denoiser(config, given, levels, clip=clip)
    return _with_variance(denoise, drawable)


def labels_of(
    config: Config, count: int, first: int | jax.Array, classes: int
) -> jax.Array:
    """Returns the labels of examples first, first + 1, ...; [count]."""
    if config.sample.label is not None:
        return jnp.full(count, config.sample.label)
    return (jnp.asarray(first) + jnp.arange(count)) % classes


def count_classes(config: Config, drawable: Drawable | None = None) -> int:
    """Returns how many classes take turns; 0 where all samples are of one.

    `drawable` is needed where a classifier may guide.
    """
    if config.sample.label is not None:
        return 0
    if config.sample.classifier_guidance and drawable is not None:
        return len(drawable.classifier["logits"]["bias"])
    return config.net.classes


def make_rule(
    config: Config, denoise: gaussian.Denoiser, levels: schedule.Schedule
) -> samplers.Sampler:
    """Returns the configured rule for any denoiser on `sampling_schedule`."""
    rule, how = sampling.RULES[config.sample.sampler], describe_sampling(config)
    options = {name: how[name] for name in rule.options}
    made: samplers.Sampler = rule.make(denoise, levels, **options)
    return made


def sampling_schedule(config: Config, params: Any = None) -> schedule.Schedule:
    """Returns the schedule of chains: continuous where the rule is adaptive."""
    if not _adapts(config):
        return build.chain_schedule(config, params)
    made = build.make_schedule(config, params)
    return made if build.is_continuous(config) else continuous.interpolate(made)


def count_evaluations(config: Config, drawable: Drawable) -> float:
    """Returns the network evaluations (NFE) of one sample, counted on a draw.

    The real network is only asked by a rule whose steps depend on it. Classifier-free
    guidance counts twice, though with an interval some steps take one evaluation.
    """
    levels = sampling_schedule(config, drawable.params)
    silent = gaussian.denoiser(lambda x, t: 0 * x, levels, "x0")

    def stand_in(x: jax.Array, t: jax.Array, *_: jax.Array) -> gaussian.Prediction:
        # With any variance that the rule may ask for.
        return gaussian.Prediction(*silent(x, t)[:2], 0 * x, 0 * x, 0 * x)

    denoise: gaussian.Denoiser = stand_in
    if _adapts(config):
        denoise = make_denoiser(config, drawable)
    count = samplers.count_evaluations(
        lambda counted: make_rule(config, counted, levels),
        denoise,
        make_grid(config),
        (1, *latents.seen(config)),
        start_std=start_std(config),
    )
    return count * (1 if config.sample.guidance is None else 2)


def make_draw(
    config: Config, count: int, mesh: jax.sharding.Mesh
) -> Callable[..., np.ndarray]:
    """Returns a function of (drawable, key, first) that draws `count` images.

    Compiled once, whatever the weights; image i depends on (key, first + i) alone.
    The result is float, [count, H, W, C], about [-1, 1].
    """
    grid = make_grid(config)
    # Devices that cannot share the images equally draw all of them each.
    everywhere, out = parallel.replicated(mesh), parallel.sharded(mesh)
    out = everywhere if count % mesh.size else out

    @functools.partial(
        jax.jit, compiler_options=compilation.options(mesh.devices.flat[0])
    )
    def draw(drawable: Drawable, key: jax.Array, first: jax.Array) -> jax.Array:
        # Cast once, and not at each of the chain's evaluations.
        cast = drawable._replace(params=build.as_computed(config, drawable.params))
        sampler = make_sampler(config, cast, first=first)
        shape = (count, *latents.seen(config))
        # Computed here, and not when a run starts, which is long before it draws.
        with jax.ensure_compile_time_eval():
            std = start_std(config)
        drawn = samplers.sample(key, sampler, grid, shape, start_std=std, first=first)
        images = latent_space.decode(config, drawable.space, drawn)
        images = jax.lax.with_sharding_constraint(images, out)
        if mesh.is_multi_process:  # every host gets all of them
            images = jax.lax.with_sharding_constraint(images, everywhere)
        return images

    def drawn(drawable: Drawable, key: jax.Array, first: int = 0) -> np.ndarray:
        return np.asarray(draw(drawable, key, jnp.asarray(first)))

    return drawn


def describe_sampling(config: Config) -> dict[str, Any]:
    """Returns all that decides samples beside the weights and the seed, as JSON."""
    about = sampling.resolve(config.sample, config.diffusion.num_steps)
    if "guidance_interval" in about:
        about["guidance_interval"] = list(about["guidance_interval"])
    if "variance" in about:
        about["variance"] = about["variance"] or config.diffusion.variance
    if config.net.classes and config.sample.label is None:
        about["label"] = "all in turn"
    return about


def _adapts(config: Config) -> bool:
    """Returns whether the sampling rule chooses its own steps, in continuous time."""
    return sampling.RULES[config.sample.sampler].grid is None


def _labelled(
    config: Config,
    apply: build.Apply,
    levels: schedule.Schedule,
    first: int | jax.Array,
) -> build.Apply:
    """Returns the network with labels and classifier-free guidance, of x and t."""
    classes, sample = config.net.classes, config.sample
    if not classes:
        return apply

    def given(x: jax.Array, t: jax.Array) -> jax.Array:
        label = labels_of(config, len(x), first, classes)
        if sample.guidance is None:
            return apply(x, t, label)
        guided = guidance.classifier_free(
            apply,
            label,
            classes,  # the last row of the embedding, for no label
            scale=sample.guidance,
            active=_active(config, levels),
            channels=latents.seen(config)[-1],
        )
        return guided(x, t)

    return given


def _active(
    config: Config, levels: schedule.Schedule
) -> Callable[[jax.Array], jax.Array] | None:
    """Returns where guidance applies, as a function of the network's times."""
    if config.sample.guidance_interval is None:
        return None
    low, high = config.sample.guidance_interval
    if config.diffusion.prediction != "edm":
        shift = build.time_shift(config)
        return guidance.within(levels, low, high, time_shift=shift)

    def active(c_noise: jax.Array) -> jax.Array:
        noise = jnp.exp(4 * c_noise)
        return (low < noise) & (noise <= high)

    return active


def _with_variance(denoise: gaussian.Denoiser, drawable: Drawable) -> gaussian.Denoiser:
    if drawable.x0_variance is None:
        return denoise
    return analytic.attach(denoise, drawable.x0_variance)


def _guided(
    config: Config,
    judge: Any,
    denoise: gaussian.Denoiser,
    levels: schedule.Schedule,
    first: int | jax.Array,
) -> gaussian.Denoiser:
    """Returns the denoiser guided by the run's noisy classifier."""
    classes = len(judge["logits"]["bias"])
    clip = sampling.resolve(config.sample, config.diffusion.num_steps)["clip"]

    def guided(x: jax.Array, t: jax.Array) -> gaussian.Prediction:
        label = labels_of(config, len(x), first, classes)
        log_prob = guides.log_prob_of(judge, label, levels)
        scale = config.sample.classifier_guidance or 0.0
        change = guidance.classifier(denoise, log_prob, levels, scale=scale, clip=clip)
        return change(x, t)

    return guided
