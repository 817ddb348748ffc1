"""The bound on the negative log-likelihood: `python -m experiments.eval_nll [RUN]`.

The whole-chain bound of the paper in bits/dim, by one draw of x_t for each of the T
steps and each image, with the averaged weights and x0 clipped. `--rate-distortion` adds
the paper's Table 4 and Fig. 5.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from diffusion_jax import gaussian, likelihood
from diffusion_jax.evaluation import images
from diffusion_jax.training import data, parallel
from experiments import arguments, build, runs, sample
from experiments.config import Config, require_positive

BEGINNING = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = (
        None
    )
    """A run's folder or name; the newest in runs/ when not given."""
    split: Literal["train", "test"] = "train"
    """Images to evaluate: those trained on, or the official test images."""
    max_images: int | None = None
    """Evaluate only so many images, drawn at random; the result says so."""
    variance: Literal["small", "large", "learned"] | None = None
    """Variance of the reverse steps; the configured one when not given."""
    batch_size: int = 64
    """Images at a time, over all devices."""
    chunk: int = 1
    """Diffusion steps at a time: more is faster on an accelerator and takes memory."""
    seed: int = 0
    """Of the noise and of the choice of images."""
    raw: bool = False
    """Whether to use the last weights instead of their moving average."""
    step: int | None = None
    """Checkpoint to use, in training steps; the latest when not given."""
    rate_distortion: bool = False
    """Whether to print and plot rate and distortion over the reverse steps."""


class Sums:
    """Sums over images in float64: all that is kept of a batch."""

    def __init__(self, num_steps: int) -> None:
        """Starts empty."""
        self.totals: list[float] = []
        self.prior = 0.0
        self.terms, self.mse = np.zeros(num_steps), np.zeros(num_steps)

    def add(self, bits: likelihood.Bound, count: int) -> None:
        """Takes in the first `count` images of a batch; the rest is padding."""
        host = jax.tree.map(lambda x: np.asarray(x, np.float64), bits)
        self.totals += host.total[:count].tolist()
        self.prior += host.prior[:count].sum()
        self.terms += host.terms[:, :count].sum(axis=1)
        self.mse += host.mse[:, :count].sum(axis=1)


def main(argv: Sequence[str]) -> int:
    """Prints and writes the bound and its terms; returns the exit code."""
    options = tyro.cli(
        Options, args=argv, prog="python -m experiments.eval_nll", description=__doc__
    )
    require_positive(options, "max_images", "batch_size", "chunk")
    run = runs.find(options.run)
    config = runs.read_config(run)
    dataset = build.load_data(config, split=options.split)
    parallel.persistent_cache(run.folder.parent.resolve() / ".cache")
    params, step = sample.load_params(config, run, raw=options.raw, step=options.step)
    chosen = choose(len(dataset.images), options)
    sums = evaluate(config, params, dataset, chosen, options)
    result = summary(config, options, sums, step, len(dataset.images))
    out = run.folder / "eval"
    show(run, result)
    runs.write_json(out / f"nll_{options.split}.json", result)
    print(f"written: {out / f'nll_{options.split}.json'}")
    if options.rate_distortion:
        show_rate_distortion(result, out / f"rate_distortion_{options.split}.png")
    return 0


def choose(available: int, options: Options) -> np.ndarray:
    """Returns the indices of the images to evaluate, in order."""
    count = min(available, options.max_images or available)
    if count == available:
        return np.arange(available)
    rng = np.random.default_rng(options.seed)
    return np.sort(rng.choice(available, count, replace=False))


