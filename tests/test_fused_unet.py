"""The U-Net in its fused forms against the plain one, and where they are used."""

import dataclasses
import functools
import itertools

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_unets import (
    FAST_KEY,
    assert_close,
    by_shape,
    name_of,
    normal,
    parameters,
    quick_jit,
    shapes,
)

from diffusion_jax.nets import unet
from diffusion_jax.nets.dropout import dropout
from diffusion_jax.training import arithmetic, parallel
from experiments import build, chains, eval_nll, learning
from experiments.config import Config, ConfigError, Data, Net, from_dict, replace
from experiments.configs import EXPERIMENTS
from experiments.validation import validate

FORMS = [
    forms
    for count in range(1, 1 + len(unet.FUSE))
    for forms in itertools.combinations(unet.FUSE, count)
]
SMALLEST = unet.UNet(
    channels=8, multipliers=(1,), attention=(), groups=4, blocks=1, dropout=0.2
)
# Here groups of six begin in one part and end in the other, of 16 and 8 channels.
TWO_LEVELS = SMALLEST.clone(multipliers=(1, 2))
# Heads of attention, labels, and other constants.
UNUSUAL = SMALLEST.clone(variant="diffusers", num_classes=3)
LABEL = np.array([2, 0])


def inputs(net, size):
    label = LABEL if net.num_classes else None
    return normal(2, size, size, 3), np.array([3, 700]), label


def random_parameters(net, size):
    return parameters(net, *inputs(net, size))


def output(net, size, **options):
    """What a network puts out, of parameters that do not depend on its forms."""
    net, (x, t, label) = net.clone(**options), inputs(net, size)
    params = random_parameters(net, size)
    return quick_jit(lambda p: net.apply({"params": p}, x, t, label))(params)


def training_gradients(net, size):
    """Gradients of a training step, by the names of parameters."""
    x, t, label = inputs(net, size)
    target = normal(*x.shape, seed=5)

    def loss(params):
        rngs = {"dropout": FAST_KEY}
        out = net.apply({"params": params}, x, t, label, train=True, rngs=rngs)
        return jnp.square(out - target).sum()

    grads = quick_jit(jax.grad(loss))(random_parameters(net, size))
    pairs = jax.tree_util.tree_flatten_with_path(grads)[0]
    return {name_of(path): leaf for path, leaf in pairs}


@functools.cache
def plain(function, net):
    return function(net, 8)


@pytest.mark.parametrize("fuse", FORMS, ids="-".join)
def test_every_combination_is_the_same_network(fuse):
    out = output(SMALLEST, 8, fuse=fuse)
    assert out.dtype == jnp.float32
    assert_close(out, plain(output, SMALLEST))


def test_groups_may_straddle_the_skip_connection():
    assert_close(output(TWO_LEVELS, 8, fuse=unet.FUSE), plain(output, TWO_LEVELS))


def test_kernels_are_the_same_network():
    out = output(SMALLEST, 8, fuse=("norm", "skip"), kernels="pallas")
    assert_close(out, plain(output, SMALLEST))


@pytest.mark.parametrize(
    ("base", "options"),
    [(SMALLEST, {}), (UNUSUAL, {"conv": "matmul", "remat": True})],
    ids=["all", "heads-labels-matmul-remat"],
)
def test_all_forms_have_the_same_gradients_with_every_option(base, options):
    grads = training_gradients(base.clone(fuse=unet.FUSE, **options), 8)
    expected = plain(training_gradients, base)
    assert grads.keys() == expected.keys()
    scale = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        if name.endswith("key/bias"):  # which is nothing but rounding
            assert np.abs(grads[name]).max() < 1e-5 * scale
        else:
            assert_close(grads[name], grad, 1e-4)


def test_bfloat16_is_as_near_as_the_plain_network():
    exact = plain(output, SMALLEST)

    def error(fuse):
        out = output(SMALLEST, 8, fuse=fuse, dtype=jnp.bfloat16)
        return np.abs(out - exact).max() / np.abs(exact).max()

    assert error(unet.FUSE) < 0.02
    assert error(unet.FUSE) < 1.5 * error(())


# Parameters.


@pytest.mark.parametrize("fuse", FORMS, ids="-".join)
def test_parameters_have_the_same_names_and_shapes(fuse):
    net = unet.UNet()
    assert by_shape(shapes(net.clone(fuse=fuse), 32)) == by_shape(shapes(net, 32))


def test_parameters_start_the_same():
    x, t, _ = inputs(SMALLEST, 4)
    key = jax.random.key(0)
    plain, fused = (
        quick_jit(net.init)(key, x, t)["params"]
        for net in (SMALLEST, SMALLEST.clone(fuse=unet.FUSE))
    )
    jax.tree.map(np.testing.assert_array_equal, fused, plain)


