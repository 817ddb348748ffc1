"""Group normalisation with SiLU as one kernel each way, for NVIDIA GPUs (Triton).

`fused` and `norm_silu` are those of `norm`, their twins, and fall back on them. Which
of the two computes is decided by shapes and platform alone, when a program is made:

  CUDA        the kernel, where `tile` finds one that fits
  CPU         the same kernel, interpreted: slow, so that it can be tested without a GPU
  TPU, ROCm   the twin

A program of the kernel has one image and a block of whole groups, which it reads once,
from whichever parts they lie in, and holds in registers while it takes mean and
variance one after the other, as `plain` does. So 32x32 pixels fit, and 256x256 pixels
do not: those take the two passes of the twin, which a kernel in two stages would not
beat.

XLA cannot cut a kernel over devices: under `jit` with a batch that lies on several each
of them would compute all of it. Use it on one device, or inside `jax.shard_map` (with
check_vma=False) or `jax.pmap`.

JAX 0.10 has the way from Pallas to Triton; since 0.11 it is deprecated in favour of
another, Mosaic GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from diffusion_jax.nets import norm

try:
    from jax.experimental.pallas import triton
except ImportError as error:
    raise ImportError(
        "net.kernels must be xla with a JAX whose Pallas has no Triton any more; got "
        f"pallas with JAX {jax.__version__}. Use an older JAX, or leave it to xla."
    ) from error

# Values of a tile: of the largest, 64 in each of 512 threads, half of what they hold.
# The backward pass has two arrays of them.
FORWARD, BACKWARD = 32_768, 16_384
# Bytes of a pixel's neighbouring channels in a tile: at least what a thread loads at
# once, and not more than a line of the cache.
LEAST_ROW, MOST_ROW = 16, 128


class Tile(NamedTuple):
    """What one program of a kernel holds, in powers of two; the rest is masked."""

    pixels: int
    groups: int
    width: int
    """Channels of a group."""

    @property
    def warps(self) -> int:
        """Of 32 threads, with 32 values each where 16 of them are enough."""
        return min(max(self.pixels * self.groups * self.width // 1024, 1), 16)


def tile(x: Any, groups: int, most: int) -> Tile | None:
    """Returns the tile for an activation; None where none fits.

    Args:
      x: activation or its shape and type, [B, H, W, C].
      groups: of the normalisation.
      most: values that a tile may have.

    >>> tile(jax.ShapeDtypeStruct((1, 32, 32, 128), jnp.bfloat16), 32, FORWARD)
    Tile(pixels=1024, groups=8, width=4)
    >>> tile(jax.ShapeDtypeStruct((1, 256, 256, 128), jnp.bfloat16), 32, FORWARD)
    """
    _, height, width, channels = x.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return None
    in_group = channels // groups
    one = Tile(pl.next_power_of_2(height * width), 1, pl.next_power_of_2(in_group))
    room = most // (one.pixels * one.width)
    row = in_group * x.dtype.itemsize
    count = 1
    while count < groups and 2 * count <= room and count * row < MOST_ROW:
        count *= 2
    if not room or (count < groups and count * row < LEAST_ROW):
        return None
    return one._replace(groups=count)


def norm_silu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
) -> jax.Array:
    """Returns `norm.norm_silu` of the same arguments, by the kernel where it fits."""
    return fused((x,), scale, bias, groups, epsilon, silu)[0]


def fused(
    parts: norm.Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
    shift: jax.Array | None = None,
    mask: norm.Parts | None = None,
    keep: float = 1.0,
) -> norm.Parts:
    """Returns `norm.fused` of the same arguments, by the kernel where it fits."""
    given = (parts, scale, bias, groups, epsilon, silu, shift, mask, keep)
    joined = _joined(parts)
    if joined is None or tile(joined, groups, BACKWARD) is None:
        return norm.fused(*given)
    if mask is not None:
        mask = tuple(a.astype(jnp.uint8) for a in mask)
    how = norm.Constants(groups, epsilon, silu, keep)
    return _fused(how, norm.inputs(parts, scale, bias, shift, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(how: norm.Constants, given: norm.Inputs) -> norm.Parts:
    return _forward(how, given)[0]


def _forward(how: norm.Constants, given: norm.Inputs) -> tuple[norm.Parts, norm.Kept]:
    def kernel(given: norm.Inputs, interpret: bool) -> Any:
        parts, scale, bias, shift, mask = given
        made = _tile(parts, how.groups, FORWARD)
        means, rstd = (
            jax.ShapeDtypeStruct((len(parts[0]), n), jnp.float32)
            for n in (len(scale), how.groups)
        )
        images = _flattened(parts)
        body = functools.partial(_forward_kernel, made, how)
        found, *rest = _call(
            body,
            (len(parts[0]), pl.cdiv(how.groups, made.groups)),
            made.warps,
            batched=(images, shift, _flattened(mask)),
            shared=(scale, bias),
            out=(images, means, rstd),
            interpret=interpret,
        )
        return _as_shaped(found, parts), *rest

    def twin(given: norm.Inputs) -> Any:
        out, kept = norm.forward(how, given)
        return out, kept.means, kept.rstd

    out, means, rstd = _dispatch(kernel, twin, given)
    return out, norm.Kept(given, means, rstd)


def _backward(
    how: norm.Constants, kept: norm.Kept, gradients: norm.Parts
) -> tuple[norm.Inputs]:
    def kernel(kept: norm.Kept, gradients: norm.Parts, interpret: bool) -> Any:
        parts, scale, bias, shift, mask = kept.given
        made = _tile(parts, how.groups, BACKWARD)
        batch, channels = kept.means.shape
        images = _flattened(parts)
        both = jax.ShapeDtypeStruct((batch, 2 * channels), jnp.float32)
        body = functools.partial(_backward_kernel, made, how)
        found, sums, of_shift = _call(
            body,
            (batch, pl.cdiv(how.groups, made.groups)),
            made.warps,
            batched=(
                images,
                shift,
                _flattened(mask),
                _flattened(gradients),
                kept.means,
                kept.rstd,
            ),
            shared=(scale, bias),
            out=(images, both, shift),
            interpret=interpret,
        )
        of_scale, of_bias = jnp.split(sums.sum(0), 2)
        return _as_shaped(found, parts), of_scale, of_bias, of_shift

    def twin(kept: norm.Kept, gradients: norm.Parts) -> Any:
        (found,) = norm.backward(how, kept, gradients)
        of_vectors = (a.astype(jnp.float32) for a in (found.scale, found.bias))
        return found.parts, *of_vectors, found.shift

    found, of_scale, of_bias, of_shift = _dispatch(kernel, twin, kept, gradients)
    _, scale, bias, _, _ = kept.given
    of_vectors = of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)
    return (norm.Inputs(found, *of_vectors, of_shift, None),)


_fused.defvjp(_forward, _backward)


def _joined(parts: norm.Parts) -> jax.ShapeDtypeStruct | None:
    """Returns shape and type of the parts together; None where their types differ."""
    first = parts[0]
    if any(x.dtype != first.dtype for x in parts):
        return None
    channels = sum(x.shape[-1] for x in parts)
    return jax.ShapeDtypeStruct((*first.shape[:-1], channels), first.dtype)


def _tile(parts: norm.Parts, groups: int, most: int) -> Tile:
    made = tile(_joined(parts), groups, most)
    assert made is not None  # held by fused, of BACKWARD, which is less than FORWARD
    return made


def _dispatch(kernel: Any, twin: Any, *given: Any) -> Any:
    """Returns what the platform of the program computes.

    It is the one that is compiled for, not the one that is traced on, which differ when
    a program is exported.
    """
    return jax.lax.platform_dependent(
        *given,
        cuda=functools.partial(kernel, interpret=False),
        cpu=functools.partial(kernel, interpret=True),
        default=twin,
    )


def _flattened(parts: Any) -> Any:
    """Returns each part, where there are any, as [B, pixels, C_i]."""
    return jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), parts)


def _as_shaped(found: norm.Parts, parts: norm.Parts) -> norm.Parts:
    return tuple(y.reshape(x.shape) for y, x in zip(found, parts, strict=True))


def _call(
    body: Any,
    grid: tuple[int, int],
    warps: int,
    *,
    batched: Any,
    shared: Any,
    out: Any,
    interpret: bool,
) -> Any:
    """Returns what a kernel makes of every image and block of groups.

    Args:
      body: the kernel; it sees all of its image, and all of what is shared.
      grid: images, and blocks of groups.
      warps: of 32 threads, of a program.
      batched: arguments [B, ...], each an array, parts or None.
      shared: arrays that all images have in common.
      out: the results, [B, ...], like `batched`; of these shapes and types.
      interpret: whether to interpret it, rather than to compile it.
    """

    def of_image(a: Any) -> pl.BlockSpec:
        zeros = (0,) * (a.ndim - 1)
        return pl.BlockSpec((None, *a.shape[1:]), lambda image, _: (image, *zeros))

    def whole(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)

    return pl.pallas_call(
        body,
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out),
        grid=grid,
        in_specs=[*jax.tree.map(of_image, batched), *map(whole, shared)],
        out_specs=jax.tree.map(of_image, out),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*batched, *shared)


def _forward_kernel(
    made: Tile,
    how: norm.Constants,
    x_refs: Any,
    shift_ref: Any,
    mask_refs: Any,
    scale_ref: Any,
    bias_ref: Any,
    y_refs: Any,
    means_ref: Any,
    rstd_ref: Any,
) -> None:
    at = _places(made, how.groups, x_refs)
    x = _shifted(_load_parts(x_refs, at), shift_ref, at)
    means = x.sum(0) / at.pixels
    mean = means.sum(1) / at.width
    centred = jnp.where(at.inside, x - mean[None, :, None], 0.0)
    variance = _over_group(centred * centred, at)
    rstd = jax.lax.rsqrt(variance + how.epsilon)
    a, b = _load(scale_ref, at.channels), _load(bias_ref, at.channels)
    y = centred * rstd[None, :, None] * a[None] + b[None]
    y = y * jax.nn.sigmoid(y) if how.silu else y
    _store_parts(y_refs, at, _dropped(y, mask_refs, at, how.keep))
    _store(means_ref, at.channels, means)
    _store(rstd_ref, at.groups, rstd)


def _backward_kernel(
    made: Tile,
    how: norm.Constants,
    x_refs: Any,
    shift_ref: Any,
    mask_refs: Any,
    g_refs: Any,
    means_ref: Any,
    rstd_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    dx_refs: Any,
    sums_ref: Any,
    of_shift_ref: Any,
) -> None:
    """The equations of `norm.backward`."""
    at = _places(made, how.groups, x_refs)
    x = _shifted(_load_parts(x_refs, at), shift_ref, at)
    g = _dropped(_load_parts(g_refs, at), mask_refs, at, how.keep)
    a, b = _load(scale_ref, at.channels), _load(bias_ref, at.channels)
    mean = _load(means_ref, at.channels).sum(1) / at.width
    rstd = _load(rstd_ref, at.groups)
    u = (x - mean[None, :, None]) * rstd[None, :, None]
    # Where g is masked so is d.
    d = norm.before_silu(u * a[None] + b[None], g) if how.silu else g
    (channel,), inside = at.channels
    _store(sums_ref, at.channels, (d * u).sum(0))
    _store(sums_ref, ((channel + scale_ref.shape[0],), inside), d.sum(0))
    d = d * a[None]
    p, q = (_over_group(v, at)[None, :, None] for v in (d, d * u))
    dx = (d - p - u * q) * rstd[None, :, None]
    _store_parts(dx_refs, at, dx)
    if of_shift_ref is not None:
        _store(of_shift_ref, at.channels, jnp.where(at.inside, dx, 0.0).sum(0))


Place = tuple[tuple[jax.Array, ...], jax.Array]
"""Indices of the values of a tile, and which of them are there."""


class Places(NamedTuple):
    """Where the values of a program are."""

    parts: list[Place]
    """In each part; a value is in one of them."""
    inside: jax.Array
    """Which values of the tile are in any."""
    channels: Place
    groups: Place
    pixels: int
    width: int
    """Channels of a group."""


def _places(made: Tile, groups: int, refs: Any) -> Places:
    """Returns where the values of a program are, of parts [pixels, C_i]."""
    pixels = refs[0].shape[0]
    width = sum(ref.shape[1] for ref in refs) // groups
    first = pl.program_id(1) * made.groups

    def index(axes: tuple[int, ...], axis: int) -> jax.Array:
        sizes = tuple(made[a] for a in axes)
        return jax.lax.broadcasted_iota(jnp.int32, sizes, axes.index(axis))

    def channel(axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        group, within = index(axes, 1) + first, index(axes, 2)
        return group * width + within, (group < groups) & (within < width)

    pixel = index((0, 1, 2), 0)
    of_value, inside = channel((0, 1, 2))
    inside = inside & (pixel < pixels)
    parts: list[Place] = []
    begin = 0
    for ref in refs:
        mask, end = inside, begin + ref.shape[1]
        if len(refs) > 1:
            mask = mask & (of_value >= begin) & (of_value < end)
        parts.append(((pixel, of_value - begin), mask))
        begin = end
    of_channel, known = channel((1, 2))
    group = index((1,), 1) + first
    groups_at: Place = ((group,), group < groups)
    channels: Place = ((of_channel,), known)
    return Places(parts, inside, channels, groups_at, pixels, width)


def _load_parts(refs: Any, at: Places) -> jax.Array:
    """Returns the values of a program, 0 outside; each is in one part."""
    loaded = [_load(ref, place) for ref, place in zip(refs, at.parts, strict=True)]
    return sum(loaded[1:], loaded[0])


def _shifted(x: jax.Array, shift_ref: Any, at: Places) -> jax.Array:
    """Returns the values with the shift of their channel, 0 outside."""
    if shift_ref is None:
        return x
    return jnp.where(at.inside, x + _load(shift_ref, at.channels)[None], 0.0)


def _dropped(x: jax.Array, mask_refs: Any, at: Places, keep: float) -> jax.Array:
    if mask_refs is None:
        return x
    return norm.dropped(x, _load_parts(mask_refs, at), keep)


def _store_parts(refs: Any, at: Places, value: jax.Array) -> None:
    for ref, place in zip(refs, at.parts, strict=True):
        _store(ref, place, value)


def _load(ref: Any, place: Place) -> jax.Array:
    indices, mask = place
    return triton.load(ref.at[indices], mask=mask, other=0.0).astype(jnp.float32)


def _store(ref: Any, place: Place, value: jax.Array) -> None:
    indices, mask = place
    triton.store(ref.at[indices], value.astype(ref.dtype), mask=mask)


def _over_group(values: jax.Array, at: Places) -> jax.Array:
    """Returns the mean of each group."""
    return values.sum(0).sum(1) / (at.pixels * at.width)
