"""Measures a run while it trains, and what it shows: held-out loss, FID, samples.

The distance of samples from the images is that of `eval_fid` with as many samples: from
the same noise, by the same extractor, with the averaged weights (EMA).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import extractors, judges, reference
from diffusion_jax.lab.measure.reference import Ruler
from diffusion_jax.lab.process import hosts
from diffusion_jax.lab.run_folder import history, results, runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.wiring import autoencoders, chains, critics, few_steps, learning
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.lab.wiring.latent_space import LatentSpace
from diffusion_jax.training import compilation, feed, flat, parallel


def make(config: Config, dataset: datasets.Dataset) -> Ruler | None:
    """Returns what a run is measured with; None without train.measure_every.

    Trains a classifier of the data where it is needed and there is none.

    Raises:
      ConfigError: there is neither Inception nor a classifier, or there are too few
        samples.
    """
    plan = config.train
    if plan.measure_every is None:
        return None
    try:
        extractor = extractors.choose("auto", config, dataset)
    except ConfigError as error:
        found = str(error).partition("; got ")[2].partition(". ")[0]
        raise ConfigError(
            "the images must have labels to be measured without Inception's weights; "
            f"got {found}. Fetch those once, as eval_fid does, or leave out "
            "--train.measure-every."
        ) from error
    hosts.check_same("the extractor", extractor.details["sha256"])
    images = datasets.middle(dataset, config.data.shape[:2]).images
    count, more = plan.measure_count, "Give more with --train.measure-count."
    return reference.ruler(config, images, extractor, count, more=more)


def judge(config: Config, dataset: datasets.Dataset) -> Any:
    """Returns the classifier that compares images for an autoencoder; None for none.

    Its parameters but for the last layers, which are of its classes.

    Raises:
      ConfigError: there is none, and none can be trained on these data.
    """
    if not critics.compare(config):
        return None
    hint = "Or leave out --autoencoder.perceptual."
    found = judges.find(config, dataset, hint).params["params"]
    return {name: part for name, part in found.items() if "Dense" not in name}


def watched(
    config: Config, mesh: Any, held: datasets.Dataset | None
) -> dict[str, Callable[[Any], jax.Array]]:
    """Returns what is logged beside the loss, as functions of the state.

    A student of progressive distillation has no self-consistency: its loss is its
    distance from two steps of the teacher.
    """
    found = {}
    if held is not None:
        found["held_out_loss"] = held_out_loss(config, mesh, held)
    if config.few.method not in ("none", "progressive"):
        found["self_consistency"] = self_consistency(config, mesh)
    return found


def held_out_loss(
    config: Config, mesh: Any, held: datasets.Dataset
) -> Callable[[Any], jax.Array]:
    """Returns the loss of a batch of held-out images as a function of the state.

    The images, times and noise are always the same, and nothing is dropped or moved, so
    only the network changes it.
    """
    if not latents.is_latent(config):
        held = datasets.middle(held, config.data.shape[:2])
    calm = replace(config, "data", flip=False, random_crop=0, rotate=0.0)
    # The discriminator's part of the loss is of how far it has come.
    calm = replace(calm, "autoencoder", discriminator=0.0)
    if config.diffusion.density == "importance":  # which depends on the training so far
        calm = replace(calm, "diffusion", density="uniform")
    loss = flat.of_tree(learning.make_loss(calm, train=False))
    labels, size = bool(config.net.classes), config.train.batch_size
    batch = feed.batch_at(held, labels, config.train.seed, size, 0)
    if config.train.parallel != "pmap":
        batch = parallel.shard(batch, mesh)
    options = compilation.options(mesh.devices.flat[0])

    @functools.partial(jax.jit, compiler_options=options)
    def run(params: Any, memory: Any, batch: Any) -> jax.Array:
        key = jax.random.key(config.train.seed)
        mean: jax.Array = loss(params, batch, key, memory)[0]
        return mean

    return lambda state: run(state.params, state.memory, batch)


def self_consistency(config: Config, mesh: Any) -> Callable[[Any], jax.Array]:
    """Returns `few_steps.self_consistency` as a function of a state."""

    @functools.partial(
        jax.jit, compiler_options=compilation.options(mesh.devices.flat[0])
    )
    def run(params: Any, memory: Any) -> jax.Array:
        whole, known = flat.unpack_all((params, memory))
        teacher = known.teacher if few_steps.has_teacher(config) else whole
        return few_steps.self_consistency(config, whole, teacher)

    return lambda state: run(state.ema_params, state.memory)


def due(config: Config, step: int) -> bool:
    """Returns whether the run is measured after this many updates."""
    every, last = config.train.measure_every, config.train.steps
    return every is not None and (step % every == 0 or step == last)


def measure(
    ruler: Ruler,
    config: Config,
    run: runs.Run,
    draw: Callable[..., np.ndarray],
    drawable: Drawable,
    step: int,
) -> float:
    """Returns the distance of samples from the images, and adds it to the results.

    All hosts must call it, and all get the number.

    `draw` is of `chains.make_draw`, with config.sample.count images; the drawable has
    the averaged weights.
    """
    count, size = config.train.measure_count, config.sample.count
    key = jax.random.key(0)  # as eval_fid
    batches = [
        pictures.to_uint8(draw(drawable, key, first)) for first in range(0, count, size)
    ]
    drawn = np.concatenate(batches)[:count]
    value = ruler.distance(drawn)
    if hosts.first():
        result = {
            "numbers": {f"{ruler.name} vs train": {"mean": value, "of_each": [value]}},
            "extractor": ruler.extractor.name,
            "extractor_details": ruler.extractor.details,
            "count": count,
            "seeds": [0],
            "data": config.data.source,
            "weights": "averaged",
            "weights_sha256": drawable.sha256,
            "training_step": step,
            **chains.describe_sampling(config),
        }
        results.write(run, results.IN_TRAINING, result)
    return hosts.tell_number(value)


def scores(
    config: Config, run: runs.Run, steps: Sequence[int]
) -> dict[int, float | None]:
    """Returns the scores of checkpoints by step: all distances, or all logged losses.

    Empty where the scores saved with them are of one kind already: in a run that was
    never measured.
    """
    found = results.in_training(run)
    if config.train.measure_every is not None:
        return {step: found.get(step) for step in steps}
    return {step: history.score(config, run, step) for step in steps if found}


def make_draw(
    config: Config, mesh: Any, dataset: datasets.Dataset, space: LatentSpace | None
) -> Callable[..., np.ndarray]:
    """Returns the function that draws the images of a grid, as `chains.make_draw`.

    Of an autoencoder they are the first images of a data set, each before its
    reconstruction from the mean of its latents.
    """
    count = config.sample.count
    if not latents.is_autoencoder(config):
        draw = chains.make_draw(config, count, mesh)
        return lambda drawable, *how: draw(drawable._replace(space=space), *how)
    few = datasets.middle(dataset, config.data.shape[:2]).images
    shown = np.asarray(few[np.arange(min(max(count // 2, 1), len(few)))])

    @jax.jit
    def again(params: Any, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        y = autoencoders.apply(config, params, x, "__call__", net=config.net)
        both = jnp.stack([x, y], axis=1)
        return both.reshape(-1, *x.shape[1:])

    return lambda drawable, key, first=0: np.asarray(again(drawable.params, shown))


def picture(config: Config, drawn: np.ndarray) -> Image.Image:
    """Returns the picture of what `make_draw` has drawn, as uint8 images."""
    if not latents.is_autoencoder(config):
        return pictures.by_class(drawn, chains.count_classes(config))
    return pictures.grid(drawn, columns=2 * math.ceil(math.sqrt(len(drawn)) / 2))


def what(config: Config) -> str:
    """Returns what a grid shows, in a word."""
    return "pairs" if latents.is_autoencoder(config) else "samples"


def loss_name(config: Config) -> str:
    """Returns what the loss of a run is called."""
    own = config.autoencoder
    if latents.is_autoencoder(config):
        return "bits/dim" if own.kind == "vae" else own.loss
    return config.diffusion.loss