def evaluate(
    config: Config,
    params: Any,
    dataset: data.Dataset,
    chosen: np.ndarray,
    options: Options,
) -> Sums:
    """Returns the sums over the chosen images; the bar counts evaluations."""
    mesh = parallel.make_mesh()
    size = -(-min(options.batch_size, len(chosen)) // mesh.size) * mesh.size
    steps = config.diffusion.num_steps
    compiled = make_bound(config, options, mesh)
    sums = Sums(steps)
    bar = tqdm(
        total=len(chosen) * steps,
        unit=" evaluations",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for begin in range(0, len(chosen), size):
            indices = chosen[begin : begin + size]
            # A ragged last batch is filled up with its last image, and cut again.
            padded = np.pad(indices, (0, size - len(indices)), mode="edge")
            batch = data.batch_at(dataset, padded)["image"]
            index = np.pad(np.arange(begin, begin + len(indices)), (0, size))[:size]
            bits = compiled(params, parallel.shard({"x": batch, "i": index}, mesh))
            sums.add(bits, len(indices))
            bar.update(len(indices) * steps)
    return sums


def make_bound(
    config: Config, options: Options, mesh: Any
) -> Callable[[Any, dict[str, jax.Array]], likelihood.Bound]:
    """Returns the bound of a batch of uint8 images, compiled once."""
    net, levels = build.make_network(config, looped=True), build.make_schedule(config)
    diffusion = config.diffusion
    root = jax.random.key(options.seed)

    def bound(params: Any, batch: dict[str, jax.Array]) -> likelihood.Bound:
        denoise = gaussian.denoiser(
            lambda x, t: build.call(net, params, x, t),
            levels,
            diffusion.prediction,
            clip=True,
            learned_variance=diffusion.variance == "learned",
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch["i"])
        x0 = batch["x"].astype(jnp.float32) / 127.5 - 1
        return likelihood.bound(
            keys,
            denoise,
            levels,
            x0,
            variance=options.variance or diffusion.variance,
            chunk=options.chunk,
        )

    return jax.jit(bound)


def summary(
    config: Config, options: Options, sums: Sums, step: int, available: int
) -> dict[str, Any]:
    """Returns everything that belongs beside the number, as JSON has it."""
    count = len(sums.totals)
    terms = sums.terms / count
    spread = float(np.std(sums.totals, ddof=1)) if count > 1 else math.nan
    return {
        "bits_per_dim": float(np.mean(sums.totals)),
        "standard_error": spread / math.sqrt(count),
        "prior": float(sums.prior / count),
        "rate": float(sums.prior / count + terms[1:].sum()),
        "decoder": float(terms[0]),
        "rmse": float(127.5 * math.sqrt(sums.mse[0] / count)),
        "terms": terms.tolist(),
        "mse": (sums.mse / count).tolist(),
        "data": config.data.source,
        "split": options.split,
        "images": count,
        "subset": count < available,
        "evaluations": count * len(terms),
        "weights": "last" if options.raw else "averaged",
        "training_step": step,
        "variance": options.variance or config.diffusion.variance,
        "clip": True,
        "seed": options.seed,
        "versions": runs.versions(),
    }


def show(run: runs.Run, result: dict[str, Any]) -> None:
    """Prints the bound, its terms, and how they were computed."""
    images_ = f"{result['images']:,} {result['split']} images of {result['data']}"
    if result["subset"]:
        images_ += " (a random subset)"
    print(f"{run.folder}, {result['weights']} weights of step", end=" ")
    print(f"{result['training_step']:,}; {images_}")
    total, error = result["bits_per_dim"], result["standard_error"]
    print(f"  bound         {total:8.4f} +- {error:.4f} bits/dim")
    print(f"    prior L_T   {result['prior']:8.4f}")
    print(f"    L_1..L_T-1  {result['rate'] - result['prior']:8.4f}")
    print(f"    decoder L_0 {result['decoder']:8.4f}")
    print(f"  rate          {result['rate']:8.4f} bits/dim")
    print(f"  distortion    {result['rmse']:8.4f} of 255 (RMSE of x0 seen from x_1)")
    print(
        f"  variance {result['variance']}, x0 clipped, one draw of x_t an image and t"
    )
    print(f"  {result['evaluations']:,} network evaluations")


def show_rate_distortion(result: dict[str, Any], path: Path) -> None:
    """Prints Table 4 and plots Fig. 5 (Ho et al. 2020)."""
    code = likelihood.rate_distortion(result["prior"], result["terms"], result["mse"])
    rows = np.unique(np.linspace(0, len(code.steps) - 1, BEGINNING + 1).astype(int))
    print("  reverse steps   rate (bits/dim)   RMSE (of 255)")
    for row in rows[::-1]:
        rate, distortion = code.rate[row], code.distortion[row]
        print(f"  {code.steps[row]:13,}   {rate:15.5f}   {distortion:13.5f}")
    images.save(images.rate_distortion(code.steps, code.rate, code.distortion), path)
    print(f"plot: {path}")


if __name__ == "__main__":
    arguments.guarded(main)
