"""Group normalisation with SiLU, in three forms of the same mathematics.

  plain             as it is written down, with the derivatives that JAX takes
  fused             few passes over the activation, with a backward pass of its own
  norm_pallas.fused that as one kernel each way, on a GPU

Each takes one activation or several parts, whose channels together are what is
normalised: a group may begin in one part and end in the next. So a skip connection need
not be joined to what it meets. What is added to x before, for each image and channel,
and what dropout makes of the result, can be part of the same passes.

How often each form has to read (r) and write (w) an activation, where a compiler fuses
all that can be; backward there is the gradient to read beside x:

             forward    kept for the backward pass        backward
  plain      r r r w    several activations, in float32   what JAX makes of it
  fused      r r w      x                                 r r w, r r (sums), r r w
  a kernel   r w        x                                 r r w
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

Parts = tuple[jax.Array, ...]


def norm_silu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
) -> jax.Array:
    """Returns silu((x - mean) / sqrt(variance + epsilon) scale + bias), as x is typed.

    The form `fused` of one activation. It has no forward derivative (`jax.jvp`).

    Args:
      x: activation, [B, H, W, C], in float32 or bfloat16.
      scale: of each channel, [C].
      bias: of each channel, [C].
      groups: number of groups; mean and variance are those of a group.
      epsilon: added to the variance.
      silu: whether SiLU follows.

    >>> x = jax.random.normal(jax.random.key(0), [2, 4, 4, 8])
    >>> y = norm_silu(x, jnp.ones(8), jnp.zeros(8), 4, 1e-6, silu=False)
    >>> print(f"{y.mean():.3f} {y.std():.3f}")
    0.000 1.000
    """
    return fused((x,), scale, bias, groups, epsilon, silu)[0]


class Inputs(NamedTuple):
    """The arrays that `fused` takes, as `plain` describes them."""

    parts: Parts
    scale: jax.Array
    bias: jax.Array
    shift: jax.Array | None
    mask: Parts | None


class Constants(NamedTuple):
    """The rest of what `fused` takes, known when a program is made."""

    groups: int
    epsilon: float
    silu: bool
    keep: float


class Kept(NamedTuple):
    """What a backward pass needs."""

    given: Inputs
    means: jax.Array
    """Of each channel with its shift, [B, C]; its group has the mean of them."""
    rstd: jax.Array
    """1 / sqrt(variance + epsilon) of each group, [B, groups]."""


def plain(
    parts: Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
    shift: jax.Array | None = None,
    mask: Parts | None = None,
    keep: float = 1.0,
) -> Parts:
    """Returns the normalised parts; mean and variance are taken one after the other.

    The variance is the mean of (x - mean)^2: the cheaper E[x^2] - mean^2 is wrong by
    1e-3 where the mean is a hundred times the deviation.

    Args:
      parts: activations, each [B, H, W, C_i]; C is the sum of their channels.
      scale, bias, groups, epsilon, silu: as in `norm_silu`.
      shift: added to each channel of an image before it is normalised, [B, C].
      mask: what dropout keeps of each part, in 0 and 1 of any type, as it is shaped.
      keep: the probability that it does, by which what is kept is divided.
    """
    # Once, or in bfloat16 the gradients of both uses would be rounded before their sum.
    wide = tuple(_wide(x) for x in parts)
    if shift is not None:
        wide = tuple(x + s for x, s in _each(wide, shift))
    mean = _joined(x.mean((1, 2)) for x in wide)
    mean = _to_channels(_over_groups(mean, groups), scale)
    centred = tuple(x - m for x, m in _each(wide, mean))
    variance = _joined(jnp.square(x).mean((1, 2)) for x in centred)
    variance = _to_channels(_over_groups(variance, groups), scale)
    a = jax.lax.rsqrt(variance + epsilon) * scale[None]
    out = []
    for part, (x, a_i, b_i) in zip(parts, _each(centred, a, bias), strict=True):
        y = (x * a_i + b_i).astype(part.dtype)
        out.append(jax.nn.silu(y) if silu else y)
    if mask is not None:
        out = [dropped(y, m, keep) for y, m in zip(out, mask, strict=True)]
    return tuple(out)


def fused(
    parts: Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
    shift: jax.Array | None = None,
    mask: Parts | None = None,
    keep: float = 1.0,
) -> Parts:
    """Returns the normalised parts: one pass for the statistics, one for the rest.

    The sums of a channel are of x - c and (x - c)^2, with c its middle pixel: the mean
    may be any multiple of the deviation. Where n pixels have the deviation s, c is at
    most sqrt(n) s from their mean, so the variance of a channel has a relative error of
    n roundings at worst, where all pixels but c are alike, and of a few otherwise.

    Kept for the backward pass are the parts themselves, their mask, and the mean and
    deviation of each group; the rest is computed again. x + shift, and the result
    before dropout, are never written.

    Args:
      parts, scale, bias, groups, epsilon, silu, shift, mask, keep: as in `plain`.
    """
    given = inputs(parts, scale, bias, shift, mask)
    return _fused(Constants(groups, epsilon, silu, keep), given)


def inputs(
    parts: Parts,
    scale: jax.Array,
    bias: jax.Array,
    shift: jax.Array | None,
    mask: Parts | None,
) -> Inputs:
    """Returns what `forward` and `backward` take."""
    scale, bias = (_as_varying(v, parts[0]) for v in (scale, bias))
    return Inputs(parts, scale, bias, shift, mask)


def forward(how: Constants, given: Inputs) -> tuple[Parts, Kept]:
    """Returns `fused` and what its backward pass needs."""
    parts, _, _, shift, mask = given
    means, variances = (_joined(v) for v in zip(*map(_moments, parts), strict=True))
    if shift is not None:
        means += shift
    # Within the channels of a group, and between them.
    variances += jnp.square(means - _of_groups(means, how.groups))
    rstd = jax.lax.rsqrt(_over_groups(variances, how.groups) + how.epsilon)
    kept = Kept(given, means, rstd)
    out = []
    for i, (_, y) in enumerate(_normalised(kept)):
        y = jax.nn.silu(y) if how.silu else y
        y = dropped(y, mask[i], how.keep) if mask else y
        out.append(y.astype(parts[i].dtype))
    return tuple(out), kept


def backward(how: Constants, kept: Kept, gradients: Parts) -> tuple[Inputs]:
    """Returns the gradients with respect to parts, scale, bias and shift.

    With u = (x - mean) / deviation and d the gradient by y = scale u + bias, that by x
    is (scale d - M(scale d) - u M(scale d u)) / deviation, with M the mean over a
    group. The sums of d and d u over a channel give M, and over the batch the gradients
    by bias and scale. That by the shift is the sum of the first over the pixels, which
    takes no pass of its own: the mean of u is known.
    """
    parts, scale, bias, shift, mask = kept.given
    # Once, in the type of the activation, as a network without this function has it:
    # XLA for GPUs would write it in float32 for both passes to read. The barriers keep
    # it from undoing that, and from summing over the batch what is summed already.
    at_y = []
    for i, (_, y) in enumerate(_normalised(kept)):
        g = _wide(gradients[i])
        g = dropped(g, mask[i], how.keep) if mask else g
        at_y.append((before_silu(y, g) if how.silu else g).astype(parts[i].dtype))
    at_y = jax.lax.optimization_barrier(at_y)
    each = [(u, _wide(d)) for (u, _), d in zip(_normalised(kept), at_y, strict=True)]
    sums = jax.lax.optimization_barrier(_joined(_sums(u, d) for u, d in each))
    pixels = parts[0].shape[1] * parts[0].shape[2]
    r = _to_channels(kept.rstd, scale)
    means = _of_groups(sums * scale[None, None], how.groups) / pixels
    a, (p, q) = r * scale[None], r[None] * means
    out = []
    coefficients = _each(parts, a, p, q)
    for x, (u, d), (_, a_i, p_i, q_i) in zip(parts, each, coefficients, strict=True):
        out.append((a_i * d - p_i - u * q_i).astype(x.dtype))
    of_bias, of_scale = sums.sum(1)
    of_shift = None
    if shift is not None:
        mean_u = (kept.means - _of_groups(kept.means, how.groups)) * r
        of_shift = a * sums[0] - pixels * (p + q * mean_u)
        of_shift = of_shift.astype(shift.dtype)
    of_vectors = of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)
    return (Inputs(tuple(out), *of_vectors, of_shift, None),)


def _sums(u: jax.Array, d: jax.Array) -> jax.Array:
    """Returns the sums of d and d u over the pixels, [2, B, C], from one pass.

    With u as a third XLA for GPUs would write u.
    """
    zero = jnp.zeros((), d.dtype)
    both = jax.lax.reduce(
        (d, d * u),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (1, 2),
    )
    return jnp.stack(both)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how: Constants, given: Inputs) -> Parts:
    return forward(how, given)[0]


_fused.defvjp(forward, backward)


def dropped(x: jax.Array, mask: jax.Array, keep: float) -> jax.Array:
    """Returns x / keep where the mask is not 0, and 0 elsewhere."""
    return jnp.where(mask != 0, x / keep, 0)


def before_silu(y: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient with respect to y from that with respect to silu(y)."""
    s = jax.nn.sigmoid(y)
    return gradient * s * (1 + y * (1 - s))


