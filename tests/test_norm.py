"""GroupNorm with SiLU in all its forms: against NumPy, and the kernels against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
from small_unets import assert_close, double, normal, quick_jit

from diffusion_jax.nets import norm, norm_pallas
from diffusion_jax.training import parallel

EPSILON = 1e-6
FORMS = {"plain": norm.plain, "fused": norm.fused, "kernel": norm_pallas.fused}
# Channels of the parts: one; groups that end where the parts do; one that straddles.
PARTS = {"one": (8,), "two": (4, 8), "straddling": (6, 6)}
every_form = pytest.mark.parametrize("form", FORMS)


def vectors(channels, seed=3):
    scale, bias = normal(2, channels, seed=seed)
    return 1 + 0.3 * scale, bias


def given(sizes, side=(4, 5), batch=2, shift=1.0):
    """Parts, scale, bias, and a gradient for each part."""
    parts = tuple(
        2 * normal(batch, *side, size, seed=seed) + shift
        for seed, size in enumerate(sizes)
    )
    gradients = tuple(
        normal(batch, *side, size, seed=9 + seed) for seed, size in enumerate(sizes)
    )
    return parts, *vectors(sum(sizes)), gradients


def with_gradients(form, groups, silu):
    """A jitted function to the results and the gradients by parts, scale and bias."""

    def run(parts, scale, bias, gradients):
        def of(*args):
            return FORMS[form](*args, groups, EPSILON, silu)

        out, backward = jax.vjp(of, parts, scale, bias)
        return out, *backward(gradients)

    return quick_jit(run)


def truth(parts, scale, bias, groups, silu):
    """The parts in float64, by NumPy."""
    x = np.concatenate(double(parts), axis=-1)
    params = double({"scale": scale, "bias": bias})
    y = numpy_unet.group_norm(params, x, groups, EPSILON)
    y = numpy_unet.swish(y) if silu else y
    return np.split(y, np.cumsum([part.shape[-1] for part in parts])[:-1], axis=-1)


def true_gradients(parts, scale, bias, gradients, groups, silu):
    """The derivative along random directions of everything, in float64 by NumPy.

    Returns directions by parts, scale and bias, and the slope of the inner product of
    results and gradients.
    """
    rng = np.random.default_rng(7)
    where = double((parts, scale, bias))
    along = jax.tree.map(lambda a: rng.normal(size=a.shape), where)

    def value(step):
        moved = jax.tree.map(lambda a, v: a + step * v, where, along)
        out = truth(*moved, groups, silu)
        return sum((y * g).sum() for y, g in zip(out, gradients, strict=True))

    return along, (value(1e-5) - value(-1e-5)) / 2e-5


@pytest.mark.parametrize(
    ("form", "silu"),
    [("plain", True), ("fused", True), ("fused", False), ("kernel", True)],
)
@pytest.mark.parametrize("name", PARTS)
def test_every_form_and_its_gradient_equal_numpy(name, form, silu):
    groups = 4 if name != "two" else 3
    parts, scale, bias, gradients = given(PARTS[name])
    run = with_gradients(form, groups, silu)
    out, *found = run(parts, scale, bias, gradients)
    for y, expected in zip(out, truth(parts, scale, bias, groups, silu), strict=True):
        assert_close(y, expected)
    along, slope = true_gradients(parts, scale, bias, gradients, groups, silu)
    products = jax.tree.map(lambda g, v: (double(g) * v).sum(), tuple(found), along)
    total = sum(jax.tree.leaves(products))
    size = sum(np.sqrt((double(g) ** 2).sum()) for g in jax.tree.leaves(found))
    assert abs(total - slope) < 1e-5 * size


def test_gradients_of_every_single_value_are_those_of_the_plain_form():
    parts, scale, bias, gradients = given(PARTS["straddling"])
    plain, fused = (
        with_gradients(form, 4, silu=True)(parts, scale, bias, gradients)
        for form in ("plain", "fused")
    )
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert_close(a, b)


# What comes before and after.


@pytest.mark.parametrize("name", PARTS)
@every_form
def test_shift_and_dropout_are_those_of_separate_passes(form, name):
    parts, scale, bias, gradients = given(PARTS[name])
    rng = np.random.default_rng(5)
    shift = 3 * rng.normal(size=(len(parts[0]), len(scale))).astype(np.float32)
    mask = tuple(rng.random(part.shape) < 0.7 for part in parts)

    def apart(parts, scale, bias, shift):
        begins = np.cumsum([part.shape[-1] for part in parts])[:-1]
        slices = jnp.split(shift[:, None, None], begins, axis=-1)
        moved = tuple(map(jnp.add, parts, slices))
        out = norm.plain(moved, scale, bias, groups, EPSILON)
        return tuple(jnp.where(m, y / 0.7, 0) for m, y in zip(mask, out, strict=True))

    def together(parts, scale, bias, shift):
        more = {"shift": shift, "mask": mask, "keep": 0.7}
        return FORMS[form](parts, scale, bias, groups, EPSILON, **more)

    def run(of, *args):
        out, backward = jax.vjp(of, *args)
        return out, backward(gradients)

    groups = 3 if name == "two" else 4
    args = (parts, scale, bias, jnp.asarray(shift))
    found, expected = (
        jax.tree.leaves(quick_jit(functools.partial(run, of))(*args))
        for of in (together, apart)
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5)
    assert np.abs(found[-1]).max() > 0.1  # the gradient by the shift


def test_shift_may_be_large_and_is_not_rounded_to_the_activation():
    # In bfloat16 x + shift would have lost most of x.
    parts, scale, bias, gradients = given((32,), side=(8, 8), shift=0.0)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in (parts[0], gradients[0]))
    shift = 100 + normal(2, 32, seed=4)
    moved = np.asarray(half[0], np.float64) + shift[:, None, None]
    expected = truth((moved,), scale, bias, 8, silu=True)[0]
    for form in ("fused", "kernel"):
        run = functools.partial(FORMS[form], groups=8, epsilon=EPSILON, shift=shift)
        out = quick_jit(run)(half[:1], scale, bias)[0]
        np.testing.assert_allclose(
            np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-3
        )


@pytest.mark.parametrize("form", ["fused", "kernel"])
def test_what_is_dropped_has_no_gradient(form):
    parts, scale, bias, gradients = given((8,))
    none = (jnp.zeros(parts[0].shape, bool),)

    def of(*args):
        return FORMS[form](*args, 4, EPSILON, mask=none, keep=0.5)

    out, backward = jax.vjp(of, parts, scale, bias)
    for leaf in jax.tree.leaves((out, backward(gradients))):
        assert not np.asarray(leaf).any()


# Statistics.


@every_form
@pytest.mark.parametrize("shift", [100.0, -1000.0])
def test_mean_may_be_large(form, shift):
    # Relative to the deviation; x has no more digits than this itself.
    parts, scale, bias, gradients = given((32,), side=(8, 8), shift=2 * shift)
    out, dx, *_ = with_gradients(form, 8, silu=False)(parts, scale, bias, gradients)
    error = 2e-7 * abs(shift)
    assert_close(out[0], truth(parts, scale, bias, 8, silu=False)[0], error)
    expected = with_gradients("plain", 8, silu=False)(parts, scale, bias, gradients)[1]
    assert_close(dx[0], expected[0], 3 * error)


@every_form
def test_no_pixel_spoils_the_statistics(form):
    # The middle one, from which the fused form measures, is far from all others.
    parts, scale, bias, _ = given((8,), side=(16, 16))
    x = parts[0]
    x[:, 8, 8] += 500.0
    out = FORMS[form]((jnp.asarray(x),), scale, bias, 4, EPSILON, False)[0]
    assert_close(out, truth((x,), scale, bias, 4, silu=False)[0], 3e-5)


@every_form
def test_bfloat16_is_rounded_once(form):
    parts, scale, bias, gradients = given((8,), side=(8, 8), shift=8.0)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in (parts[0], gradients[0]))
    run = with_gradients(form, 2, silu=form != "plain")
    out, dx, of_scale, of_bias = run(half[:1], scale, bias, half[1:])
    expected = truth(half[:1], scale, bias, 2, silu=form != "plain")[0]
    assert out[0].dtype == dx[0].dtype == jnp.bfloat16
    assert of_scale.dtype == of_bias.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(out[0], np.float64), expected, rtol=2**-8, atol=1e-4
    )
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    exact = with_gradients("plain", 2, silu=form != "plain")
    _, exact_dx, *others = exact(wide[:1], scale, bias, wide[1:])
    assert_close(dx[0], exact_dx[0], 2**-8)
    # The fused form rounds the gradient before SiLU too, of which these are sums.
    bound = 2**-8 if form == "fused" else 1e-5
    for a, b in zip((of_scale, of_bias), others, strict=True):
        assert_close(a, b, bound)


# What is kept, and transformations.


def test_only_the_activation_is_kept_for_the_backward_pass():
    x = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((8,), jnp.float32)

    def bytes_kept(form):
        def backward(x, scale, bias):
            return jax.vjp(lambda *a: FORMS[form](*a, 4, EPSILON), (x,), scale, bias)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, x, v, v))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    own = x.size * 2
    assert bytes_kept("plain") > 4 * own
    for form in ("fused", "kernel"):
        assert own <= bytes_kept(form) < 1.1 * own


def loss_with_everything(form, g, x, scale, bias):
    """With a shift and a mask that are, like x, of an image."""
    more = {"shift": x.mean((1, 2)), "mask": (x > -1,), "keep": 0.9}
    out = FORMS[form]((x,), scale, bias, 4, EPSILON, **more)[0]
    return (out * 0.1 * g[:1]).sum()


@pytest.mark.parametrize("form", ["fused", "kernel"])
def test_transformed_is_the_same(form):
    (x,), scale, bias, (g,) = given((8,), batch=8)

    loss = functools.partial(loss_with_everything, form, g)

    gradient = jax.grad(loss, (0, 1, 2))
    expected = quick_jit(gradient)(x, scale, bias)
    again = jax.grad(jax.checkpoint(loss), (0, 1, 2))
    for a, b in zip(quick_jit(again)(x, scale, bias), expected, strict=True):
        assert_close(a, b, 1e-6)
    alone = jax.vmap(lambda x: gradient(x[None], scale, bias))
    dx, *others = quick_jit(alone)(x)
    assert_close(dx[:, 0], expected[0], 1e-6)
    for a, b in zip(others, expected[1:], strict=True):
        assert_close(a.sum(0), b, 1e-6)


@pytest.mark.parametrize("form", ["fused", "kernel"])
def test_spread_over_devices_is_the_same(form):
    (x,), scale, bias, (g,) = given((8,), batch=8)
    mesh = parallel.make_mesh()
    spread = PartitionSpec(parallel.AXIS)

    loss = functools.partial(loss_with_everything, form, g)

    gradient = jax.grad(loss, (0, 1, 2))
    expected = quick_jit(gradient)(x, scale, bias)

    def of_sum(*args):
        total = functools.partial(jax.lax.psum, axis_name=parallel.AXIS)
        return jax.grad(lambda *a: total(loss(*a)), (0, 1, 2))(*args)

    def summed(*args):
        dx, *others = gradient(*args)
        return dx, *jax.lax.psum(others, parallel.AXIS)

    placed = jax.device_put(x, NamedSharding(mesh, spread))
    found = [quick_jit(gradient)(placed, scale, bias)]
    # Of a kernel JAX would have to be told what differs between devices.
    checks = {"fused": {False: summed, True: of_sum}, "kernel": {False: summed}}
    for check, body in checks[form].items():
        specs = {"in_specs": (spread, PartitionSpec(), PartitionSpec())}
        specs["out_specs"] = specs["in_specs"]
        run = jax.shard_map(body, mesh=mesh, check_vma=check, **specs)
        found.append(quick_jit(run)(x, scale, bias))
    for each in found:
        for a, b in zip(each, expected, strict=True):
            assert_close(a, b, 1e-6)


def test_fused_form_has_no_forward_derivative():
    parts, scale, bias, _ = given((8,))

    def of(x):
        return norm.norm_silu(x, scale, bias, 4, EPSILON)

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(of, parts, parts)


# Kernels.


def both(shape, groups, dtype, silu):
    """Results and gradients of kernel and twin, as (kernel, twin) pairs."""
    x, g = (jnp.asarray(normal(*shape, seed=s) + (s == 1), dtype) for s in (1, 2))
    scale, bias = vectors(shape[-1])
    shift = jnp.asarray(normal(shape[0], shape[-1], seed=6))
    mask = (normal(*shape, seed=8) < 1,)

    def run(form, x, scale, bias, shift):
        def of(x, scale, bias, shift):
            more = {"shift": shift, "mask": mask, "keep": 0.84}
            return form((x,), scale, bias, groups, EPSILON, silu, **more)[0]

        y, backward = jax.vjp(of, x, scale, bias, shift)
        return y, *backward(g)

    run = quick_jit(run, static_argnums=0)
    forms = (norm_pallas.fused, norm.fused)
    return zip(*(run(form, x, scale, bias, shift) for form in forms), strict=True)


# Sides, channels and groups of the CIFAR-10 network (a single image, and the smaller
# sides of its widest blocks), odd ones, and more groups than a tile has.
@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "silu"),
    [
        ((1, 32, 32, 128), 32, jnp.float32, True),
        ((2, 16, 16, 384), 32, jnp.float32, True),
        ((3, 4, 4, 512), 32, jnp.float32, True),
        ((2, 8, 8, 256), 32, jnp.float32, False),
        ((2, 5, 7, 36), 3, jnp.float32, True),
        ((2, 3, 3, 15), 5, jnp.float32, True),
        ((2, 16, 16, 256), 32, jnp.bfloat16, True),
    ],
)
def test_kernel_equals_its_twin(shape, groups, dtype, silu):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert norm_pallas.tile(x, groups, norm_pallas.BACKWARD) is not None
    bounds = (1e-5, 1e-4, 1e-4, 1e-4, 1e-4)
    if dtype == jnp.bfloat16:
        # Beside the result, the twin rounds the gradient before SiLU.
        bounds = (2**-8, 2**-7, 2**-7, 2**-7, 2**-7)
    for (a, b), bound in zip(both(shape, groups, dtype, silu), bounds, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, bound)


def lowered(shape, platform, sizes=None, dtype=jnp.bfloat16):
    """The program of a gradient, made for a platform that need not be here."""
    sizes = sizes or (shape[-1],)
    types = dtype if isinstance(dtype, tuple) else (dtype,) * len(sizes)
    parts = tuple(
        jax.ShapeDtypeStruct((*shape[:-1], n), kind)
        for n, kind in zip(sizes, types, strict=True)
    )
    v = jax.ShapeDtypeStruct((sum(sizes),), jnp.float32)
    shift = jax.ShapeDtypeStruct((shape[0], sum(sizes)), jnp.float32)
    mask = tuple(jax.ShapeDtypeStruct(part.shape, jnp.bool) for part in parts)

    def run(parts, scale, bias, shift, mask):
        def of(*args):
            more = {"shift": args[-1], "mask": mask, "keep": 0.9}
            return norm_pallas.fused(*args[:-1], 32, EPSILON, **more)

        out, backward = jax.vjp(of, parts, scale, bias, shift)
        return out, backward(out)

    # From jax 0.11 on Pallas asks which GPU it is for, where there is none.
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=gpu)
    with use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(parts, v, v, shift, mask)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return text.count("xla.gpu.triton") + text.count("triton_kernel_call")


@pytest.mark.parametrize("side", [32, 16, 8, 4])
@pytest.mark.parametrize("channels", [128, 256, 384, 512])
def test_cuda_has_one_kernel_each_way(side, channels):
    assert kernels(lowered((4, side, side, channels), "cuda")) == 2


def test_what_no_tile_holds_and_other_platforms_have_the_twin():
    assert kernels(lowered((4, 256, 256, 128), "cuda")) == 0
    assert kernels(lowered((4, 16, 16, 128), "cuda", dtype=jnp.float16)) == 0
    types = (jnp.float32, jnp.bfloat16)
    assert kernels(lowered((4, 16, 16, 64), "cuda", (32, 32), types)) == 0
    for platform in ("tpu", "rocm"):
        text = lowered((4, 16, 16, 128), platform)
        assert kernels(text) == 0
        assert "while" not in text  # nor is it interpreted
    assert "while" in lowered((4, 16, 16, 128), "cpu")


@pytest.mark.parametrize("sizes", [(256, 256), (256, 128), (32, 32, 64)])
def test_parts_have_one_kernel_for_all(sizes):
    assert kernels(lowered((4, 16, 16, None), "cuda", sizes=sizes)) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_hold_what_they_must_in_powers_of_two(dtype):
    for side in (3, 4, 8, 12, 16, 32, 64, 128):
        for channels in (32, 96, 128, 256, 384, 512, 1024):
            x = jax.ShapeDtypeStruct((1, side, side, channels), dtype)
            for most in (norm_pallas.FORWARD, norm_pallas.BACKWARD):
                made = norm_pallas.tile(x, 32, most)
                if made is None:
                    continue
                assert np.prod(made) <= most
                assert all(n & (n - 1) == 0 for n in (*made, made.warps))
                assert made.pixels >= side * side
                assert made.width >= channels // 32
            # What the backward pass can hold the forward pass can.
            assert made is None or norm_pallas.tile(x, 32, norm_pallas.FORWARD)
