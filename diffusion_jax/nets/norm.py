"""Group normalisation with SiLU and dropout, in few passes over memory.

It takes an activation in several parts, such as a skip connection and what it joins,
and normalises them as if they were concatenated: a group may begin in one part and end
in the next. The result is one array. The biases before and the dropout after are part
of the same passes.

The forward pass reads the activation for the statistics, then reads and writes it; the
backward pass reads it and the gradient twice, and writes once. Left to JAX, the forward
pass alone would keep several activations in float32.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.nets import dropout

Parts = tuple[jax.Array, ...]
COMPUTED, READ = 128, 1024
"""Pixels a GPU sums at a time: of values computed on the way, of values only read."""


def group_norm(
    parts: Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    *,
    silu: bool = False,
    shift: jax.Array | None = None,
    of_images: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep: float = 1.0,
) -> jax.Array:
    """Returns the normalised parts as one array, [B, H, W, C].

    y = (x + shift - mean) / sqrt(variance + epsilon) scale + bias, with mean and
    variance of each image's groups (Wu and He 2018), then SiLU and dropout where they
    are asked for. Statistics are in float32, the result is in the type of the parts.

    A channel's sums are of x - c and (x - c)^2, with c its middle pixel, so the mean
    may be any multiple of the deviation. With n pixels of deviation s, c is at most
    sqrt(n) s from their mean: at worst, where all pixels but c are alike, the variance
    has n times the relative error of a sum, and otherwise that of a few roundings.

    The backward pass is our own and keeps the parts, the mask and a few numbers a
    channel. There is no forward derivative (`jax.jvp`).

    Args:
      parts: activations, each [B, H, W, C_i]; C is the sum of their channels.
      scale: of each channel, [C].
      bias: of each channel, [C].
      groups: number of groups.
      epsilon: added to the variance.
      silu: whether SiLU follows.
      shift: added to each channel before the normalisation, [C].
      of_images: added to each channel of each image before it, [B, C].
      mask: of dropout, packed by `dropout.mask`.
      keep: of dropout, the probability that a value is kept.

    >>> x = jax.random.normal(jax.random.key(0), [2, 4, 4, 8])
    >>> y = group_norm((x,), jnp.ones(8), jnp.zeros(8), 4, 1e-6)
    >>> print(f"{y.mean():.3f} {y.std():.3f}")
    0.000 1.000
    """
    shift = jnp.zeros_like(bias) if shift is None else shift
    scale, bias, shift = (as_varying(v, parts[0]) for v in (scale, bias, shift))
    given = Inputs(parts, scale, bias, shift, of_images, mask)
    return _group_norm(Constants(groups, epsilon, silu, keep), given)


class Inputs(NamedTuple):
    """The arrays that `group_norm` takes."""

    parts: Parts
    scale: jax.Array
    bias: jax.Array
    shift: jax.Array
    of_images: jax.Array | None
    mask: jax.Array | None


class Constants(NamedTuple):
    """Its other arguments, known when the program is compiled."""

    groups: int
    epsilon: float
    silu: bool
    keep: float


class Kept(NamedTuple):
    """What is kept for the backward pass."""

    given: Inputs
    line: "Line"
    rstd: jax.Array
    """1 / sqrt(variance + epsilon) of each channel's group, [B, C]."""
    off: jax.Array
    """The mean of each channel less that of its group, [B, C]."""


class Line(NamedTuple):
    """The normalised value as a function of x: (x - mean) slope + bias, [B, C]."""

    mean: jax.Array
    """Of each channel's group, less the channel's shift."""
    slope: jax.Array
    bias: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _group_norm(how: Constants, given: Inputs) -> jax.Array:
    return _forward(how, given)[0]


# A network has many of few shapes: with a jit of its own, each shape is traced once.
@functools.partial(jax.jit, static_argnums=0)
def _forward(how: Constants, given: Inputs) -> tuple[jax.Array, Kept]:
    kept = _statistics(how, given)
    x = jnp.concatenate(given.parts, axis=-1)
    _, y = _normalised(_wide(x), kept.line)
    y = jax.nn.silu(y) if how.silu else y
    return _dropped(y, how, given, 0).astype(x.dtype), kept


