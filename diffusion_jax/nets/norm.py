"""Group normalisation with SiLU, in few passes over what it normalises.

It takes several parts, whose channels together are normalised: a group may begin in one
part and end in the next. So a skip connection need not be joined to what it meets; the
result is one array. What is added to each channel before, and dropout after, are part
of the same passes.

How often they read (r) and write (w) an activation: forward r (statistics), r w; the
backward pass reads the gradient beside x: r r (sums), r r w. Written down plainly, with
the derivatives that JAX takes, the forward pass alone keeps several activations in
float32.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.nets import dropout

Parts = tuple[jax.Array, ...]


def group_norm(
    parts: Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    *,
    silu: bool = False,
    shift: jax.Array | None = None,
    mask: jax.Array | None = None,
    keep: float = 1.0,
) -> jax.Array:
    """Returns the normalised parts as one array, [B, H, W, C].

    y = (x + shift - mean) / sqrt(variance + epsilon) scale + bias, with mean and
    variance of each image's groups; SiLU and dropout of that where they are asked for
    (Wu and He 2018). Statistics are in float32, the result is in the type of the parts.

    The sums of a channel are of x - c and (x - c)^2, with c its middle pixel: the mean
    may be any multiple of the deviation. Where n pixels have the deviation s, c is at
    most sqrt(n) s from their mean, so the variance of a channel has a relative error of
    n roundings at worst, where all pixels but c are alike, and of a few otherwise.

    Kept for the backward pass are the parts, the mask, and a few numbers a channel. The
    backward pass is our own, so there is no forward derivative (`jax.jvp`).

    Args:
      parts: activations, each [B, H, W, C_i]; C is the sum of their channels.
      scale: of each channel, [C].
      bias: of each channel, [C].
      groups: number of groups.
      epsilon: added to the variance.
      silu: whether SiLU follows.
      shift: added to each channel before it is normalised, [B, C], or [1, C] for all.
      mask: what dropout keeps of the result, packed as `dropout.mask` gives it.
      keep: the probability that it does, by which what is kept is divided.

    >>> x = jax.random.normal(jax.random.key(0), [2, 4, 4, 8])
    >>> y = group_norm((x,), jnp.ones(8), jnp.zeros(8), 4, 1e-6)
    >>> print(f"{y.mean():.3f} {y.std():.3f}")
    0.000 1.000
    """
    vectors = (
        None if v is None else as_varying(v, parts[0]) for v in (scale, bias, shift)
    )
    given = Inputs(parts, *vectors, mask)
    return _group_norm(Constants(groups, epsilon, silu, keep), given)


class Inputs(NamedTuple):
    """The arrays that `group_norm` takes."""

    parts: Parts
    scale: jax.Array
    bias: jax.Array
    shift: jax.Array | None
    mask: jax.Array | None


class Constants(NamedTuple):
    """The rest of what it takes, known when a program is made."""

    groups: int
    epsilon: float
    silu: bool
    keep: float


class Kept(NamedTuple):
    """What the backward pass needs."""

    given: Inputs
    mean: jax.Array
    """Of each channel's group, less the channel's shift, [B, C]."""
    rstd: jax.Array
    """1 / sqrt(variance + epsilon) of each channel's group, [B, C]."""
    off: jax.Array
    """How far each channel's own mean is from that of its group, [B, C]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _group_norm(how: Constants, given: Inputs) -> jax.Array:
    return _forward(how, given)[0]


def _forward(how: Constants, given: Inputs) -> tuple[jax.Array, Kept]:
    kept, out = _statistics(how, given), []
    masks = _masks(given)
    for x, mask, (_, y) in zip(given.parts, masks, _normalised(kept), strict=True):
        y = jax.nn.silu(y) if how.silu else y
        out.append(_dropped(y, mask, how.keep).astype(x.dtype))
    return _joined(out), kept


def _statistics(how: Constants, given: Inputs) -> Kept:
    """Returns what is known of each channel from one pass over the parts."""
    shift, size = given.shift, len(given.scale) // how.groups
    moments = zip(*map(_moments, given.parts), strict=True)
    own, variance = (_joined(of_parts) for of_parts in moments)
    if shift is not None:
        own += shift
    # Within a group, distances from its first channel: one sum over the group will do.
    start = own[:, ::size].repeat(size, axis=-1)
    apart = own - start
    between, spread = _of_groups((apart, variance + jnp.square(apart)), size)
    rstd = jax.lax.rsqrt(spread - jnp.square(between) + how.epsilon)
    mean = start + between
    if shift is not None:
        mean -= shift
    return Kept(given, mean, rstd, apart - between)


def _backward(how: Constants, kept: Kept, gradient: jax.Array) -> tuple[Inputs]:
    """Returns the gradients with respect to parts, scale, bias and shift.

    With u = (x - mean) / deviation and d the gradient by y = scale u + bias, that by x
    is (scale d - M(scale d) - u M(scale d u)) / deviation, with M the mean over a
    group. The sums of d and d u over a channel give M, and over the batch the gradients
    by bias and scale. That by the shift is the sum of the first over the pixels, which
    takes no pass of its own: the mean of u is known.
    """
    parts, scale, bias, shift, _ = kept.given
    gradients, masks = _cut(gradient, parts), _masks(kept.given)

    def at_y(i: int, y: jax.Array, sigmoid: Callable[..., jax.Array]) -> jax.Array:
        g = _dropped(_wide(gradients[i]), masks[i], how.keep)
        if not how.silu:
            return g
        s = sigmoid(y)
        return g * s * (1 + y * (1 - s))

    # d is computed in both passes, by two expressions: what is equal a compiler would
    # compute once and write for the other, in float32.
    each = (
        (u, at_y(i, y, jax.nn.sigmoid)) for i, (u, y) in enumerate(_normalised(kept))
    )
    of_d, of_du = jax.lax.optimization_barrier(_sums([(d, d * u) for u, d in each]))
    pixels = _pixels(parts)
    size = scale.shape[0] // how.groups
    a = kept.rstd * scale[None]
    groups = _of_groups((of_d * scale[None], of_du * scale[None]), size)
    p, q = (kept.rstd / pixels * mean for mean in groups)
    out = []
    for i, (u, y) in enumerate(_normalised(kept)):
        a_i, p_i, q_i = (_at(v, parts, i) for v in (a, p, q))
        d = at_y(i, y, _sigmoid)
        out.append((a_i * d - p_i - u * q_i).astype(parts[i].dtype))
    of_shift = None
    of_images = [of_du, of_d]
    if shift is not None:
        of_shift = a * of_d - pixels * (p + q * kept.off * kept.rstd)
        of_images += [of_shift] * (len(shift) == 1)  # the same for all images
    of_scale, of_bias, *summed = _reduced(of_images, 0)
    if shift is not None:
        of_shift = summed[0][None] if summed else of_shift
        of_shift = of_shift.astype(shift.dtype)
    of_scale, of_bias = of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)
    return (Inputs(tuple(out), of_scale, of_bias, of_shift, None),)


_group_norm.defvjp(_forward, _backward)


@jax.custom_jvp
def _sums(pairs: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Returns the sums over the pixels of the first and second arrays, [B, C] each.

    Both from one pass, over some of the pixels first: at once XLA for GPUs writes an
    operand in float32, and for two sums apart it reads twice. What is left is joined.
    """
    over = _part_of(_pixels(pairs[0]))
    some = [_reduced([_rows(x, over) for x in pair], 2) for pair in pairs]
    one, other = _reduced(
        (_joined(of_parts) for of_parts in zip(*some, strict=True)), 1
    )
    return one, other


