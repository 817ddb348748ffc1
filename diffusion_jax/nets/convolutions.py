"""Convolutions and products of activations, in the forms that were measured to be fast.

Products have derivatives that move less memory than JAX's own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.nets.norm import Parts, as_varying, spans

LARGE = 16 * 16
"""From so many pixels a GPU is faster by `_by_corners`."""


def convolved(
    x: jax.Array,
    kernel: jax.Array,
    edges: str | Sequence[tuple[int, int]],
    window_strides: Sequence[int] = (1, 1),
    **options: Any,
) -> jax.Array:
    """Returns the convolution with such padding; options are `jax.lax`'s."""
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides, edges, dimension_numbers=names, **options
    )


def repeated(x: jax.Array) -> jax.Array:
    """Returns each pixel as a square of four, [B, 2H, 2W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _after_repeating(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolved(repeated(x), kernel, ((1, 1), (1, 1)))


@jax.custom_vjp
def doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the convolution of `repeated(x)`, in 4 / 9 of its arithmetic.

    The four pixels of a square are the same: sums of the kernel, 4x4, read every second
    pixel in place of all. Which form is faster where has been measured.
    """
    large = x.shape[1] * x.shape[2] >= LARGE
    return jax.lax.platform_dependent(
        x, kernel, cpu=_spread, default=_by_corners if large else _after_repeating
    )


def _doubled_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return doubled(x, kernel), (x, kernel)


def _doubled_backward(
    kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: _spread(x, kernel), x)(gradient)
    (of_kernel,) = jax.linear_transpose(lambda k: _after_repeating(x, k), kernel)(
        gradient
    )
    return of_x, of_kernel


doubled.defvjp(_doubled_forward, _doubled_backward)


def _four(kernel: jax.Array) -> jax.Array:
    """Returns the sums of a 3x3 kernel that repeated pixels meet, [4, 4, C, C']."""
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    for axis in range(2):
        edges = [[(0, 0)] * 4, [(0, 0)] * 4]
        edges[0][axis], edges[1][axis] = (0, 1), (1, 0)
        wide = jnp.pad(wide, edges[0]) + jnp.pad(wide, edges[1])
    return wide.astype(kernel.dtype)


def _spread(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `doubled`, as a convolution of x with a zero after each pixel."""
    return convolved(x, _four(kernel), ((2, 2), (2, 2)), lhs_dilation=(2, 2))


def _by_corners(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `doubled`, as a 2x2 convolution to the four corners of each square."""
    batch, height, width, channels = x.shape
    four = _four(kernel).reshape(2, 2, 2, 2, channels, -1)
    four = four.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, channels, -1)
    made = convolved(x, four, ((1, 1), (1, 1)))
    made = made.reshape(batch, height + 1, width + 1, 2, 2, -1)
    rows = [
        jnp.stack([made[:, i : i + height, j : j + width, i, j] for j in (0, 1)], 3)
        for i in (0, 1)
    ]
    return jnp.stack(rows, 2).reshape(batch, 2 * height, 2 * width, -1)


def by_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns a convolution to few channels, in float32, as a product and nine shifts.

    One product gives what every pixel adds to each of its neighbours, summed and left
    in float32. A convolution would read x nine times for a few channels.
    """
    _, height, width, _ = x.shape
    rows = kernel.transpose(2, 0, 1, 3).reshape(x.shape[-1], -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    given = jax.lax.dot_general(
        x, rows, (((3,), (0,)), ((), ())), preferred_element_type=wide
    )
    given = given.reshape(*x.shape[:3], 3, 3, -1)
    given = jnp.pad(given, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    taps = [
        given[:, i : i + height, j : j + width, i, j]
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps[1:], taps[0])


def patches(x: jax.Array, strides: int, before: int) -> jax.Array:
    """Returns the 3x3 neighbourhood of every output pixel, [B, H', W', 9 C]."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    height, width = height + before - 1, width + before - 1
    rows, columns = (slice(0, n, strides) for n in (height, width))
    shifted = (x[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return jnp.concatenate([y[:, rows, columns] for y in shifted], axis=-1)


def product(parts: Parts, kernel: jax.Array) -> jax.Array:
    """Returns the product of an activation with a kernel, [B, H, W, C'].

    The parts are not concatenated, nor are their gradients, which come of one product.
    The gradient of the kernel is summed and left in float32.

    Args:
      parts: the activation, [B, H, W, C_i] each; C is the sum of their channels.
      kernel: [C, C'], in float32 or the type of the parts.

    >>> x = jnp.ones([2, 1, 1, 3])
    >>> print(product((x, x), jnp.ones([6, 1])).ravel())
    [6. 6.]
    """
    return _product(parts, as_varying(kernel, parts[0]))


@jax.custom_vjp
def _product(parts: Parts, kernel: jax.Array) -> jax.Array:
    kernel = kernel.astype(parts[0].dtype)
    # On a GPU a convolution, since a sum with its result is part of the same pass.
    sums = [
        jax.lax.platform_dependent(x, kernel[at], cpu=jnp.matmul, default=_pointwise)
        for x, at in zip(parts, spans(parts), strict=True)
    ]
    return functools.reduce(lambda total, y: y + total, sums)


def _pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolved(x, kernel[None, None], ((0, 0), (0, 0)))


def _product_forward(
    parts: Parts, kernel: jax.Array
) -> tuple[jax.Array, tuple[Parts, jax.Array]]:
    return _product(parts, kernel), (parts, kernel)


def _product_backward(
    kept: tuple[Parts, jax.Array], gradient: jax.Array
) -> tuple[Parts, jax.Array]:
    parts, kernel = kept
    back = jnp.einsum("...d,cd->...c", gradient, kernel.astype(gradient.dtype))
    of_parts = tuple(back[..., at] for at in spans(parts))
    flat = gradient.reshape(-1, gradient.shape[-1])
    rows = [
        jnp.einsum(
            "nc,nd->cd",
            x.reshape(-1, x.shape[-1]),
            flat,
            preferred_element_type=_wide(x),
        )
        for x in parts
    ]
    return of_parts, jnp.concatenate(rows).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Returns softmax(scale q k^T) v, [B, T, C], in the type of v.

    The softmax is computed in float32 whatever the type. The backward pass keeps its
    result and the output, in the type of v, but no scores (Dao et al. 2022).

    Args:
      q: queries, [B, T, C].
      k: keys, as q.
      v: values, as q.
      scale: of the scores.
    """
    return _attend_forward(q, k, v, scale)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = _wide(q)
    scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * scale).astype(v.dtype)
    out = jnp.einsum("bqk,bkc->bqc", weights, v)
    return out, (q, k, v, weights, out)


def _attend_backward(
    scale: float, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    q, k, v, weights, out = kept
    wide = _wide(q)
    of_weights = jnp.einsum("bqc,bkc->bqk", gradient, v, preferred_element_type=wide)
    # The mean of these by the weights, from the output.
    mean = (gradient.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    of_scores = weights.astype(wide) * (of_weights - mean) * scale
    of_scores = of_scores.astype(q.dtype)
    return (
        jnp.einsum("bqk,bkc->bqc", of_scores, k),
        jnp.einsum("bqk,bqc->bkc", of_scores, q),
        jnp.einsum("bqk,bqc->bkc", weights, gradient),
    )


attend.defvjp(_attend_forward, _attend_backward)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
