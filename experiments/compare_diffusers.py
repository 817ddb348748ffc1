"""Draws the same images with diffusers: `python -m experiments.compare_diffusers`.

Without FOLDER it lets diffusers build the CIFAR-10 network with random weights, saves
it as diffusers does, converts it, draws with both from the same noise, and prints by
how much the images differ. With FOLDER it does so with a network of your own. Of an
AutoencoderKL (--autoencoder: Stable Diffusion's, random) it encodes an image and
decodes latents with both. It needs PyTorch and diffusers: `pip install
'diffusion-jax[peers]'`.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import jax
import numpy as np
import tyro

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import autoencoder_config
from diffusion_jax.lab.network_files import (
    diffusers_config,
    diffusers_folder,
    networks,
)
from diffusion_jax.lab.network_files.diffusers_config import to_diffusers
from diffusion_jax.lab.network_files.records import Network
from diffusion_jax.lab.process import entry, replaceable
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count
from diffusion_jax.lab.wiring import autoencoders, chains
from diffusion_jax.nets.autoencoder import AutoencoderKL
from diffusion_jax.storage.waiting import Bar
from diffusion_jax.training import parallel
from experiments.configs import EXPERIMENTS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw."""

    folder: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")
    ] = None
    """A folder of diffusers; a random CIFAR-10 network when not given."""
    autoencoder: bool = False
    """Whether the random network is Stable Diffusion's autoencoder, at 256x256."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddim without noise, by so many steps; or ddpm, by all of them."""
    steps: Count = 50
    """Of ddim: a divisor of the number of diffusion steps."""
    count: Count = 1
    """Images."""
    seed: int = 0
    """Of the weights, where they are random, and of the noise."""
    keep: Path | None = None
    """Folder to leave the random network and its conversion in."""
    overwrite: bool = False
    """Whether a file may be replaced that this command did not write."""


def main(argv: Sequence[str]) -> int:
    """Prints the largest difference of any pixel; returns the exit code."""
    options = entry.parse(Options, argv, "compare_diffusers", __doc__)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        file = keep / "converted.safetensors"
        mark = networks.FORMAT.encode()
        replaceable.check_file(file, mark, overwrite=options.overwrite)
        if options.folder is None:
            diffusers_folder.check_replaceable(keep / "diffusers")
        folder = options.folder or build(
            keep / "diffusers", options.seed, autoencoder=options.autoencoder
        )
        compare(folder, file, options)
    return 0


def build(folder: Path, seed: int, *, autoencoder: bool = False) -> Path:
    """Returns the folder that diffusers saved a random network in."""
    torch, diffusers = diffusers_config.peers()
    torch.manual_seed(seed)
    if autoencoder:
        made = autoencoder_config.write_config(AutoencoderKL(), image_size=256)
        diffusers.AutoencoderKL.from_config(made).save_pretrained(folder)
        print(f"diffusers {diffusers.__version__}: a random autoencoder in {folder}")
        return folder
    unet, scheduler = to_diffusers(EXPERIMENTS["cifar10_official"].config)
    made = {k: v for k, v in unet.items() if not k.startswith("_")}
    pipeline = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(**made), diffusers.DDPMScheduler.from_config(scheduler)
    )
    pipeline.save_pretrained(folder)
    print(f"diffusers {diffusers.__version__}: a random network in {folder}")
    return folder


def compare(folder: Path, file: Path, options: Options) -> None:
    """Converts the folder, draws with both, and prints by how much they differ."""
    found = networks.find(folder)
    if found is None or found.kind not in ("diffusers", "autoencoder"):
        raise ConfigError(
            "FOLDER must be one that diffusers saved a UNet2DModel or an AutoencoderKL "
            f"in; got {folder}. Leave it out to compare a random network."
        )
    network = networks.read(found, progress=True)
    networks.write_file(file, network)
    print(f"converted: {file}")
    network = networks.read(networks.Found(file, "diffusion_jax"))
    if found.kind == "autoencoder":
        compare_autoencoder(folder, network, options)
        return
    config = chosen(network.config, options)
    began = time.monotonic()
    with jax.default_matmul_precision("highest"):
        draw = chains.make_draw(config, options.count, parallel.make_mesh(1))
        drawable = chains.Drawable(network.params, space=network.space)
        ours = draw(drawable, jax.random.key(options.seed), 0)
    between = time.monotonic()
    theirs = draw_there(folder, config, options)
    ended = time.monotonic()
    off = np.abs(ours - theirs)
    print(
        f"{options.count} x {config.data.shape[0]}x{config.data.shape[1]}, "
        f"{config.sample.steps} steps of {options.sampler}: here "
        f"{between - began:.0f} s with compilation, diffusers {ended - between:.0f} s"
    )
    print(f"images from {theirs.min():.3f} to {theirs.max():.3f}")
    print(f"largest difference {off.max():.1e}, mean {off.mean():.1e}")


