"""Group normalisation with SiLU as one kernel each way, for NVIDIA GPUs (Triton).

`fused` and `norm_silu` are those of `norm`, their twins, and fall back on them. Which
of the two computes is decided by shapes and platform alone, when a program is made:

  CUDA        the kernel, where `tile` finds one that fits
  CPU         the same kernel, interpreted: slow, so that it can be tested without a GPU
  TPU, ROCm   the twin
  parts       the kernel for each, unless a group begins in one part and ends in another

A program of the kernel has one image and a block of whole groups, which it reads once
and holds in registers while it takes mean and variance one after the other, as `plain`
does. So 32x32 pixels fit, and 256x256 pixels do not: those take the two passes of the
twin, which a kernel in two stages would not beat.

XLA cannot cut a kernel over devices: under `jit` with a batch that lies on several each
of them would compute all of it. Use it on one device, or inside `jax.shard_map` (with
check_vma=False) or `jax.pmap`.

JAX 0.10 has the way from Pallas to Triton; since 0.11 it is deprecated in favour of
another, Mosaic GPU.
"""

import functools
from collections.abc import Sequence
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
    if tile(x, groups, BACKWARD) is None:
        return norm.norm_silu(x, scale, bias, groups, epsilon, silu)
    return _norm_silu(x, scale, bias, groups, epsilon, silu)


