"""Networks, in Flax Linen: `init` and `apply` are pure functions of parameters."""

from diffusion_jax.nets import classifier, inception, unet

__all__ = ["classifier", "inception", "unet"]
