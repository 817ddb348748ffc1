"""Measures an autoencoder: `python -m experiments.eval_autoencoder [RUN]`.

Prints and writes how much of images is lost (PSNR, SSIM, L1, and the Frechet distance
of reconstructions by the extractor of eval_fid), what the latents are like, and of a
vae its bound in bits/dim; beside them what PCA reaches with as many numbers. Draws
pairs, what is decoded of noise, traversals of the latents, and paths between images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from diffusion_jax.data import datasets
from diffusion_jax.errors import counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import latent_pictures
from diffusion_jax.lab.measure import (
    extractors,
    linear,
    reconstruction,
    reference,
)
from diffusion_jax.lab.process import entry
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema import choices
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import trees
from diffusion_jax.training import parallel


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate."""

    MAIN: ClassVar = (
        "run data split max_images extractor weights batch_size seed raw average step"
    )
    run: choices.Named = None
    data: choices.Data = None
    split: Literal["train", "test"] = "test"
    """Images to evaluate: those trained on, or the test images or those held out."""
    max_images: Count | None = None
    """Evaluate only so many images, drawn at random; the result says so."""
    extractor: Literal["auto", "inception", "classifier", "none"] = "auto"
    """Whose features the distance is in; none leaves it out."""
    weights: str | None = None
    """File of the Inception weights: .pb, .tgz, .safetensors or .pth."""
    batch_size: Count = 64
    """Images at a time."""
    seed: Seed = 0
    """Of the noise and of the choice of images."""
    which: choices.Which = Weights()


def main(argv: Sequence[str]) -> int:
    """Prints and writes the numbers and pictures; returns the exit code."""
    options = entry.parse(Options, argv, "eval_autoencoder", __doc__)
    parallel.split_cpu()
    which, data = options.which, options.data
    run, config = opening.opened(
        options.run, options, which=which, data=data, autoencoder=True
    )
    trained = build.load_data(config)
    own = options.split == "train"
    dataset = trained if own else build.load_data(config, split=options.split)
    params, step, kind = weights.load(config, run, which)
    chosen = datasets.choose(len(dataset.images), options.max_images, options.seed)
    seen = reconstruction.see(
        config,
        params,
        dataset,
        chosen,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    found: dict[str, Any] = {
        **reconstruction.fidelity(seen),
        **reconstruction.latents(seen),
    }
    if config.autoencoder.kind == "vae":
        found["bound"] = reconstruction.bound(seen)
    if config.autoencoder.kind != "ae":
        found["kl_nats"] = float(seen.kl.mean())
    found |= compared(trained, seen) | distance(config, options, trained, seen)
    about = {
        "data": config.data.source,
        "split": options.split,
        "images": len(chosen),
        "subset": len(chosen) < len(dataset.images),
        "weights": kind,
        "weights_sha256": trees.digest(params),
        "training_step": step,
        "seed": options.seed,
        "versions": runs.versions(),
    }
    found |= about
    show(run, found)
    name = f"autoencoder_{options.split}"
    print(f"written: {results.write(run, name, found)}")
    drawn = latent_pictures.all_of(config, params, seen, options.seed)
    for what, picture in drawn.items():
        path = run.folder / "eval" / f"autoencoder_{what}.png"
        print(f"{what}: {pictures.save(picture, path)}")
    return 0


def compared(trained: datasets.Dataset, seen: reconstruction.Seen) -> dict[str, Any]:
    """Returns what PCA with as many numbers, of the training images, makes of these."""
    few = np.arange(min(len(trained.images), linear.MOST))
    found = None
    if seen.images[0].size <= linear.LARGEST:
        fitted = np.asarray(trained.images[few])
        found = linear.principal(fitted, seen.images, seen.mean[0].size)
    return {} if found is None else {"pca": found._asdict()}


def distance(
    config: Config,
    options: Options,
    trained: datasets.Dataset,
    seen: reconstruction.Seen,
) -> dict[str, Any]:
    """Returns the Frechet distance of the reconstructions from their images."""
    if options.extractor == "none":
        return {}
    kind, size = options.extractor, options.batch_size
    extractor = extractors.choose(kind, config, trained, weights=options.weights)
    more = "Evaluate more images, or leave the distance out by --extractor none."
    extractors.check_count(extractor, len(seen.images), more=more)
    real = reference.of(config, seen.images, options.split, extractor, batch_size=size)
    value = reference.distance_of(real, seen.again, extractor, batch_size=size)
    return {
        "distance": {"name": f"r{extractor.distance(len(seen.again))}", "value": value},
        "extractor_details": extractor.details,
    }


def show(run: runs.Run, found: dict[str, Any]) -> None:
    """Prints the numbers, and what they are of."""
    said = weights.describe(found["weights"], found["training_step"])
    count = counted(found["images"], f"{found['split']} image")
    some = " (a random subset)" if found["subset"] else ""
    print(f"{run.folder}, {said}; {count} of {found['data']}{some}")
    row = "  {:<26} {:10.4f}".format
    print(row("PSNR, mean of images", found["psnr"]), "dB")
    print(row("PSNR of the mean error", found["psnr_of_all"]), "dB")
    print(row("SSIM", found["ssim"]), f"with a window of {found['ssim_window']} pixels")
    print(row("L1", found["l1"]), "of 255")
    if "distance" in found:
        name = found["distance"]["name"]
        print(row(name, found["distance"]["value"]), "from the same images")
    if "bound" in found:
        bits = found["bound"]
        print(row("bound (ELBO)", bits["bits_per_dim"]), "bits/dim, one draw an image")
        print(row("  reconstruction", bits["reconstruction"]))
        print(row("  rate", bits["rate"]))
    if "pca" in found:
        pca = found["pca"]
        many = f"with {pca['components']} components"
        print(row("PCA: PSNR of the mean error", pca["psnr_of_all"]), f"dB, {many}")
        print(row("probabilistic PCA", pca["bits_per_dim"]), f"bits/dim, {many}")
    if "kl_nats" in found:
        print(row("KL from N(0, I)", found["kl_nats"]), "nats an image")
    active, units = found["active_units"], found["units"]
    print(f"  {active:,} of {units:,} units active (variance of the mean above 0.01)")
    for name in ("mean", "std", "excess_kurtosis"):
        each = " ".join(f"{value:.3g}" for value in found[f"channel_{name}"][:16])
        print(f"  {name.replace('_', ' ')} of the channels of latents: {each}")


if __name__ == "__main__":
    entry.guarded(main)
