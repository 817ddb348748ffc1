"""The training machinery: any loss, any function, any pytree, any batches."""

from typing import TYPE_CHECKING

from diffusion_jax._on_demand import on_demand

if TYPE_CHECKING:
    from diffusion_jax.training import parallel, state

__all__ = ["parallel", "state"]

__getattr__, __dir__ = on_demand(__name__, __all__)
