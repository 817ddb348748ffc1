"""What is made of samples: pictures and numbers."""

from diffusion_jax.evaluation import images, metrics, moments

__all__ = ["images", "metrics", "moments"]