def operations(jaxpr):
    """All operations of a program, those of the programs it calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        values = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        )
        for inner in values:
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def test_skip_connections_are_never_joined():
    def widest(fuse):
        net = SMALLEST.clone(fuse=fuse)
        params = {"params": shapes(net, 8)}
        jaxpr = jax.make_jaxpr(net.apply)(params, *inputs(net, 8)[:2])
        found = [v.aval.shape for eqn in operations(jaxpr) for v in eqn.outvars]
        return max(shape[-1] for shape in found if shape[:3] == (2, 8, 8))

    assert widest(()) == widest(("norm",)) == 2 * 8
    assert widest(("skip",)) == widest(("norm", "skip")) == 8


def test_the_arithmetic_of_convolutions_and_products_is_the_same():
    x, t, _ = inputs(SMALLEST, 8)
    params = {"params": shapes(SMALLEST, 8)}
    kernels = SMALLEST.clone(fuse=unet.FUSE, kernels="pallas")
    counted = {
        arithmetic.count(net.apply, params, x, t)
        for net in (SMALLEST, SMALLEST.clone(fuse=unet.FUSE), kernels)
    }
    assert len(counted) == 1


# Casting once.


def test_cast_parameters_give_the_same_bits():
    net = SMALLEST.clone(dtype=jnp.bfloat16, fuse=unet.FUSE, num_classes=3)
    x, t, label = inputs(net, 8)
    params = random_parameters(net, 8)
    run = quick_jit(lambda params: net.apply({"params": params}, x, t, label))
    cast = unet.cast(params, net.dtype)
    np.testing.assert_array_equal(run(cast), run(params))
    kept = {
        name_of(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    every = by_shape(params)
    assert kept == {
        name for name in every if "norm" in name or name.startswith("conv_out")
    }
    # float32 is left as it is.
    jax.tree.map(np.testing.assert_array_equal, unet.cast(params, jnp.float32), params)


TINY = Config(
    data=Data(image_size=8),
    net=Net(
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention=(),
        groups=4,
        dropout=0.0,
        dtype="bfloat16",
        fuse=("norm", "skip", "qkv"),
    ),
)


def test_a_chain_casts_its_parameters_once(monkeypatch):
    config = replace(TINY, "diffusion", num_steps=4)
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))

    def kernels_cast():
        """Casts of a convolution's kernels in the loop."""
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(jax, "jit", lambda function: drawn.append(function))
            chains.make_draw(config, 2, parallel.make_mesh(1))
        jaxpr = jax.make_jaxpr(drawn[0])(params, jax.random.key(0), 0)
        (loop,) = (e for e in operations(jaxpr) if e.primitive.name == "scan")
        inside = operations(loop.params["jaxpr"])
        cast = [e.outvars[0] for e in inside if e.primitive.name.startswith("convert")]
        return sum(v.aval.shape == (3, 3, 8, 8) for v in cast)

    assert kernels_cast() == 0
    monkeypatch.setattr(build, "as_computed", lambda config, params: params)
    assert kernels_cast() > 0


# Dropout.


