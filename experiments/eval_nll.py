"""Bounds the negative log-likelihood: `python -m experiments.eval_nll [RUN]`.

Computes the paper's bound over the whole chain in bits/dim, with one draw of x_t for
each image and each of the T steps, averaged weights (EMA) and x0 clipped.
`--rate-distortion` adds the paper's Table 4 and Fig. 5. `--ode` computes another
quantity: the density under the probability flow ODE of the same network, of images with
uniform noise added (dequantised).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from diffusion_jax import likelihood
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import bound
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import choices, latents
from diffusion_jax.lab.schema.checks import of_denoiser
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.schema.sampling import Tolerance, Variance
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build

TABLE_ROWS = 11
"""Rows of the printed table of rate and distortion."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate."""

    MAIN: ClassVar = (
        "run data split max_images variance batch_size chunk seed "
        "rate_distortion ode trace tolerance raw average step"
    )
    run: choices.Named = None
    data: choices.Data = None
    split: Literal["train", "test"] = "train"
    """Images to evaluate: those trained on, or the test images or those held out."""
    max_images: Count | None = None
    """Evaluate only so many images, drawn at random; the result says so."""
    variance: Variance | None = None
    """Variance of the reverse steps; the configured one when not given. analytic is
    the best there is for the network, estimated from the training images."""
    batch_size: Count = 64
    """Images at a time, over all devices."""
    chunk: Count = 1
    """Diffusion steps at a time; more is faster on an accelerator and takes memory."""
    seed: Seed = 0
    """Of the noise and of the choice of images."""
    which: choices.Which = Weights()
    rate_distortion: bool = False
    """Whether to print and plot rate and distortion over the reverse steps."""
    ode: bool = False
    """Whether to evaluate the density of the probability flow instead of the bound."""
    trace: bound.Trace = "rademacher"
    """How --ode computes the divergence: by random probes or exactly."""
    probes: Count = 1
    """Random probes an image, for --ode."""
    tolerance: Tolerance = 1e-5
    """Tolerance of the solver of --ode, relative and absolute."""


def main(argv: Sequence[str]) -> int:
    """Prints and writes the bound and its terms; returns the exit code."""
    options = entry.parse(Options, argv, "eval_nll", __doc__)
    check(options)
    if options.rate_distortion:
        pictures.check_plots()
    which, data = options.which, options.data
    run, config = opening.opened(options.run, options, which=which, data=data)
    of_denoiser(config)
    if latents.is_latent(config) and options.rate_distortion:
        raise ConfigError(
            "--rate-distortion must be left out with a latent run, whose bits are of "
            "latents and no error of pixels. Leave it out."
        )
    dataset = build.load_data(config, split=options.split)
    variance = variance_of(config, options)
    drawable, step, kind = opening.load(config, run, which, variance=variance)
    chosen = datasets.choose(len(dataset.images), options.max_images, options.seed)
    about = {
        "data": config.data.source,
        "split": options.split,
        "images": len(chosen),
        "subset": len(chosen) < len(dataset.images),
        "weights": kind,
        "weights_sha256": drawable.sha256,
        "training_step": step,
        "seed": options.seed,
        "versions": runs.versions(),
    }
    out = run.folder / "eval"
    what = config, drawable, dataset, chosen
    size, seed = options.batch_size, options.seed
    if options.ode:
        found = bound.evaluate_ode(
            *what,
            trace=options.trace,
            probes=options.probes,
            tolerance=options.tolerance,
            batch_size=size,
            seed=seed,
        )
        name = f"nll_ode_{options.split}"
        result = summary_ode(options, found, about)
        show_ode(run, result)
    else:
        sums = bound.evaluate(
            *what,
            variance=options.variance,
            batch_size=size,
            chunk=options.chunk,
            seed=seed,
        )
        name = f"nll_{options.split}"
        result = summary(config, options, sums, about)
        show(run, result)
    path = results.write(run, name, result)
    print(f"written: {path}")
    if options.rate_distortion:
        show_rate_distortion(result, out / f"rate_distortion_{options.split}.png")
    return 0


def variance_of(config: Config, options: Options) -> Variance:
    """Returns the variance of the reverse steps.

    Raises:
      ConfigError: the network was not trained for it.
    """
    own = config.diffusion.variance
    asked = options.variance or own
    if asked in ("learned", "range") and asked != own:
        raise ConfigError(
            "variance must be one that the network was trained for, small, large or "
            f"analytic; got {asked} with a run of variance {own}. Change it with "
            "--variance."
        )
    return asked