def _statistics(how: Constants, given: Inputs) -> Kept:
    """Returns the statistics of each channel, from one pass over the parts."""
    size = len(given.scale) // how.groups
    moments = zip(*map(_moments, given.parts), strict=True)
    own, variance = (jnp.concatenate(of_parts, axis=-1) for of_parts in moments)
    shift = given.shift[None]
    if given.of_images is not None:
        shift += given.of_images
    own += shift
    # Relative to the first channel of the group, so that one sum over it is enough.
    start = own[:, ::size].repeat(size, axis=-1)
    apart = own - start
    between, spread = _of_groups((apart, variance + jnp.square(apart)), size)
    rstd = jax.lax.rsqrt(spread - jnp.square(between) + how.epsilon)
    mean, slope = start + between - shift, rstd * given.scale[None]
    bias = jnp.broadcast_to(given.bias[None], slope.shape)
    # A barrier, or XLA would compute these anew for every pixel.
    line = Line(*jax.lax.optimization_barrier((mean, slope, bias)))
    return Kept(given, line, rstd, apart - between)


@functools.partial(jax.jit, static_argnums=0)
def _backward(how: Constants, kept: Kept, gradient: jax.Array) -> tuple[Inputs]:
    """Returns the gradients with respect to the inputs.

    With u = (x - mean) / deviation and d the gradient by y = scale u + bias, that by x
    is (scale d - M(scale d) - u M(scale d u)) / deviation, with M the mean over a
    group. The sums of d and d u over a channel give M, and over the batch the gradients
    by bias and scale. That by the shift is the sum over the pixels of that by x, which
    takes no pass of its own, since the mean of u is known.
    """
    given, scale, rstd = kept.given, kept.given.scale, kept.rstd
    size, pixels = len(scale) // how.groups, _pixels(given.parts[0])

    def at_y(y: jax.Array, g: jax.Array, copy: int) -> Any:
        if not how.silu:
            return g
        y = _again(y, copy)
        s = jax.nn.sigmoid(y)
        return g * s * (1 + y * (1 - s))

    first, second, third = (
        _dropped(_wide(gradient), how, given, copy) for copy in (1, 2, 3)
    )
    z, y = _normalised(_wide(jnp.concatenate(given.parts, axis=-1)), kept.line)
    sums = _sums(at_y(y, first, 1), at_y(y, second, 2) * z, COMPUTED)
    of_d, of_dz = jax.lax.optimization_barrier(sums)
    of_du = rstd * of_dz
    groups = _of_groups((of_d * scale[None], of_du * scale[None]), size)
    p, q = (rstd / pixels * mean for mean in groups)
    # Part by part, since the gradient of each is read by other operations.
    values, where = (third, p, rstd * q, *kept.line), spans(given.parts)
    cut = [[v[..., at] for at in where] for v in values]
    of_parts = []
    for x, g_i, *pq, mean, slope, bias in zip(given.parts, *cut, strict=True):
        z, y = _normalised(_wide(x), Line(mean, slope, bias))
        p_i, q_i = (v[:, None, None] for v in pq)
        of_x = slope[:, None, None] * at_y(y, g_i, 3) - p_i - z * q_i
        of_parts.append(of_x.astype(x.dtype))
    of_shift = kept.line.slope * of_d - pixels * (p + q * kept.off * rstd)
    of_scale, of_bias, of_all = (
        total.astype(vector.dtype)
        for total, vector in zip(
            _reduced((of_du, of_d, of_shift), 0),
            (scale, given.bias, given.shift),
            strict=True,
        )
    )
    of_images = None
    if given.of_images is not None:
        of_images = of_shift.astype(given.of_images.dtype)
    return (Inputs(tuple(of_parts), of_scale, of_bias, of_all, of_images, None),)


_group_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _again(x: jax.Array, copy: int) -> jax.Array:
    """Returns x, hidden from XLA so that what is computed of it is computed again.

    Of two equal computations XLA keeps one and writes its result to memory, in float32,
    for all that read it. Where both end up in one kernel, a later compiler finds them
    equal and computes one. A CPU has caches, and gains nothing.

    Args:
      x: an array.
      copy: another number for each use.
    """

    def other(x: jax.Array) -> jax.Array:
        words = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        turned = jax.lax.bitcast_convert_type(x, words) ^ copy
        return jax.lax.bitcast_convert_type(turned ^ copy, x.dtype)

    return jax.lax.platform_dependent(x, cpu=lambda x: x, default=other)