@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-6])
def test_dropout_keeps_its_share_and_the_mean(rate):
    x = jnp.ones([2000, 501])
    y = np.asarray(quick_jit(dropout, static_argnums=2)(jax.random.key(1), x, rate))
    kept = y != 0
    error = np.sqrt(rate * (1 - rate) / y.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * error + 2**-17
    assert len(np.unique(y[kept])) == 1
    # The mean over all 65,536 values of the bits is 1, whatever the rate.
    share = round((1 - rate) * 2**16) / 2**16
    np.testing.assert_allclose(y.max() * share, 1, rtol=1e-6)
    assert abs(share - (1 - rate)) <= 2**-17
    np.testing.assert_allclose(y.var(), rate / (1 - rate), rtol=0.02, atol=1e-5)
    if rate > 0.01:
        # No row, column or neighbour depends on another.
        for axis in (0, 1):
            spread = kept.mean(axis).std() * np.sqrt(kept.shape[axis])
            np.testing.assert_allclose(spread, np.sqrt(rate * (1 - rate)), rtol=0.15)
        pairs = (kept[:, 1:] & kept[:, :-1]).mean()
        assert abs(pairs - (1 - rate) ** 2) < 1e-2


def test_dropout_takes_any_key_and_gives_each_its_own():
    x, run = jnp.ones([64, 63]), functools.partial(dropout, rate=0.5)
    keys = [
        jax.random.key(0),
        jax.random.key(1),
        jax.random.split(jax.random.key(0))[0],
        jax.random.key(0, impl="rbg"),
    ]
    drawn = [np.asarray(run(key, x)) for key in keys]
    for a, b in itertools.combinations(drawn[:3], 2):
        assert 0.4 < (a == b).mean() < 0.6
    np.testing.assert_array_equal(run(jax.random.PRNGKey(0), x), drawn[0])
    np.testing.assert_array_equal(run(keys[0], x), drawn[0])
    with pytest.raises(ValueError, match=r"below 1; got 1\.0"):
        dropout(keys[0], x, 1.0)


def test_dropout_on_many_devices_is_that_on_one():
    mesh, x = parallel.make_mesh(), jnp.ones([16, 5, 3])
    run = quick_jit(functools.partial(dropout, rate=0.5))
    spread = NamedSharding(mesh, PartitionSpec(parallel.AXIS))
    placed = run(jax.random.key(0), jax.device_put(x, spread))
    np.testing.assert_array_equal(placed, run(jax.random.key(0), x))


def test_network_drops_by_the_fast_bits_in_training_alone():
    net = SMALLEST.clone(dropout_bits="rbg", dropout=0.5)
    x, t, _ = inputs(net, 8)
    params = {"params": parameters(net, x, t)}

    def apply(key):
        return net.apply(params, x, t, train=True, rngs={"dropout": key})

    run = quick_jit(apply)
    a, b, c = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    # Blocks have keys of their own: as many as there are blocks.
    jaxpr = str(jax.make_jaxpr(apply)(jax.random.key(0)))
    assert jaxpr.count("impl=rbg") == 5
    sampled = jax.make_jaxpr(functools.partial(net.apply, params))(x, t)
    assert "impl=rbg" not in str(sampled)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(functools.partial(net.apply, params, x, t, train=True))


# Where the forms are used, and refused.


def test_configured_forms_reach_the_network():
    config = replace(TINY, "net", dropout_bits="rbg")
    net = build.make_network(config)
    assert (net.fuse, net.dropout_bits) == (unet.FUSE, "rbg")
    default = build.make_network(Config())
    assert (default.fuse, default.kernels) == ((), "xla")
    assert default.dropout_bits == "threefry"


def test_kernels_are_left_where_the_compiler_would_cut_the_program():
    # Here are eight devices.
    config = replace(TINY, "net", kernels="pallas")
    assert build.make_network(config).kernels == "xla"
    assert build.make_network(config, cut=False).kernels == "pallas"
    learning.make_pure_step(config, parallel.make_mesh(1))
    spread = replace(config, "train", parallel="shard_map")
    learning.make_pure_step(spread, parallel.make_mesh())
    # Training has the kernel in its step, for each device runs its own.
    params = jax.eval_shape(lambda: build.init_params(config, jax.random.key(0)))
    batch = {
        "image": jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.uint8),
        "position": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    text = str(jax.make_jaxpr(learning.make_loss(spread))(params, batch, key))
    assert "pallas_call" in text
    with pytest.raises(ConfigError, match=r"must be shard_map .*; got mesh on 8\. "):
        learning.make_pure_step(config, parallel.make_mesh())


def test_the_flow_is_evaluated_by_a_network_with_forward_derivatives():
    params = jax.eval_shape(lambda: build.init_params(TINY, jax.random.key(0)))

    def derivative(config):
        def along(params, x):
            levels = build.make_schedule(config)
            apply = build.make_apply(config, params, levels)
            return jax.jvp(lambda x: apply(x, jnp.ones(2)), (x,), (x,))

        jax.jit(along).lower(params, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))

    with pytest.raises(TypeError, match="forward-mode"):
        derivative(TINY)
    derivative(build.plain(TINY))
    # The forms that have such derivatives are kept.
    assert build.plain(TINY).net == dataclasses.replace(TINY.net, fuse=("skip", "qkv"))
    # The flow asks for them of the network of a run.
    evaluate = eval_nll.make_ode(TINY, eval_nll.Options(ode=True))
    batch = {
        "i": jax.ShapeDtypeStruct((2,), jnp.int32),
        "x": jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.uint8),
    }
    assert jax.eval_shape(evaluate, params, batch).total.shape == (2,)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"fuse": ("norm", "conv")}, "norm, conv"),
        ({"fuse": ("norm", "norm")}, "norm, norm"),
        ({"kernels": "triton", "fuse": ("norm",)}, "triton"),
        ({"kernels": "pallas", "fuse": ("skip",)}, "pallas"),
        ({"dropout_bits": "philox"}, "philox"),
    ],
)
def test_forms_that_do_not_exist_are_refused(refuses, options, got):
    net = SMALLEST.clone(**options)
    with refuses(got):
        net.init(jax.random.key(0), *inputs(net, 8)[:2])


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"fuse": ("norm", "norm")}, "norm norm"),
        ({"kernels": "pallas"}, "pallas"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(refuses, options, got):
    config = replace(EXPERIMENTS["digits"].config, "net", **options)
    with refuses(got):
        validate(config)


def test_an_unknown_form_in_a_file_is_refused(refuses):
    with refuses("conv"):
        from_dict({"net": {"fuse": ["conv"]}}, partial=True)