def compare_autoencoder(folder: Path, network: Network, options: Options) -> None:
    """Encodes images and decodes latents with both, and prints how they differ."""
    torch, diffusers = diffusers_config.peers()
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    config, rng = network.config, np.random.default_rng(options.seed)
    shapes = config.data.shape, latents.latent_shape(config)
    x, z = (
        rng.uniform(-1, 1, (options.count, *shape)).astype(np.float32)
        for shape in shapes
    )
    encode, decode = (
        jax.jit(lambda params, x, m=m: autoencoders.apply(config, params, x, m))
        for m in ("encode", "decode")
    )

    def run() -> tuple[np.ndarray, ...]:
        with jax.default_matmul_precision("highest"):
            return jax.device_get(
                (*encode(network.params, x), decode(network.params, z))
            )

    run()  # compiles
    began = time.monotonic()
    ours = run()
    between = time.monotonic()
    with torch.no_grad():
        given = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (x, z))
        of = theirs.encode(next(given)).latent_dist
        there = of.mean, of.logvar, theirs.decode(next(given)).sample
    ended = time.monotonic()
    print(
        f"{options.count} x {shapes[0][0]}x{shapes[0][1]}, encoded and decoded: here "
        f"{between - began:.1f} s, diffusers {ended - between:.1f} s"
    )
    for name, one, other in zip(
        ("mean", "log variance", "images"), ours, there, strict=True
    ):
        off = np.abs(one - other.numpy().transpose(0, 2, 3, 1)).max()
        print(f"{name}: largest difference {off:.1e}, of up to {np.abs(one).max():.2f}")


def chosen(config: Config, options: Options) -> Config:
    """Returns the configuration with the rule that is compared."""
    total = config.diffusion.num_steps
    steps = options.steps if options.sampler == "ddim" else total
    if total % steps:
        raise ConfigError(
            f"steps must divide the {total} diffusion steps, for diffusers and us to "
            f"go through the same times; got {steps}. Change it with --steps."
        )
    if config.net.classes:
        raise ConfigError(
            f"the network must be without labels; got {config.net.classes} classes. "
            "Compare another."
        )
    sample = dataclasses.replace(config.sample, sampler=options.sampler, steps=steps)
    return dataclasses.replace(config, sample=sample)


def draw_there(folder: Path, config: Config, options: Options) -> np.ndarray:
    """Returns what diffusers draws from the noise that our chain draws from.

    Example i of a seed has the key fold_in(key(seed), i); fold 0 of that is its start,
    and fold n + 1 the noise of step n.
    """
    torch, diffusers = diffusers_config.peers()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}
    # "trailing" ends in data, and begins in pure noise, as our uniform grid does.
    scheduler = kind[options.sampler].from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(config.sample.steps)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(options.seed), np.arange(options.count)
    )

    @jax.jit
    def drawn(fold: jax.Array) -> jax.Array:
        noise = jax.vmap(
            lambda key: jax.random.normal(
                jax.random.fold_in(key, fold), latents.seen(config)
            )
        )(keys)
        return noise.transpose(0, 3, 1, 2)

    def noise(fold: int) -> Any:
        return torch.tensor(np.array(drawn(fold)))

    # What x0 is after the clip says what eps is. By default diffusers leaves eps as
    # it was before, and x_s is no longer made of the two.
    options_of_step = {"ddim": {"use_clipped_model_output": True}, "ddpm": {}}
    more = options_of_step[options.sampler]
    x, unet = noise(0), pipeline.unet.eval()
    times = Bar(scheduler.timesteps, "drawing with diffusers", unit="steps")
    drawn_by = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    with torch.no_grad():
        for n, t in enumerate(times):
            output = unet(x, t).sample
            # Its own noise is drawn there, and ours is put in its place.
            with mock.patch(drawn_by, lambda *_, n=n, **__: noise(n + 1)):
                x = scheduler.step(output, t, x, **more).prev_sample
        if latents.is_latent(config):
            vae = pipeline.vqvae.eval()
            x = vae.decode(x / vae.config.scaling_factor).sample
    return np.asarray(x.numpy().transpose(0, 2, 3, 1))


if __name__ == "__main__":
    entry.guarded(main)
