"""Counts the arithmetic of a function: its matrix products and convolutions.

The count is of the mathematics and not of a program: it is read off the traced function
before any compiler has seen it, so it is the same on every device, and what a compiler
computes twice, or fuses, changes nothing. Additions over elements are left out: they
cost memory traffic, and hardly arithmetic.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

PRODUCT, CONVOLUTION = "dot_general", "conv_general_dilated"


def count(
    function: Callable[..., Any],
    *args: Any,
    kinds: tuple[str, ...] = (PRODUCT, CONVOLUTION),
) -> int:
    """Returns the floating-point operations of a function, two a multiply-add.

    Args:
      function: of arrays; its matrix products and convolutions are counted, as often as
        loops of known length take them.
      args: arrays, or `jax.ShapeDtypeStruct` in their place.
      kinds: what is counted, of PRODUCT and CONVOLUTION.

    Raises:
      ValueError: a `while` loop, whose length is not known before it runs.

    >>> a, b = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 3), (3, 5)))
    >>> count(lambda a, b: a @ b, a, b)
    60
    >>> count(lambda a, b: a @ b, a, b, kinds=(CONVOLUTION,))
    0
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr, kinds)


def _of(jaxpr: core.Jaxpr, kinds: tuple[str, ...]) -> int:
    return sum(_equation(eqn, kinds) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn, kinds: tuple[str, ...]) -> int:
    name = eqn.primitive.name
    if name in (PRODUCT, CONVOLUTION) and name not in kinds:
        return 0
    if name == PRODUCT:
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shared = [_shape(eqn.invars[0])[axis] for axis in contracted]
        return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(shared)
    if name == CONVOLUTION:
        return _convolution(eqn)
    inner = [_of(each, kinds) for each in _inside(eqn)]
    if name == "while" and any(inner):
        raise ValueError(
            "loops must be of known length to be counted; got a while loop with matrix "
            "products. Count what it repeats instead."
        )
    if name == "cond":
        return max(inner, default=0)
    return int(eqn.params.get("length", 1) if name == "scan" else 1) * sum(inner)


def _convolution(eqn: core.JaxprEqn) -> int:
    """Counts padding as usual, but not the holes that the gradient of strides makes."""
    p, kernel = eqn.params, _shape(eqn.invars[1])
    _, rhs, out = p["dimension_numbers"]
    y, products = _shape(eqn.outvars[0]), 1
    for axis, (low, _) in enumerate(p["padding"]):
        place = np.arange(y[out[2 + axis]])[:, None] * p["window_strides"][axis] - low
        at = place + np.arange(kernel[rhs[2 + axis]]) * p["rhs_dilation"][axis]
        products *= int((at % p["lhs_dilation"][axis] == 0).sum())
    return 2 * y[out[0]] * y[out[1]] * kernel[rhs[1]] * products


def _inside(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the functions that an equation calls."""
    for value in eqn.params.values():
        for each in value if isinstance(value, list | tuple) else (value,):
            inner: Any = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                yield inner


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)
