"""Small networks with random weights, to be written to files and read back."""

import dataclasses

import jax
import numpy as np
from flax import traverse_util

from diffusion_jax.lab.network_files import networks, records
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import Net, replace
from diffusion_jax.lab.wiring import build, latent_space
from experiments.configs import EXPERIMENTS

ABOUT = records.About("averaged", 12, "the run small", {}, recipe=True)
# Two levels with attention in one, so that every kind of tensor is there.
NET = Net(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4)


def small(name="digits", **fields):
    """An experiment with a small network."""
    config = EXPERIMENTS[name].config
    kept = {field: getattr(config.net, field) for field in ("classes", "fourier")}
    net = dataclasses.replace(NET, **(kept | fields))
    return dataclasses.replace(config, net=net)


def network_of(config, seed=0):
    """Random parameters, none of them trivial; of latents with an autoencoder."""
    rng = np.random.default_rng(seed)

    def random(like):
        draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
        return jax.tree.map(draw, like)

    made = records.Network(config, random(build.param_shapes(config)), ABOUT, "")
    if not latents.is_latent(config):
        return made
    space = latent_space.of_tree(random(latent_space.shapes(config)))
    scale = space.scale._replace(scale=np.exp(space.scale.scale))
    return made._replace(space=space._replace(scale=scale))


def of_latents():
    """A small network of the latents of a small autoencoder."""
    config = small("digits_latent", attention=(2,))
    own = EXPERIMENTS["digits_autoencoder"].config.autoencoder
    own = dataclasses.replace(own, channels=8, groups=4)
    return dataclasses.replace(config, autoencoder=own)


def read(path, **options):
    found = networks.find(path)
    assert found is not None
    return networks.read(found, **options)


def any_bits(shapes):
    """Parameters of any bits that are numbers: subnormal, huge and -0 among them."""
    rng = np.random.default_rng(0)

    def draw(shape):
        values = rng.integers(2**32, size=shape, dtype=np.uint32).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(-0.0))

    flat = {key: draw(shape) for key, shape in shapes.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same_bits(one, other):
    """Of -0 and 0 too."""
    same(one, other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, np.float32)
        np.testing.assert_array_equal(a, b)


EXPORTED = {
    "digits": small(),
    "labels": small("digits_conditional"),
    "learned range": small("digits_cosine_hybrid"),
    "variant": small(variant="diffusers"),
    "no attention": small(attention=()),
    "wide": replace(small(), "data", image_size=(8, 16)),
    "betas": replace(small(), "diffusion", schedule="warmup10", prediction="eps"),
}
