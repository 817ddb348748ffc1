"""What commands and notebooks share: configurations, runs, trained networks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_jax.lab.autoencoder import TrainedAutoencoder
    from diffusion_jax.lab.notebook import Trained, distil, load, train
    from diffusion_jax.lab.schema.config import (
        Config,
        Data,
        Diffusion,
        Net,
        Optimizer,
        Train,
    )
    from diffusion_jax.lab.schema.sampling import Sample

__all__ = [
    "Config",
    "Data",
    "Diffusion",
    "Net",
    "Optimizer",
    "Sample",
    "Train",
    "Trained",
    "TrainedAutoencoder",
    "distil",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Returns what a notebook uses, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = (
        "notebook"
        if name in ("Trained", "TrainedAutoencoder", "distil", "load", "train")
        else "schema.config"
    )
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    """Returns the names that a notebook uses."""
    return list(__all__)
