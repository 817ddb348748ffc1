"""Draws figures 6, 7 and 10 of the paper (Ho et al. 2020) by a trained network."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import samplers
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import extractors, reference
from diffusion_jax.lab.process import progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import build, chains, latent_space
from diffusion_jax.lab.wiring.chains import Drawable

SHARED_AT = (1.0, 0.75, 0.5, 0.25)
"""Shares of T at which Fig. 7 lets the chains part: t = 1000, 750, 500, 250."""


def chain(
    config: Config, drawable: Drawable, *, count: int, seed: int, frames: int = 9
) -> tuple[np.ndarray, samplers.Trajectory]:
    """Returns samples, [count, H, W, C], and their chain at evenly spaced steps.

    Noise that explodes is shown as wide as the data: x_t is divided by sigma above 1.
    """
    grid, std = chains.make_grid(config), chains.start_std(config)
    shape = (count, *latents.seen(config))
    chosen = np.unique(np.linspace(0, len(grid) - 2, frames).astype(int)).tolist()

    @jax.jit
    def run(drawable: Drawable, key: jax.Array) -> Any:
        sampler = chains.make_sampler(config, drawable)
        end, seen = samplers.trajectory(
            key, sampler, grid, shape, chosen, start_std=std
        )
        return end, seen.x_t, seen.x0

    end, x_t, x0 = jax.tree.map(np.asarray, run(drawable, jax.random.key(seed)))
    levels = chains.sampling_schedule(config, drawable.params)
    times = grid[chosen] if config.sample.sampler == "ode" else grid[chosen].astype(int)
    width = np.maximum(np.asarray(levels(times).sigma), 1)[:, None, None, None, None]
    end, x_t, x0 = (images(config, drawable, x) for x in (end, x_t / width, x0))
    return end, samplers.Trajectory(grid[chosen], x_t, x0)


def images(config: Config, drawable: Drawable, drawn: Any) -> Any:
    """Returns what was drawn as images, [..., H, W, C]: of latents, decoded."""
    decoded = jax.jit(functools.partial(latent_space.decode, config))
    return np.asarray(decoded(drawable.space, jnp.asarray(drawn)))


def strip(end: np.ndarray, t: np.ndarray, frames: Any) -> Any:
    """Returns a picture with a row an image: frames [K, B, H, W, C], then the end.

    Above each column stands its time: t, [K], and 0.
    """
    rows = pictures.to_uint8(np.stack([*frames, end], axis=1))
    grid = pictures.grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
    return pictures.labelled(grid, above=[f"t = {at:,.4g}" for at in (*t, 0)])


def shared(config: Config, drawable: Drawable, *, count: int, seed: int) -> Any:
    """Returns Fig. 7: in each row, samples that share x_t and then part.

    From top to bottom t is T, 3/4 T, T/2 and T/4. The first picture of a row is x_t.
    """
    grid, std = chains.make_grid(config), chains.start_std(config)
    shape = (1, *latents.seen(config))
    parts = [int(np.argmin(np.abs(grid - grid[0] * share))) for share in SHARED_AT]
    root = jax.random.key(seed)
    if config.net.classes and config.sample.label is None:
        raise ConfigError(
            "label must be given with a run that has classes, where samples share x_t; "
            f"got none. Choose one with --label, 0 to {config.net.classes - 1}."
        )
    if len(set(parts)) < len(parts):
        raise ConfigError(
            f"steps must be at least {len(SHARED_AT)}, for as many places to part; got "
            f"{len(grid) - 1}. Give more with --steps."
        )

    @jax.jit
    def start(drawable: Drawable) -> jax.Array:
        sampler = chains.make_sampler(config, drawable)
        _, seen = samplers.trajectory(root, sampler, grid, shape, parts, start_std=std)
        return seen.x_t

    @functools.partial(jax.jit, static_argnums=3)
    def rest(drawable: Drawable, x_t: jax.Array, key: jax.Array, part: int) -> Any:
        sampler = chains.make_sampler(config, drawable)
        many = jnp.broadcast_to(x_t, (count, *shape[1:]))
        return samplers.sample(key, sampler, grid[part:], many.shape, start=many)

    rows = []
    for i, (part, x_t) in enumerate(zip(parts, start(drawable), strict=True), 1):
        ends = rest(drawable, x_t, jax.random.fold_in(root, i), part)
        rows.append(images(config, drawable, jnp.concatenate([x_t, ends])))
    picture = pictures.grid(pictures.to_uint8(np.concatenate(rows)), columns=count + 1)
    left = [f"t = {grid[part]:,.4g}" for part in parts]
    return pictures.labelled(picture, above=["x_t"] + [""] * count, left=left)


def quality(
    config: Config,
    drawable: Drawable,
    out: Path,
    made: dict[str, Any],
    *,
    count: int,
    seed: int,
) -> None:
    """Writes Fig. 10: how far x0, as seen along the chain, is from the data.

    The plot goes to `out`, a PNG, and the numbers beside it, as JSON with `made`, which
    `outputs.about` returns. The count must be above the extractor's features.

    Raises:
      ConfigError: too few samples.
    """
    pictures.check_plots()
    dataset = build.load_data(config)
    extractor = extractors.choose("auto", config, dataset)
    ruler = reference.ruler(config, dataset.images, extractor, count)
    real, name = ruler.real, ruler.name
    grid = chains.make_grid(config)
    with progress.clock("drawing the chains"):
        end, seen = chain(config, drawable, count=count, seed=seed, frames=13)
    rows = []
    for t, x0 in [*zip(seen.t.tolist(), seen.x0, strict=True), (0, end)]:
        features, _ = extractors.extract(
            extractor, pictures.to_uint8(x0), batch_size=64, label=f"t = {t}"
        )
        distance = reference.distance(real, features)
        rows.append({"t": t, name: distance})
        print(f"  x0 seen at t = {t:5,}   {name} {distance:10.3f}")
    done = [config.diffusion.num_steps * (1 - row["t"] / grid[0]) for row in rows]
    pictures.curve(
        done,
        [row[name] for row in rows],
        title=f"{config.name}: x0 as seen along the chain",
        xlabel="reverse steps taken, of T",
        ylabel=name,
        path=out,
    )
    result = {"count": count, "seed": seed, "extractor": extractor.name, "rows": rows}
    runs.write_json(out.with_suffix(".json"), made | result)