@_sums.defjvp
def _sums_jvp(primals: Any, tangents: Any) -> Any:
    # For second derivatives: JAX has none of a reduction of two arrays.
    changes = zip(*tangents[0], strict=True)
    return _sums(*primals), tuple(
        _joined(x.sum((1, 2)) for x in of_parts) for of_parts in changes
    )


def _reduced(arrays: Iterable[jax.Array], axis: int) -> tuple[jax.Array, ...]:
    """Returns the sums of each array over an axis, all by one reduction."""
    whole = tuple(arrays)
    zeros = (jnp.zeros((), whole[0].dtype),) * len(whole)

    def add(a: Any, b: Any) -> Any:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(jax.lax.reduce(whole, zeros, add, (axis,)))


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of each channel, [B, C], from one pass over x."""
    pixels = _pixels((x,))
    middle = _wide(x[:, x.shape[1] // 2, x.shape[2] // 2])
    centred = _wide(x) - middle[:, None, None]
    first, second = (
        total / pixels for total in _sums([(centred, jnp.square(centred))])
    )
    return middle + first, jnp.maximum(second - jnp.square(first), 0)


def _rows(x: jax.Array, over: int) -> jax.Array:
    """Returns the pixels in rows of so many, [B, rows, over, C]."""
    return x.reshape(len(x), -1, over, x.shape[-1])


def _part_of(pixels: int) -> int:
    """Returns how many pixels are summed first: at most 128, which divide them."""
    return max(n for n in range(1, min(pixels, 128) + 1) if pixels % n == 0)


def _pixels(parts: Sequence[jax.Array]) -> int:
    return parts[0].shape[1] * parts[0].shape[2]


def _sigmoid(y: jax.Array) -> jax.Array:
    """Returns the logistic function by tanh: equal, and not the same expression."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * y)


