"""What is made of samples: pictures and, later, numbers."""

from diffusion_jax.evaluation import images

__all__ = ["images"]
