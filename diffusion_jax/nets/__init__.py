"""Networks, in Flax Linen: `init` and `apply` are pure functions of parameters."""

from diffusion_jax.nets import autoencoder, classifier, inception, unet

__all__ = ["autoencoder", "classifier", "inception", "unet"]