def _normalised(kept: Kept) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields u = (x + shift - mean) / deviation of each part, and u scale + bias."""
    parts, scale, bias, _, _ = kept.given
    for i, x in enumerate(parts):
        mean, rstd = _at(kept.mean, parts, i), _at(kept.rstd, parts, i)
        # Not x a + b with b = bias - mean a: the difference of two large numbers where
        # the mean is large. A pass over x costs the same.
        u = (_wide(x) - mean) * rstd
        yield u, u * _at(scale[None], parts, i) + _at(bias[None], parts, i)


def _masks(given: Inputs) -> list[jax.Array | None]:
    """Returns what dropout keeps of each part, or None of each."""
    if given.mask is None:
        return [None] * len(given.parts)
    return _cut(dropout.unpacked(given.mask, len(given.scale)), given.parts)


def _dropped(x: jax.Array, mask: jax.Array | None, keep: float) -> jax.Array:
    """Returns x / keep where the mask is True, and 0 elsewhere; x without a mask."""
    return x if mask is None else jnp.where(mask, x / keep, 0)


def _of_groups(values: tuple[jax.Array, ...], size: int) -> tuple[jax.Array, ...]:
    """Returns at each channel the mean over the `size` of its group, [B, C]."""
    means = (v.reshape(len(v), -1, size).mean(-1) for v in values)
    return tuple(mean.repeat(size, axis=-1) for mean in means)


def _wide(x: jax.Array) -> jax.Array:
    """Returns x in the type of the statistics: float32, or float64 of float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _joined(of_parts: Iterable[jax.Array]) -> jax.Array:
    """Returns values of the channels of all parts, [..., C]."""
    return jnp.concatenate(list(of_parts), axis=-1)


def _ends(parts: Parts) -> Iterator[tuple[int, int]]:
    begin = 0
    for part in parts:
        yield begin, begin + part.shape[-1]
        begin += part.shape[-1]


def _cut(x: jax.Array, parts: Parts) -> list[Any]:
    """Returns the channels of x that are those of each part."""
    return [x[..., begin:end] for begin, end in _ends(parts)]


def _at(values: jax.Array, parts: Parts, i: int) -> jax.Array:
    """Returns values of the channels of a part, to meet it: [B, 1, 1, C_i]."""
    begin, end = list(_ends(parts))[i]
    return values[:, None, None, begin:end]


def as_varying(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the vector as one that may differ between devices where x does.

    Inside a `jax.shard_map` that checks what differs, a derivative of our own must have
    the type of its argument; JAX sums that of this cast over the devices.
    """
    theirs, own = (
        getattr(jax.typeof(a), "manual_axis_type", None) for a in (x, vector)
    )
    if theirs is None or own is None or theirs.varying <= own.varying:
        return vector
    return jax.lax.pcast(vector, tuple(theirs.varying - own.varying), to="varying")
