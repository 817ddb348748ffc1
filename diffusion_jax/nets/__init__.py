"""Networks, in Flax Linen: `init` and `apply` are pure functions of parameters."""

from diffusion_jax.nets import classifier, unet

__all__ = ["classifier", "unet"]