def fused(
    parts: norm.Parts,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool = True,
) -> norm.Parts:
    """Returns `norm.fused` of the same arguments, by the kernel where it fits."""
    in_group = len(scale) // groups
    if any(x.shape[-1] % in_group for x in parts):
        return norm.fused(parts, scale, bias, groups, epsilon, silu)
    out, begin = [], 0
    for x in parts:
        end = begin + x.shape[-1]
        given = (scale[begin:end], bias[begin:end], x.shape[-1] // in_group)
        out.append(norm_silu(x, *given, epsilon, silu))
        begin = end
    return tuple(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm_silu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool,
) -> jax.Array:
    return _forward(x, scale, bias, groups, epsilon, silu)[0]


def _forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    silu: bool,
) -> tuple[jax.Array, norm.Kept]:
    def kernel(x: jax.Array, *vectors: jax.Array, interpret: bool) -> Any:
        made = tile(x, groups, FORWARD)
        assert made is not None  # since BACKWARD is less
        body = functools.partial(_forward_kernel, made, epsilon, silu)
        image, *of_channel = _by_group((x, *vectors), groups)
        statistic = jax.ShapeDtypeStruct((len(x), groups), jnp.float32)
        out = (jax.ShapeDtypeStruct(image.shape, x.dtype), statistic, statistic)
        y, *rest = _call(body, made, (image,), of_channel, out, interpret)
        return y.reshape(x.shape), *rest

    def twin(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        (y,), kept = norm.forward((x,), scale, bias, groups, epsilon, silu)
        return y, kept.mean, kept.rstd

    y, mean, rstd = _dispatch(kernel, twin, x, scale, bias)
    return y, norm.Kept((x,), scale, bias, mean, rstd)


def _backward(
    groups: int, epsilon: float, silu: bool, kept: norm.Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (x,), scale, bias, mean, rstd = kept

    def kernel(
        x: jax.Array,
        g: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        *statistics: jax.Array,
        interpret: bool,
    ) -> Any:
        made = tile(x, groups, BACKWARD)
        assert made is not None
        body = functools.partial(_backward_kernel, made, silu)
        *images, a, b = _by_group((x, g, scale, bias), groups)
        of_channel = jax.ShapeDtypeStruct((len(x), *a.shape), jnp.float32)
        out = (jax.ShapeDtypeStruct(images[0].shape, x.dtype), of_channel, of_channel)
        given = (*images, *statistics)
        dx, *sums = _call(body, made, given, (a, b), out, interpret)
        return dx.reshape(x.shape), *(v.sum(0).reshape(-1) for v in sums)

    def twin(x: jax.Array, g: jax.Array, *rest: jax.Array) -> Any:
        again = norm.Kept((x,), *rest)
        (dx,), *others = norm.backward(groups, epsilon, silu, again, (g,))
        return dx, *(a.astype(jnp.float32) for a in others)

    found = _dispatch(kernel, twin, x, gradient, scale, bias, mean, rstd)
    dx, of_scale, of_bias = found
    return dx, of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_norm_silu.defvjp(_forward, _backward)


def _dispatch(kernel: Any, twin: Any, *given: jax.Array) -> Any:
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


def _by_group(given: Sequence[jax.Array], groups: int) -> list[jax.Array]:
    """Returns activations as [B, pixels, groups, width], vectors as [groups, width]."""
    return [
        a.reshape(len(a), -1, groups, a.shape[-1] // groups)
        if a.ndim == 4
        else a.reshape(groups, -1)
        for a in given
    ]


def _call(
    body: Any,
    made: Tile,
    batched: Sequence[jax.Array],
    shared: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Any:
    """Returns what a kernel makes of every image and block of groups.

    Args:
      body: the kernel; it sees all of its image, and all of what is shared.
      made: what a program holds.
      batched: arrays [B, ...], the first with groups as its third axis.
      shared: arrays that all images have in common.
      out: shapes of the results, [B, ...].
      interpret: whether to interpret it, rather than to compile it.
    """
    batch, _, groups, _ = batched[0].shape

    def of_image(a: Any) -> pl.BlockSpec:
        zeros = (0,) * (a.ndim - 1)
        return pl.BlockSpec((None, *a.shape[1:]), lambda image, _: (image, *zeros))

    def whole(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)

    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(batch, pl.cdiv(groups, made.groups)),
        in_specs=[*map(of_image, batched), *map(whole, shared)],
        out_specs=list(map(of_image, out)),
        compiler_params=triton.CompilerParams(num_warps=made.warps, num_stages=1),
        interpret=interpret,
    )(*batched, *shared)


def _forward_kernel(
    made: Tile,
    epsilon: float,
    silu: bool,
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    mean_ref: Any,
    rstd_ref: Any,
) -> None:
    places, channels, groups = _places(made, x_ref.shape)
    x = _load(x_ref, places)
    mean = _over_group(x, x_ref.shape)
    centred = jnp.where(places[1], x - mean[None, :, None], 0.0)
    variance = _over_group(centred * centred, x_ref.shape)
    rstd = jax.lax.rsqrt(variance + epsilon)
    a, b = _load(scale_ref, channels), _load(bias_ref, channels)
    y = centred * rstd[None, :, None] * a[None] + b[None]
    _store(y_ref, places, y * jax.nn.sigmoid(y) if silu else y)
    _store(mean_ref, groups, mean)
    _store(rstd_ref, groups, rstd)


def _backward_kernel(
    made: Tile,
    silu: bool,
    x_ref: Any,
    g_ref: Any,
    mean_ref: Any,
    rstd_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    dx_ref: Any,
    of_scale_ref: Any,
    of_bias_ref: Any,
) -> None:
    """The equations of `norm.backward`."""
    places, channels, groups = _places(made, x_ref.shape)
    x, g = _load(x_ref, places), _load(g_ref, places)
    a, b = _load(scale_ref, channels), _load(bias_ref, channels)
    mean, rstd = _load(mean_ref, groups), _load(rstd_ref, groups)
    u = (x - mean[None, :, None]) * rstd[None, :, None]
    # Where g is masked so is d.
    d = norm.before_silu(u * a[None] + b[None], g) if silu else g
    _store(of_scale_ref, channels, (d * u).sum(0))
    _store(of_bias_ref, channels, d.sum(0))
    d = d * a[None]
    p, q = (_over_group(v, x_ref.shape)[None, :, None] for v in (d, d * u))
    _store(dx_ref, places, (d - p - u * q) * rstd[None, :, None])


Places = tuple[tuple[jax.Array, ...], jax.Array]


def _places(made: Tile, shape: tuple[int, ...]) -> tuple[Places, Places, Places]:
    """Returns indices and masks of a tile's values, channels and groups."""
    first = pl.program_id(1) * made.groups

    def places(axes: tuple[int, ...]) -> Places:
        sizes = tuple(made[axis] for axis in axes)
        each = []
        for axis, of in enumerate(axes):
            index = jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
            each.append(index + first if of == 1 else index)
        inside = [index < shape[of] for index, of in zip(each, axes, strict=True)]
        return tuple(each), functools.reduce(jnp.logical_and, inside)

    return places((0, 1, 2)), places((1, 2)), places((1,))


def _load(ref: Any, places: Places) -> jax.Array:
    indices, mask = places
    return triton.load(ref.at[indices], mask=mask, other=0.0).astype(jnp.float32)


def _store(ref: Any, places: Places, value: jax.Array) -> None:
    indices, mask = places
    triton.store(ref.at[indices], value.astype(ref.dtype), mask=mask)


def _over_group(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the mean over the pixels and channels of each group."""
    pixels, _, width = shape
    return values.sum(0).sum(1) / (pixels * width)
