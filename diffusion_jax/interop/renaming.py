"""Converts tensors to the names and layouts of other libraries, and back.

Our own name is the path of a parameter, "down0_block0/conv1/kernel"; a table says where
someone else has it, and how they lay it out. Values are never changed, only names and
the order of axes: there and back is the identity, to the bit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of a network, by our own names."""


class Place(NamedTuple):
    """Where someone else has one of our tensors."""

    name: str
    axes: tuple[int, ...] | None = None
    """Our axes in their order; None where the order is ours."""
    ones: int = 0
    """Axes of length 1 that follow, as in a convolution of one pixel."""


Names = Mapping[str, Place]
"""Places of all tensors of a network, by our own name."""


def wanted(names: Names, own: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the tensors that someone else must have, float32, by their names."""

    def theirs(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
        moved = shape if place.axes is None else tuple(shape[i] for i in place.axes)
        return (*moved, *[1] * place.ones)

    return {
        place.name: jax.ShapeDtypeStruct(theirs(own[name], place), np.float32)
        for name, place in names.items()
    }


def from_others(found: Mapping[str, Any], names: Names) -> dict[str, np.ndarray]:
    """Returns our tensors by our own names, from those of someone else, as `wanted`."""
    flat = {}
    for name, place in names.items():
        array = found[place.name]
        array = array.reshape(array.shape[: array.ndim - place.ones])
        if place.axes is not None:
            array = array.transpose(np.argsort(place.axes))
        flat[name] = np.asarray(array, order="C")
    return flat


def to_others(flat: Mapping[str, Any], names: Names) -> dict[str, np.ndarray]:
    """Returns our tensors, by our own names, as someone else has them: float32."""
    made = {}
    for name, place in names.items():
        array = np.asarray(flat[name], np.float32)
        if place.axes is not None:
            array = array.transpose(place.axes)
        array = array.reshape(*array.shape, *[1] * place.ones)
        made[place.name] = np.asarray(array, order="C")
    return made