@_again.defjvp
def _again_jvp(copy: int, primals: Any, tangents: Any) -> Any:
    return _again(*primals, copy), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sums(one: jax.Array, other: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of two activations over the pixels, [B, C] each.

    Both from one pass, over rows of at most so many pixels first.
    """
    # A CPU adds one by one: the shorter the rows, the fewer the roundings.
    few, many = (functools.partial(_in_rows, most=n) for n in (16, most))
    return jax.lax.platform_dependent(one, other, cpu=few, default=many)


@_sums.defjvp
def _sums_jvp(most: int, primals: Any, tangents: Any) -> Any:
    # For second derivatives: JAX cannot derive a reduction of two arrays.
    return _sums(*primals, most), tuple(x.sum((1, 2)) for x in tangents)


def _in_rows(
    one: jax.Array, other: jax.Array, *, most: int
) -> tuple[jax.Array, jax.Array]:
    pixels = _pixels(one)
    over = max(n for n in range(1, min(pixels, most) + 1) if pixels % n == 0)
    rows = (x.reshape(len(x), -1, over, x.shape[-1]) for x in (one, other))
    first, second = _reduced(_reduced(rows, 2), 1)
    return first, second


def _reduced(arrays: Iterable[jax.Array], axis: int) -> tuple[jax.Array, ...]:
    """Returns the sums of each array over an axis, all by one reduction."""
    whole = tuple(arrays)
    zeros = (jnp.zeros((), whole[0].dtype),) * len(whole)

    def add(a: Any, b: Any) -> Any:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(jax.lax.reduce(whole, zeros, add, (axis,)))


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of each channel, [B, C], from one pass over x."""
    pixels = _pixels(x)
    middle = _wide(x[:, x.shape[1] // 2, x.shape[2] // 2])
    centred = _wide(x) - middle[:, None, None]
    first, second = (
        total / pixels for total in _sums(centred, jnp.square(centred), READ)
    )
    return middle + first, jnp.maximum(second - jnp.square(first), 0)


def _pixels(x: jax.Array) -> int:
    return x.shape[1] * x.shape[2]


def _normalised(x: jax.Array, line: Line) -> tuple[jax.Array, jax.Array]:
    """Returns x - mean, and the normalised value."""
    # Not x slope + b with b = bias - mean slope, the difference of two large numbers
    # where the mean is large. A pass over x costs the same.
    z = x - line.mean[:, None, None]
    return z, z * line.slope[:, None, None] + line.bias[:, None, None]


def _dropped(x: jax.Array, how: Constants, given: Inputs, copy: int) -> jax.Array:
    """Returns x after dropout, if there is any; `copy` as in `_again`."""
    if given.mask is None:
        return x
    kept = dropout.unpacked(_again(given.mask, copy), len(given.scale))
    return jnp.where(kept, x / how.keep, 0)


def _of_groups(values: tuple[jax.Array, ...], size: int) -> tuple[jax.Array, ...]:
    """Returns the means over groups of `size` channels, at each channel, [B, C]."""
    means = (v.reshape(len(v), -1, size).mean(-1) for v in values)
    return tuple(mean.repeat(size, axis=-1) for mean in means)


def _wide(x: jax.Array) -> jax.Array:
    """Returns x in the type of the statistics: float32, or float64 of float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def spans(parts: Parts) -> list[slice]:
    """Returns which of the C channels those of each part are."""
    sizes = [part.shape[-1] for part in parts]
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def as_varying(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the vector, cast to vary over the devices where x does.

    In a `jax.shard_map` with check_vma, a custom derivative must have the type of its
    argument; JAX then sums the derivative of this cast over the devices.
    """
    theirs, own = (
        getattr(jax.typeof(a), "manual_axis_type", None) for a in (x, vector)
    )
    if theirs is None or own is None or theirs.varying <= own.varying:
        return vector
    return jax.lax.pcast(vector, tuple(theirs.varying - own.varying), to="varying")
