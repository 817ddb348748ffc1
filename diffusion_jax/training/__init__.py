"""The training machinery: any loss, any function, any pytree, any images."""

from diffusion_jax.training import checkpoint, data, parallel, state

__all__ = ["checkpoint", "data", "parallel", "state"]