def check(options: Options) -> None:
    """Raises ConfigError where options do not fit together."""
    given = {
        "--variance": options.variance is not None,
        "--rate-distortion": options.rate_distortion,
    }
    extra = [flag for flag, there in given.items() if there]
    if options.ode and extra:
        raise ConfigError(
            "--ode must stand without --variance and --rate-distortion, which are of "
            f"the bound; got {' and '.join(extra)}. Run the command once for each."
        )


def summary_ode(
    options: Options, found: np.ndarray, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Returns the flow's bits/dim and everything that belongs beside them."""
    about = {
        "evaluations_per_image": float(found[:, 1].mean()),
        "tolerance": options.tolerance,
        "trace": options.trace,
        "dequantisation": "uniform",
        "clip": False,
    }
    if options.trace != "exact":
        about["probes"] = options.probes
    return {
        "quantity": "probability flow, Eq. 39 of Song et al. 2021",
        **_mean(found[:, 0]),
        **about,
        **protocol,
    }


def summary(
    config: Config, options: Options, sums: bound.Sums, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Returns everything that belongs beside the number, as JSON has it."""
    count = len(sums.totals)
    terms = sums.terms / count
    about: dict[str, Any] = {}
    if latents.is_latent(config):
        error = float(sums.reconstruction / count)
        rate = float(np.mean(sums.totals)) - error
        about = {"reconstruction": error, "latents": rate, "of": "latents"}
    return {
        **_mean(np.array(sums.totals)),
        **about,
        "prior": float(sums.prior / count),
        "rate": float(sums.prior / count + terms[1:].sum()),
        "decoder": float(terms[0]),
        "rmse": float(127.5 * math.sqrt(sums.mse[0] / count)),
        "terms": terms.tolist(),
        "mse": (sums.mse / count).tolist(),
        "evaluations": count * len(terms),
        "variance": options.variance or config.diffusion.variance,
        "clip": not latents.is_latent(config),
        **protocol,
    }


def _mean(totals: np.ndarray) -> dict[str, float | None]:
    mean, error = bound.mean(totals)
    return {"bits_per_dim": mean, "standard_error": error}


def _plus_minus(error: float | None) -> str:
    """The standard error, which one image does not have."""
    return "" if error is None else f" +- {error:.4f}"


def show_ode(run: runs.Run, result: dict[str, Any]) -> None:
    """Prints the flow's bits/dim, and how they were computed."""
    _show_protocol(run, result)
    total, error = result["bits_per_dim"], result["standard_error"]
    print(f"  probability flow {total:8.4f}{_plus_minus(error)} bits/dim")
    print(f"  {result['evaluations_per_image']:.1f} evaluations an image, ", end="")
    print(f"tolerance {result['tolerance']:g}")
    trace = f"{result['trace']} trace"
    if "probes" in result:
        trace = f"{counted(result['probes'], result['trace'] + ' probe')}"
    print(f"  {trace}, uniform dequantisation, x0 not clipped")
    print("  not to be compared with the bound, which is of another model")


def _show_protocol(run: runs.Run, result: dict[str, Any]) -> None:
    count = counted(result["images"], f"{result['split']} image")
    images_ = f"{count} of {result['data']}"
    if result["subset"]:
        images_ += " (a random subset)"
    said = weights.describe(result["weights"], result["training_step"])
    print(f"{run.folder}, {said}; {images_}")


def show(run: runs.Run, result: dict[str, Any]) -> None:
    """Prints the bound, its terms, and how they were computed."""
    _show_protocol(run, result)
    total, error = result["bits_per_dim"], result["standard_error"]
    print(f"  bound         {total:8.4f}{_plus_minus(error)} bits/dim")
    if "of" in result:
        print(f"    -log p(x|z) {result['reconstruction']:8.4f}")
        print(f"    latents     {result['latents']:8.4f}, less what noise they have")
        print("  one draw of latents an image; x0 of latents is not clipped")
        print(f"  {result['evaluations']:,} network evaluations")
        return
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
    rows = np.unique(np.linspace(0, len(code.steps) - 1, TABLE_ROWS).astype(int))
    print("  reverse steps   rate (bits/dim)   RMSE (of 255)")
    for row in rows[::-1]:
        rate, distortion = code.rate[row], code.distortion[row]
        print(f"  {code.steps[row]:13,}   {rate:15.5f}   {distortion:13.5f}")
    pictures.save(
        pictures.rate_distortion(code.steps, code.rate, code.distortion), path
    )
    print(f"plot: {path}")


if __name__ == "__main__":
    entry.guarded(main)
