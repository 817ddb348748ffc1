"""GroupNorm with SiLU in few passes: against NumPy, and against its plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_unets import assert_close, double, normal, quick_jit

from diffusion_jax.nets import dropout, norm
from diffusion_jax.training import parallel

EPSILON = 1e-6
# Channels of the parts: one; groups that end where the parts do; one that straddles.
PARTS = {"one": (8,), "two": (4, 8), "straddling": (6, 6)}
GROUPS = {"one": 4, "two": 3, "straddling": 4}


def plain(parts, scale, bias, groups, epsilon, *, silu=False, keep=1.0, **more):
    """As `norm.group_norm`, written as it is meant, with the derivatives of JAX."""
    shift, of_images, mask = (more.get(k) for k in ("shift", "of_images", "mask"))
    x = jnp.concatenate(parts, axis=-1).astype(jnp.promote_types(parts[0].dtype, "f4"))
    for more in (None if shift is None else shift[None], of_images):
        x = x if more is None else x + more[:, None, None]
    grouped = x.reshape(*x.shape[:3], groups, -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
    y = (centred * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)
    y = y * scale[None, None, None] + bias[None, None, None]
    y = jax.nn.silu(y) if silu else y
    if mask is not None:
        y = jnp.where(dropout.unpacked(mask, x.shape[-1]), y / keep, 0)
    return y.astype(parts[0].dtype)


FORMS = {"plain": plain, "own": norm.group_norm}


def given(sizes, side=(4, 5), batch=2, mean=1.0):
    """Parts, scale, bias, and the gradient of the result."""
    parts = tuple(
        2 * normal(batch, *side, size, seed=seed) + mean
        for seed, size in enumerate(sizes)
    )
    scale, bias = normal(2, sum(sizes), seed=3)
    return parts, 1 + 0.3 * scale, bias, normal(batch, *side, sum(sizes), seed=9)


def with_gradients(form, groups, **options):
    """A jitted function to the result and the gradients by parts, scale and bias."""

    def run(parts, scale, bias, gradient):
        def of(*args):
            return FORMS[form](*args, groups, EPSILON, **options)

        out, backward = jax.vjp(of, parts, scale, bias)
        return out, *backward(gradient)

    return quick_jit(run)


def truth(parts, scale, bias, groups, *, silu=False, more=0.0):
    """The result in float64, by NumPy."""
    x = np.concatenate(double(parts), axis=-1) + more
    params = double({"scale": scale, "bias": bias})
    y = numpy_unet.group_norm(params, x, groups, EPSILON)
    return numpy_unet.swish(y) if silu else y


# Sides whose pixels are summed in one go, in rows of up to 128, and in no even rows.
@pytest.mark.parametrize(
    ("name", "side"),
    [("one", (2, 2)), ("two", (16, 16)), ("straddling", (11, 23))],
)
@pytest.mark.usefixtures("forms_of")
def test_value_is_that_of_numpy_and_every_gradient_that_of_the_plain_form(name, side):
    parts, scale, bias, gradient = given(PARTS[name], side)
    shift, of_images = normal(len(scale), seed=6), 3 * normal(2, len(scale), seed=5)
    mask, keep = dropout.mask(jax.random.key(2), gradient.shape, 0.3)
    args = jax.tree.map(jnp.asarray, (parts, scale, bias, shift, of_images))

    def run(form, *args):
        def of(parts, scale, bias, shift, of_images):
            more = {"shift": shift, "of_images": of_images, "mask": mask, "keep": keep}
            return FORMS[form](
                parts, scale, bias, GROUPS[name], EPSILON, silu=True, **more
            )

        out, backward = jax.vjp(of, *args)
        return out, backward(gradient)

    run = quick_jit(run, static_argnums=0)
    found, expected = (jax.tree.leaves(run(form, *args)) for form in ("own", "plain"))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2e-5)
        assert np.abs(a).max() > 0.01
    added = (shift + of_images)[:, None, None]
    value = truth(parts, scale, bias, GROUPS[name], silu=True, more=added)
    kept = dropout.unpacked(mask, len(scale))
    assert_close(found[0], np.where(kept, value / keep, 0))


@pytest.mark.usefixtures("forms_of")
def test_second_derivatives_are_those_of_the_plain_form():
    parts, scale, bias, gradient = given((8,))

    def twice(form, x, scale):
        def slope(x, scale):
            of = functools.partial(FORMS[form], bias=bias, groups=4, epsilon=EPSILON)
            first = jax.grad(lambda x: (of((x,), scale, silu=True) * gradient).sum())
            return jnp.square(first(x)).sum()

        return jax.grad(slope, (0, 1))(x, scale)

    run = quick_jit(twice, static_argnums=0)
    for a, b in zip(*(run(form, parts[0], scale) for form in FORMS), strict=True):
        assert_close(a, b, 2e-5)


def test_shift_may_be_large_and_is_not_rounded_to_the_activation():
    # In bfloat16 x + shift would have lost most of x.
    parts, scale, bias, _ = given((32,), side=(8, 8), mean=0.0)
    x = jnp.asarray(parts[0], jnp.bfloat16)
    shift, of_images = 60 + normal(32, seed=4), 40 + normal(2, 32, seed=5)
    form = functools.partial(norm.group_norm, shift=shift, of_images=of_images)
    out = quick_jit(lambda x: form((x,), scale, bias, 8, EPSILON))(x)
    expected = truth((x,), scale, bias, 8, more=(shift + of_images)[:, None, None])
    np.testing.assert_allclose(double(out), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("mean", [200.0, -2000.0])
def test_mean_may_be_large(mean):
    # Relative to the deviation, 2; x has no more digits than this itself.
    parts, scale, bias, gradient = given((32,), side=(8, 8), mean=mean)
    out, dx, *_ = with_gradients("own", 8)(parts, scale, bias, gradient)
    error = 1e-7 * abs(mean)
    assert_close(out, truth(parts, scale, bias, 8), error)
    expected = with_gradients("plain", 8)(parts, scale, bias, gradient)[1]
    assert_close(dx[0], expected[0], 3 * error)


# Of a group of four channels one is far from the others, also the first, to which all
# are relative; or the middle pixel, to which the others are.
@pytest.mark.parametrize(
    ("where", "by", "tolerance"),
    [
        (np.s_[..., 0], 300.0, 1e-5),
        (np.s_[..., 3], 300.0, 1e-5),
        (np.s_[:, 8, 8], 500.0, 3e-5),
    ],
    ids=["first", "last", "pixel"],
)
def test_values_of_a_group_may_be_far_apart(where, by, tolerance):
    parts, scale, bias, _ = given((8,), side=(16, 16))
    parts[0][where] += by
    out = norm.group_norm((jnp.asarray(parts[0]),), scale, bias, 2, EPSILON)
    assert_close(out, truth(parts, scale, bias, 2), tolerance)


def test_bfloat16_is_rounded_once():
    parts, scale, bias, gradient = given((8,), side=(8, 8), mean=8.0)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in (parts[0], gradient))
    run = with_gradients("own", 2, silu=True)
    out, dx, of_scale, of_bias = run(half[:1], scale, bias, half[1])
    assert out.dtype == dx[0].dtype == jnp.bfloat16
    assert of_scale.dtype == of_bias.dtype == jnp.float32
    expected = truth(half[:1], scale, bias, 2, silu=True)
    np.testing.assert_allclose(double(out), expected, rtol=2**-8, atol=1e-4)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    exact = with_gradients("plain", 2, silu=True)
    _, exact_dx, *others = exact(wide[:1], scale, bias, wide[1])
    assert_close(dx[0], exact_dx[0], 2**-8)
    for a, b in zip((of_scale, of_bias), others, strict=True):
        assert_close(a, b, 1e-5)


def test_only_the_activation_is_kept_for_the_backward_pass():
    x = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((8,), jnp.float32)

    def bytes_kept(form):
        def backward(x, scale, bias):
            of = functools.partial(FORMS[form], groups=4, epsilon=EPSILON, silu=True)
            return jax.vjp(of, (x,), scale, bias)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, x, v, v))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    own = x.size * 2
    assert bytes_kept("plain") > 4 * own
    assert own <= bytes_kept("own") < 1.1 * own


def loss(g, x, scale, bias):
    """With shifts and a mask that are, like x, of an image."""
    mask = (x[..., :1] > 0).astype(jnp.uint8) * 0b1011_0110
    more = {"shift": bias, "of_images": x.mean((1, 2)), "mask": mask, "keep": 0.9}
    out = norm.group_norm((x,), scale, bias, 4, EPSILON, silu=True, **more)
    return (out * 0.1 * g[:1]).sum()


def test_spread_over_devices_or_image_by_image_is_the_same():
    (x,), scale, bias, g = given((8,), batch=8)
    mesh, spread = parallel.make_mesh(), PartitionSpec(parallel.AXIS)
    gradient = jax.grad(functools.partial(loss, g), (0, 1, 2))
    expected = quick_jit(gradient)(x, scale, bias)

    def of_sum(*args):
        total = functools.partial(jax.lax.psum, axis_name=parallel.AXIS)
        return jax.grad(lambda *a: total(loss(g, *a)), (0, 1, 2))(*args)

    def summed(*args):
        dx, *others = gradient(*args)
        return dx, *jax.lax.psum(others, parallel.AXIS)

    placed = jax.device_put(x, NamedSharding(mesh, spread))
    found = [quick_jit(gradient)(placed, scale, bias)]
    for check, body in {False: summed, True: of_sum}.items():
        specs = {"in_specs": (spread, PartitionSpec(), PartitionSpec())}
        specs["out_specs"] = specs["in_specs"]
        run = jax.shard_map(body, mesh=mesh, check_vma=check, **specs)
        found.append(quick_jit(run)(x, scale, bias))
    alone = quick_jit(jax.vmap(lambda x: gradient(x[None], scale, bias)))(x)
    found.append((alone[0][:, 0], *(a.sum(0) for a in alone[1:])))
    for each in found:
        for a, b in zip(each, expected, strict=True):
            assert_close(a, b, 1e-6)
