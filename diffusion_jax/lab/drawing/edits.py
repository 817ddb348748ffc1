"""Edits images by a trained network: between two, painted in, coloured, varied."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from diffusion_jax import editing, samplers
from diffusion_jax.data import image_files
from diffusion_jax.data.sizes import largest
from diffusion_jax.errors import ConfigError, DataError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import edit_options
from diffusion_jax.lab.schema import latents, sampling
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.wiring import chains, latent_space
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.schedule import Schedule

ENCODING_STEPS = 200
"""Of `slerp` where nothing is said."""


class Edited(NamedTuple):
    """What a command shows, all uint8 images [N, H, W, C]."""

    before: np.ndarray
    """What it was given, at the left."""
    results: np.ndarray
    """What it drew."""
    after: np.ndarray | None = None
    """What it was given, at the right, if anything was."""
    columns: int = 10
    """Results a row, at most."""
    names: Sequence[str] = ("image",)
    """Of what it was given, from left to right."""
    above: Sequence[str] = ()
    """A word for each column of results, or none."""
    left: Sequence[str] = ()
    """A word for each row of results, or none."""


Draw = Callable[[Drawable, jax.Array], Edited]
"""From weights and a key to what is shown: all that can be wrong has been checked."""
Rule = tuple[samplers.Sampler, Schedule]
"""A rule with the weights at hand, and the schedule that it walks."""


def interpolate(config: Config, options: edit_options.Interpolate) -> Draw:
    """Returns the function that draws Fig. 8 of Ho et al. 2020."""
    return _between(config, options, [_depth(config, options)])


def coarse_to_fine(config: Config, options: edit_options.CoarseToFine) -> Draw:
    """Returns the function that draws Fig. 9 of Ho et al. 2020."""
    last = _first_time(config)
    depths = options.depths or tuple(last * k // 8 for k in range(8, -1, -1))
    check_depths(config, depths, least=0)
    return _between(config, options, depths)


def _between(config: Config, options: Any, depths: Sequence[int]) -> Draw:
    a, b = _read_pair(config, options)
    fractions = np.linspace(0, 1, options.count)
    grid = chains.make_grid(config)

    def mix(rule: Rule, key: jax.Array, a: Any, b: Any, t: Any) -> Any:
        made, levels = rule
        return editing.interpolate(key, made, levels, grid, a, b, t, fractions)[0]

    def draw(drawable: Drawable, key: jax.Array) -> Edited:
        draws, rows = compiled(config, mix, static=_per_depth(config)), []
        for depth in depths:
            rows.append(draws(drawable, key, to_float(a), to_float(b), depth))
            if len(depths) > 1:
                print(f"  mixed after {counted(depth, 'step')}")
        left = [counted(n, "step") for n in depths] if len(depths) > 1 else []
        return _from_a_to_b(a, np.concatenate(rows), b, fractions, left)

    return draw


def _from_a_to_b(
    a: np.ndarray, results: np.ndarray, b: np.ndarray, fractions: Any, left: Any = ()
) -> Edited:
    """Returns rows of images between two, with the share of the second above each."""
    above = [f"{share:.3g}" for share in fractions]
    return Edited(a, results, b, len(fractions), ("A", "B"), above, left)


def slerp(config: Config, options: edit_options.Slerp) -> Draw:
    """Returns the function that draws the arc between two encodings."""
    a, b = _read_pair(config, options)
    fractions = np.linspace(0, 1, options.count, dtype=np.float32)
    grid = chains.make_grid(config)

    def arc(rule: Rule, key: jax.Array, a: Any, b: Any) -> jax.Array:
        made, _ = rule
        ends = editing.encode(made, grid, jnp.concatenate([a, b]))
        many = jnp.repeat(ends[:, None], len(fractions), axis=1)
        start = editing.slerp(many[0], many[1], fractions)
        return samplers.sample(key, made, grid, start.shape, start=start)

    def draw(drawable: Drawable, key: jax.Array) -> Edited:
        results = compiled(config, arc)(drawable, key, to_float(a), to_float(b))
        ends = ((a, results[:1]), (b, results[-1:]))
        errors = [np.sqrt(np.mean((x - y.astype(float)) ** 2)) for x, y in ends]
        print(f"reconstructions: RMSE {errors[0]:.2f} and {errors[1]:.2f} of 255")
        return _from_a_to_b(a, results, b, fractions)

    return draw


def inpaint(config: Config, options: edit_options.Inpaint) -> Draw:
    """Returns the function that draws the white part of a mask."""
    _check_steps(config)
    image = read(config, options.image, "IMAGE")
    white = read_mask(config, options)
    grid = editing.repaint_grid(
        chains.make_grid(config), options.jump, options.resamples
    )
    check_resamples(config, options.resamples)
    kept: Any = ~white
    if latents.is_latent(config):  # a latent is repainted for any pixel of its own
        by = latents.factor(config)
        cells = white.reshape(1, white.shape[1] // by, by, -1, by, 1)
        kept = ~cells.any(axis=(2, 4))

    def paint(rule: Rule, key: jax.Array, image: Any) -> jax.Array:
        painted = editing.inpaint(*rule, image, kept)
        shape = (options.count, *image.shape[1:])
        return samplers.sample(key, painted, grid, shape, start_std=std)

    std = chains.start_std(config)

    def draw(drawable: Drawable, key: jax.Array) -> Edited:
        results = compiled(config, paint)(drawable, key, to_float(image))
        results = np.where(white, results, image)
        checks = np.indices(white.shape[1:3]).sum(axis=0)[None, ..., None] % 2
        hole = np.where(white, 96 + 64 * checks, image).astype(np.uint8)
        given = np.concatenate([image, hole])
        return Edited(given, results, names=("image", "mask"))

    return draw


def colorize(config: Config, options: edit_options.Colorize) -> Draw:
    """Returns the function that draws the colours of a grey image."""
    _check_steps(config)
    if config.data.channels != 3:
        raise ConfigError(
            "RUN must be of RGB images, to draw colours; got one of grey images. Name "
            "a run that was trained with --data.channels 3."
        )
    if latents.is_latent(config):
        raise ConfigError(
            "cannot draw colours in latents: no part of them is what is grey in the "
            "image. Name a run that was trained on images."
        )
    grey = to_float(read(config, options.image, "IMAGE")).mean(-1, keepdims=True)

    grid, std = chains.make_grid(config), chains.start_std(config)

    def paint(rule: Rule, key: jax.Array, grey: Any) -> jax.Array:
        shape = (options.count, *grey.shape[1:3], 3)
        painted = editing.colorize(*rule, grey)
        return samplers.sample(key, painted, grid, shape, start_std=std)

    def draw(drawable: Drawable, key: jax.Array) -> Edited:
        results = compiled(config, paint)(drawable, key, grey)
        given = pictures.to_uint8(grey).repeat(3, axis=-1)
        return Edited(given, results, names=("grey",))

    return draw


def vary(config: Config, options: edit_options.Vary) -> Draw:
    """Returns the function that draws variations."""
    depth = _depth(config, options)
    image = read(config, options.image, "IMAGE")
    grid = chains.make_grid(config)

    def again(rule: Rule, key: jax.Array, image: Any, t: Any) -> jax.Array:
        made, levels = rule
        many = jnp.broadcast_to(image, (options.count, *image.shape[1:]))
        return editing.vary(key, made, levels, grid, many, t)

    def draw(drawable: Drawable, key: jax.Array) -> Edited:
        draws = compiled(config, again, static=_per_depth(config))
        return Edited(image, draws(drawable, key, to_float(image), depth))

    return draw


def compiled(
    config: Config, edit: Callable[..., jax.Array], *, static: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Returns a function of (drawable, *arrays) that gives uint8 images.

    Of a latent run the edit is given the latents of images, [B, H, W, C], and gives
    others.

    The edit takes the rule with these weights and its schedule, and the arrays, and
    gives images about [-1, 1]; `static` are the places of arguments that must be known
    when it is compiled.
    """

    @functools.partial(jax.jit, static_argnums=static)
    def run(drawable: Drawable, *arrays: Any) -> jax.Array:
        levels, space = (
            chains.sampling_schedule(config, drawable.params),
            drawable.space,
        )
        given = [
            latent_space.of_images(config, space, a) if np.ndim(a) == 4 else a
            for a in arrays
        ]
        drawn = edit((chains.make_sampler(config, drawable), levels), *given)
        return latent_space.decode(config, space, drawn)

    return lambda *args: pictures.to_uint8(np.asarray(run(*args)))


