"""Scores and pictures of samples."""

from typing import TYPE_CHECKING

from diffusion_jax._on_demand import on_demand

if TYPE_CHECKING:
    from diffusion_jax.evaluation import metrics, moments, pictures

__all__ = ["metrics", "moments", "pictures"]

__getattr__, __dir__ = on_demand(__name__, __all__)