def _as_varying(vector: jax.Array, x: jax.Array) -> jax.Array:
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


def _wide(x: jax.Array) -> jax.Array:
    """Returns x in the type of the statistics: float32, or float64 of float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of each channel, [B, C], from one pass over x."""
    x = _wide(x)
    middle = x[:, x.shape[1] // 2, x.shape[2] // 2]
    shifted = x - middle[:, None, None]
    first, second = shifted.mean((1, 2)), jnp.square(shifted).mean((1, 2))
    return middle + first, jnp.maximum(second - jnp.square(first), 0)


def _joined(of_parts: Iterable[jax.Array]) -> jax.Array:
    """Returns values of the channels of all parts, [..., C]."""
    return jnp.concatenate(list(of_parts), axis=-1)


def _over_groups(values: jax.Array, groups: int) -> jax.Array:
    """Returns the mean over the channels of each group, [..., groups]."""
    return values.reshape(*values.shape[:-1], groups, -1).mean(-1)


def _of_groups(values: jax.Array, groups: int) -> jax.Array:
    """Returns at each channel the mean over those of its group, [..., C]."""
    return _over_groups(values, groups).repeat(values.shape[-1] // groups, axis=-1)


def _to_channels(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the value of each channel's group, [..., C]."""
    return values.repeat(len(scale) // values.shape[-1], axis=-1)


def _each(parts: Parts, *values: jax.Array) -> Iterator[tuple[jax.Array, ...]]:
    """Yields each part with its channels' values, [B, 1, 1, C_i], of [B, C] or [C]."""
    begin = 0
    for x in parts:
        end = begin + x.shape[-1]
        yield (
            _wide(x),
            *(
                v[:, None, None, begin:end]
                if v.ndim == 2
                else v[None, None, None, begin:end]
                for v in values
            ),
        )
        begin = end


def _normalised(kept: Kept) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields u = (x + shift - mean) / deviation of each part, and u scale + bias."""
    parts, scale, bias, shift, _ = kept.given
    mean = _of_groups(kept.means, kept.rstd.shape[-1])
    rstd = _to_channels(kept.rstd, scale)
    if shift is not None:
        mean -= shift
    for x, m, r, a, b in _each(parts, mean, rstd, scale, bias):
        # Not x a + b with b = bias - mean a: the difference of two large numbers where
        # the mean is large. A pass over x costs the same.
        u = (x - m) * r
        yield u, u * a + b