def _per_depth(config: Config) -> tuple[int, ...]:
    """Returns the place of the depth, the last, where each has a program of its own."""
    return (-1,) if has_memory(config) else ()


def check_resamples(config: Config, resamples: int) -> None:
    """Raises ConfigError where a rule cannot walk a stretch of its chain again."""
    if resamples > 1 and has_memory(config):
        raise ConfigError(
            f"resamples must be 1 with a rule that has a memory; got {resamples} with "
            f"{config.sample.sampler}. Use ddpm or ddim."
        )


def has_memory(config: Config) -> bool:
    """Returns whether the rule carries something on; the network is not asked."""
    unasked: Any = None
    rule = chains.make_rule(config, unasked, chains.known_chain(config))
    image = jnp.zeros((1, *latents.seen(config)))
    return bool(jax.tree.leaves(rule.init(image, chains.make_grid(config))))


def read(config: Config, path: Path, name: str) -> np.ndarray:
    """Returns the image of a file in the shape of the run's data, uint8 [1, H, W, C].

    Raises:
      ConfigError: it is not there, or not an image.
    """
    height, width, channels = config.data.shape
    if not path.is_file():
        raise ConfigError(
            f"{name} must be an image file; got {path}, which is not there or no file. "
            "Check the path."
        )
    try:
        image = image_files.read_image(path, (height, width), channels)
    except DataError as error:
        raise ConfigError(
            f"{name} must be an image that Pillow reads; got {path} "
            f"({error.__cause__}). Convert it to PNG, say."
        ) from error
    own = _own_size(path)
    if own != (height, width):
        cut = "" if largest(own, (height, width)) == own else ", its middle"
        print(f"{path}: {own[0]}x{own[1]}{cut} made {height}x{width}")
    return image[None]


