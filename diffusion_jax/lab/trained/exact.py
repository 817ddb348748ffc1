"""A trained network in float64, where machines differ by 1e-15 and not by 1e-6."""

from collections.abc import Callable

import jax
import numpy as np

from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.wiring import chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import parallel

Denoise64 = Callable[..., np.ndarray]
"""From x_t [B, H, W, C], a time t and the index of the first image, 0 where it is not
given, to x0; images are float64."""


def denoise64(
    config: Config, drawable: Drawable, *, mesh: jax.sharding.Mesh | None = None
) -> Denoise64:
    """Returns x0 as the network sees it in float64, whatever type it was trained in.

    As the chains of the configuration see it: clipped, given labels and guided as
    config.sample says. JAX computes in float64 inside the function alone. The index of
    the first image decides its class, where all classes are drawn in turn.

    Args:
      config: of the network, with the way to sample.
      drawable: its weights.
      mesh: the devices that share a batch, if it can be shared equally; all when not
        given.
    """
    config, mesh = replace(config, "net", dtype="float64"), mesh or parallel.make_mesh()
    everywhere = parallel.replicated(mesh)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawable)
        wide = jax.device_put(wide, everywhere)

    @jax.jit
    def see(
        drawable: Drawable, x: jax.Array, t: jax.Array, first: jax.Array
    ) -> jax.Array:
        return chains.make_denoiser(config, drawable, first=first)(x, t).x0

    def denoise(x: np.ndarray, t: int, first: int = 0) -> np.ndarray:
        shared = len(x) % mesh.size == 0
        with jax.enable_x64(True):
            placed = parallel.sharded(mesh) if shared else everywhere
            on_devices = jax.device_put(np.asarray(x, np.float64), placed)
            return np.asarray(see(wide, on_devices, t, first))

    return denoise