def _read_pair(config: Config, options: Any) -> tuple[np.ndarray, np.ndarray]:
    return read(config, options.first, "A"), read(config, options.second, "B")


def read_mask(config: Config, options: edit_options.Inpaint) -> np.ndarray:
    """Returns where a mask is white, boolean [1, H, W, 1].

    Raises:
      ConfigError: it is not an image of the same size, or has nothing white.
    """
    grey = dataclasses.replace(config.data, channels=1)
    mask = read(dataclasses.replace(config, data=grey), options.mask, "MASK")
    own, other = _own_size(options.mask), _own_size(options.image)
    if own != other:
        raise ConfigError(
            f"MASK must have the size of the image, {other[0]}x{other[1]}; got "
            f"{own[0]}x{own[1]} in {options.mask}. Paint it over a copy of the image."
        )
    white = mask > 127
    if not white.any():
        raise ConfigError(
            f"MASK must have white pixels, those to repaint; got none in "
            f"{options.mask}. White is repainted, black is kept."
        )
    return white


def to_float(image: np.ndarray) -> np.ndarray:
    """Returns uint8 images scaled to [-1, 1]; `images.to_uint8` gives them back."""
    return image.astype(np.float32) / np.float32(127.5) - 1


def picture(edited: Edited) -> Image.Image:
    """Returns a picture of the results, with what they were made from at the sides."""
    many = len(edited.results)
    columns = min(edited.columns, many)
    before = 1 if many > columns else len(edited.before)
    names = edited.names if before == len(edited.before) else ["given"]
    panels = [
        pictures.labelled(pictures.grid(part, columns=wide), above=above, left=left)
        for part, wide, above, left in (
            (edited.before, before, names[:before], ()),
            (edited.results, columns, edited.above or [""], edited.left),
            (edited.after, 1, names[before:], ()),
        )
        if part is not None
    ]
    space = 12
    height = max(panel.height for panel in panels)
    width = sum(panel.width + space for panel in panels) - space
    canvas = Image.new(panels[0].mode, (width, height), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for panel in panels:
        if left:
            line = left - space // 2 - 1
            draw.rectangle((line, 4, line + 1, height - 5), "silver")
        canvas.paste(panel, (left, (height - panel.height) // 2))
        left += panel.width + space
    return canvas


def _own_size(path: Path) -> tuple[int, int]:
    """Returns height and width of an image as it is shown, turned upright."""
    with Image.open(path) as image:
        width, height = ImageOps.exif_transpose(image).size
        return height, width


def deterministic(config: Config, how: Sampling) -> Config:
    """Returns the configuration with ddim without noise, by which images are encoded.

    Raises:
      ConfigError: another rule was asked for.
    """
    if how.sampler not in (None, "ddim") or how.eta:
        raise ConfigError(
            f"slerp must draw by ddim without noise; got sampler {how.sampler} and eta "
            f"{how.eta}. Leave both out, or use interpolate."
        )
    steps = min(ENCODING_STEPS, config.diffusion.num_steps)
    usual = Sampling(sampler="ddim", steps=steps, grid="quadratic", eta=0.0)
    return with_sampling(with_sampling(config, usual), how)


def _first_time(config: Config) -> int:
    """Returns the noisiest time of the grid: T, or a little less."""
    return int(chains.make_grid(config)[0])


def _depth(config: Config, options: Any) -> int:
    """Returns the depth that was asked for, half of T where none was."""
    half = config.diffusion.num_steps // 2
    depth: int = half if options.depth is None else options.depth
    check_depths(config, (depth,), least=1)
    return depth


def check_depths(config: Config, depths: Sequence[int], *, least: int) -> None:
    """Raises ConfigError for a depth beyond the chain."""
    last = _first_time(config)
    for depth in depths:
        if not least <= depth <= last:
            raise ConfigError(
                f"depth must be in {least}..{last}, in diffusion steps; got {depth}. "
                "A small one keeps the images, the last one forgets them."
            )


def _check_steps(config: Config) -> None:
    if sampling.RULES[config.sample.sampler].grid is None:
        raise ConfigError(
            "the sampler must take steps, after each of which what is known is put "
            f"back; got {config.sample.sampler}. Use ddpm or ddim."
        )
