"""The U-Net against a NumPy float64 reference, and against the facts of the paper.

Parameters are random and none is trivial: at initialisation biases are 0, scales 1 and
the last layer of every block is nearly 0, which would hide most mistakes.
"""

import functools
import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_unet
import pytest

from diffusion_jax.nets import unet

# float32 against float64, relative to the largest value of the result.
TOLERANCE = 1e-5

# Two levels, attention in one of them, two blocks a level as in the paper.
TWO_LEVELS = unet.UNet(channels=8, multipliers=(1, 2), attention=(8,), groups=4)
# All that is unusual: three levels, odd width, grey, labels, learned variance.
UNUSUAL = unet.UNet(
    channels=9,
    multipliers=(1, 2, 1),
    attention=(8, 4),
    groups=3,
    blocks=1,
    out_channels=2,
    num_classes=3,
)
# The smallest network that has every kind of block, and without half of them.
LABELLED = unet.UNet(
    channels=8,
    multipliers=(1, 2),
    attention=(4,),
    groups=4,
    blocks=1,
    num_classes=3,
    dropout=0.2,
)
ONE_LEVEL = unet.UNet(
    channels=8, multipliers=(1,), attention=(), groups=4, blocks=1, dropout=0.2
)

# Both compile many times faster on a CPU than the default. Blocks are compiled with
# all optimisations (`apply`), whole networks and gradients without.
FAST_KEY = jax.random.key(0, impl="unsafe_rbg")
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        # A value of type bfloat16 is rounded to it even inside a fusion.
        "xla_allow_excess_precision": False,
    },
)


def parameters(net, *args, seed=0):
    """Random parameters of a module, drawn by NumPy: no initialiser is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        match path[-1].key:
            case "kernel":
                value = noise / np.sqrt(np.prod(leaf.shape[:-1]))
            case "scale":
                value = 1.0 + 0.3 * noise
            case "embedding":
                value = noise
            case "bias":
                value = 0.3 * noise
        return value.astype(np.float32)

    shapes = jax.eval_shape(lambda key: net.init(key, *args), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def apply(module, params, *args):
    return jax.jit(lambda params: module.apply({"params": params}, *args))(params)


def res_block(**options):
    """A small residual block; options replace the defaults."""
    defaults = {"channels": 8, "groups": 4, "dropout": 0.5, "conv": "xla"}
    return unet.ResBlock(**{**defaults, **options}, dtype=jnp.float32)


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def record(function, params, *args):
    """Runs the `apply` of a module; returns (output, inputs and outputs by module).

    Modules are named by their path, "down0_block0/conv1".
    """

    def run(params, *args):
        inputs, outputs = {}, {}

        def listen(module, args, kwargs, context):
            out = module(*args, **kwargs)
            if context.method_name == "__call__":
                name = "/".join(context.module.path)
                inputs[name] = [a for a in args if isinstance(a, jax.Array)]
                outputs[name] = out
            return out

        with nn.intercept_methods(listen):
            out = function({"params": params}, *args)
        return out, inputs, outputs

    return jax.tree.map(np.asarray, quick_jit(run)(params, *args))


def names(net, size):
    """Names of the modules directly below a network for images of this size."""
    return set(shapes(net, size))


@functools.cache
def shapes(net, size, channels=3):
    """Shapes of the parameters; nothing is allocated."""
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    label = times if net.num_classes else None
    return jax.eval_shape(net.init, jax.random.key(0), images, times, label)["params"]


def count(net, size=32):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(net, size)))


@pytest.fixture(scope="session")
def two_levels():
    """(params, x, t, (output, inputs, outputs)) of the first network."""
    x, t = normal(2, 16, 16, 3), np.array([3, 999])
    params = parameters(TWO_LEVELS, x, t)
    return params, x, t, record(TWO_LEVELS.apply, params, x, t)


@pytest.fixture(scope="session")
def unusual():
    """(params, x, t, jitted apply) of the second network."""
    x, t = normal(2, 16, 16, 1), np.array([0, 512])
    params = parameters(UNUSUAL, x, t, np.array([0, 0]))
    run = quick_jit(lambda p, x, t, label: UNUSUAL.apply({"params": p}, x, t, label))
    return params, x, t, run


# Blocks.


@pytest.mark.parametrize("channels", [4, 5, 16, 17, 128])
def test_time_embedding_equals_numpy(channels):
    t = np.array([0, 1, 10, 500, 999])
    actual = unet.time_embedding(jnp.asarray(t), channels)
    assert actual.dtype == jnp.float32
    # A phase of 999 radians has a rounding error of 3e-5 in float32.
    assert_close(actual, numpy_unet.time_embedding(t, channels), 6e-5)
    assert_close(actual[:3], numpy_unet.time_embedding(t[:3], channels), 2e-6)


@pytest.mark.parametrize("conv", ["xla", "matmul"])
@pytest.mark.parametrize("width", [8, 12])
def test_res_block_equals_numpy(width, conv):
    block = res_block(channels=width, conv=conv)
    x, time = normal(2, 6, 6, 8), normal(2, 32, seed=2)
    params = parameters(block, x, time, False)
    assert ("shortcut" in params) == (width != 8)
    expected = numpy_unet.res_block(double(params), x, time, 4)
    assert_close(apply(block, params, x, time, False), expected)


def test_attention_equals_numpy():
    block = unet.Attention(groups=4, dtype=jnp.float32)
    x = normal(2, 4, 6, 8)
    params = parameters(block, x)
    expected = numpy_unet.attention(double(params), x, 4)
    assert_close(apply(block, params, x), expected)


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_downsample_equals_numpy(conv):
    block = unet.Downsample(conv=conv, dtype=jnp.float32)
    x = normal(2, 6, 8, 5)
    params = parameters(block, x)
    assert_close(apply(block, params, x), numpy_unet.downsample(double(params), x))


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_upsample_equals_numpy(conv):
    block = unet.Upsample(conv=conv, dtype=jnp.float32)
    x = normal(2, 3, 4, 5)
    params = parameters(block, x)
    assert_close(apply(block, params, x), numpy_unet.upsample(double(params), x))


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_equals_numpy(groups):
    x = 3.0 * normal(2, 5, 6, 8) + 1.0
    norm = unet.GroupNorm(groups=groups, dtype=jnp.float32)
    params = parameters(norm, x)
    expected = numpy_unet.group_norm(double(params), x, groups)
    assert_close(apply(norm, params, x), expected)


# The whole network.


def test_network_equals_numpy(two_levels):
    params, x, t, (output, _, outputs) = two_levels
    trace = {}
    expected = numpy_unet.unet(
        double(params),
        x,
        t,
        channels=8,
        levels=2,
        blocks=2,
        attention_at=(8,),
        groups=4,
        trace=trace,
    )
    blocks = {name for name in outputs if re.match("(down|middle|up)[^/]*$", name)}
    assert blocks | {"time2"} == set(trace)
    for name, value in trace.items():
        assert_close(outputs[name], value)
    assert output.dtype == np.float32
    assert_close(output, expected)


def test_unusual_network_equals_numpy(unusual):
    params, x, t, run = unusual
    label = np.array([2, 0])
    expected = numpy_unet.unet(
        double(params),
        x,
        t,
        label,
        channels=9,
        levels=3,
        blocks=1,
        attention_at=(8, 4),
        groups=3,
    )
    assert_close(run(params, x, t, label), expected)


def test_every_image_is_computed_on_its_own(unusual):
    params, x, t, run = unusual
    label = np.array([2, 0])
    other = np.stack([x[0], 10.0 * x[1]])
    before = run(params, x, t, label)[0]
    after = run(params, other, np.array([0, 77]), np.array([2, 1]))[0]
    np.testing.assert_array_equal(before, after)


# What other implementations get wrong.


@pytest.mark.parametrize("conv", ["xla", "matmul"])
def test_stride_2_pads_only_below_and_right(conv):
    block = unet.Downsample(conv=conv, dtype=jnp.float32)
    run, x = jax.jit(block.apply), normal(1, 4, 4, 1)
    for row, col in np.ndindex(3, 3):
        kernel = np.zeros([3, 3, 1, 1], np.float32)
        kernel[row, col] = 1.0
        params = {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
        out = np.asarray(run({"params": params}, x))
        for i, j in np.ndindex(2, 2):
            inside = 2 * i + row < 4 and 2 * j + col < 4
            expected = x[0, 2 * i + row, 2 * j + col, 0] if inside else 0.0
            assert out[0, i, j, 0] == expected


def test_upsampling_repeats_the_nearest_pixel(two_levels):
    _, _, _, (_, inputs, _) = two_levels
    (before,) = inputs["up1_upsample"]
    (after,) = inputs["up1_upsample/conv"]
    assert after.shape == (2, 16, 16, 16)
    rows, cols = np.indices([16, 16]) // 2
    assert_close(after, before[:, rows, cols], 1e-6)


def test_group_norm_epsilon_is_1e_6():
    # The variance is 1e-6 exactly, so that epsilon halves the square of the output.
    x = 1e-3 * (-1.0) ** np.arange(4 * 4 * 8).reshape(1, 4, 4, 8).astype(np.float32)
    norm = unet.GroupNorm(groups=4, dtype=jnp.float32)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    np.testing.assert_allclose(
        np.abs(norm.apply({"params": params}, x)), np.sqrt(0.5), rtol=1e-5
    )


def test_every_group_norm_is_this_one_with_32_groups():
    groups = {}

    def listen(module, args, kwargs, context):
        if "Norm" in type(context.module).__name__:
            assert isinstance(context.module, unet.GroupNorm)
            groups["/".join(context.module.path)] = context.module.groups
        return module(*args, **kwargs)

    params = shapes(unet.UNet(), 32)
    x, t = np.zeros([2, 32, 32, 3], np.float32), np.zeros(2)
    with nn.intercept_methods(listen):
        jax.eval_shape(unet.UNet().apply, {"params": params}, x, t)
    # 22 residual blocks have 2, 6 attention blocks 1, the end 1.
    assert len(groups) == 22 * 2 + 6 + 1
    assert set(groups.values()) == {32}
    scales = {name for name in by_shape(params) if name.endswith("/scale")}
    assert {f"{name}/scale" for name in groups} == scales


def test_group_norm_is_accurate_where_the_mean_is_large():
    # E[x^2] - E[x]^2 loses all digits here; the official code takes two passes.
    x = normal(1, 8, 8, 32) + 100.0
    norm = unet.GroupNorm(groups=8, dtype=jnp.float32)
    params = {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}
    expected = numpy_unet.group_norm(params, x.astype(np.float64), 8)
    assert_close(norm.apply({"params": params}, x), expected, 5e-5)


def test_time_embedding_is_sines_then_cosines():
    embedding = unet.time_embedding(jnp.array([0, 1]), 6)
    np.testing.assert_array_equal(embedding[0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(
        embedding[1],
        [np.sin(1), np.sin(1e-2), np.sin(1e-4), np.cos(1), np.cos(1e-2), np.cos(1e-4)],
        rtol=2e-6,
    )


def test_integer_and_float_times_are_the_same():
    embeddings = [unet.time_embedding(jnp.array([3, 999], t), 8) for t in (int, float)]
    np.testing.assert_array_equal(*embeddings)


@pytest.mark.parametrize("channels", [4, 5, 64, 128])
def test_slowest_frequency_is_1e_4(channels):
    embedding = unet.time_embedding(jnp.array([1]), channels)
    np.testing.assert_allclose(embedding[0, channels // 2 - 1], 1e-4, rtol=2e-6)


def test_odd_time_embedding_ends_in_a_zero():
    t = jnp.array([0, 1, 999])
    odd, even = unet.time_embedding(t, 9), unet.time_embedding(t, 8)
    assert odd.shape == (3, 9)
    np.testing.assert_array_equal(odd[:, :8], even)
    np.testing.assert_array_equal(odd[:, 8], 0)


def test_no_swish_after_the_second_time_layer(two_levels):
    params, _, t, (_, inputs, outputs) = two_levels
    p = double(params)
    hidden = numpy_unet.dense(p["time1"], numpy_unet.time_embedding(t, 8))
    time = numpy_unet.dense(p["time2"], numpy_unet.swish(hidden))
    assert time.min() < -0.3  # swish has no such values
    blocks = [name for name in inputs if re.match(r"\w+_block\d$", name)]
    assert len(blocks) == 2 * 2 + 2 + 2 * 3
    for name in blocks:
        assert_close(inputs[name][1], time)
        # Every block takes its own swish of it.
        assert_close(inputs[f"{name}/time"][0], numpy_unet.swish(time))
    assert outputs["time2"].shape == (2, 32)


def test_skip_connections_carry_what_comes_after_attention(two_levels):
    _, _, _, (_, inputs, outputs) = two_levels
    last_in_first_out = {
        "up1_block0": "down1_block1_attention",
        "up1_block1": "down1_block0_attention",
        "up1_block2": "down0_downsample",
        "up0_block0": "down0_block1",
        "up0_block1": "down0_block0",
        "up0_block2": "conv_in",
    }
    for above, below in last_in_first_out.items():
        skip = outputs[below]
        received = inputs[above][0][..., -skip.shape[-1] :]
        assert_close(received, skip, 1e-6)
    # What came up from below is in front.
    received = inputs["up1_block1"][0][..., :16]
    assert_close(received, outputs["up1_block0_attention"], 1e-6)
    received = inputs["up1_block0"][0][..., :16]
    assert_close(received, outputs["middle_block1"], 1e-6)


@pytest.mark.parametrize(
    ("resolutions", "levels"), [((), ()), ((16,), (0,)), ((8, 4), (1, 2)), ((5,), ())]
)
def test_attention_is_by_resolution_and_always_in_the_middle(resolutions, levels):
    net = unet.UNet(
        channels=8, multipliers=(1, 1, 1), attention=resolutions, groups=4, blocks=2
    )
    expected = {"middle_attention"}
    for i in levels:
        expected |= {f"down{i}_block{j}_attention" for j in range(2)}
        expected |= {f"up{i}_block{j}_attention" for j in range(3)}
    assert {name for name in names(net, 16) if "attention" in name} == expected


def test_the_cifar_network_has_six_attention_blocks():
    assert sum("attention" in name for name in names(unet.UNet(), 32)) == 2 + 1 + 3
    net = unet.UNet(multipliers=(1, 1, 2, 2, 4, 4))
    assert sum("attention" in name for name in names(net, 256)) == 2 + 1 + 3


# Initial values.


@pytest.fixture(scope="session")
def initial():
    net = unet.UNet(channels=16, multipliers=(1,), attention=(4,), groups=4, blocks=1)
    x, t = np.zeros([1, 4, 4, 3], np.float32), np.zeros(1, np.int32)
    return by_name(quick_jit(net.init)(FAST_KEY, x, t)["params"])


def name_of(path):
    return "/".join(entry.key for entry in path)


def by_shape(tree):
    """Shapes of the leaves by their path, "down0_block0/conv1/kernel"."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): leaf.shape for path, leaf in pairs}


def by_name(tree):
    """Leaves by their path."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): np.asarray(leaf) for path, leaf in pairs}


def is_near_zero(name):
    return re.search("(conv2|attention/out|conv_out)/kernel$", name) is not None


def check_uniform(kernel, scale):
    """Checks bound, spread and centre of a fan-average uniform initialiser."""
    taps = np.prod(kernel.shape[:-2], initial=1.0)
    fan = taps * (kernel.shape[-2] + kernel.shape[-1]) / 2.0
    bound, n = np.sqrt(3.0 * scale / fan), kernel.size
    # Of n uniform values the largest is above 1 - 20/n but for odds of e^-20.
    assert (1.0 - 20.0 / n) * bound < np.abs(kernel).max() <= bound * (1.0 + 1e-6)
    deviation = np.sqrt(scale / fan)
    # Five standard errors: that of a uniform's deviation is sqrt(0.2 / n).
    assert abs(kernel.std() / deviation - 1.0) < 5.0 * np.sqrt(0.2 / n)
    assert abs(kernel.mean()) < 5.0 * deviation / np.sqrt(n)


def test_last_layers_start_near_zero_but_not_at_zero(initial):
    kernels = {name: value for name, value in initial.items() if is_near_zero(name)}
    # 1 + 2 + 2 residual blocks, 1 + 1 + 2 attention blocks, the end.
    assert len(kernels) == 5 + 4 + 1
    for kernel in kernels.values():
        assert np.count_nonzero(kernel) > 0.999 * kernel.size
        check_uniform(kernel.astype(np.float64), 1e-10)


def test_other_kernels_start_uniform_with_scale_1(initial):
    kernels = {
        name: value
        for name, value in initial.items()
        if name.endswith("kernel") and not is_near_zero(name)
    }
    assert {"conv_in/kernel", "time1/kernel", "up0_block0/shortcut/kernel"} <= set(
        kernels
    )
    for kernel in kernels.values():
        check_uniform(kernel.astype(np.float64), 1.0)


def test_biases_start_at_0_and_scales_at_1(initial):
    for name, value in initial.items():
        if name.endswith("bias"):
            assert not value.any()
        if name.endswith("scale"):
            assert (value == 1.0).all()


# Sizes.


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, 32, 35_746_307),
        ({"out_channels": 6}, 32, 35_749_766),
        ({"multipliers": (1, 1, 2, 2, 4, 4)}, 256, 113_673_219),
        ({"multipliers": (1, 1, 2, 2, 4, 4), "channels": 192}, 256, 255_677_955),
    ],
    ids=["cifar10", "learned-variance", "256", "bedroom-large"],
)
def test_number_of_parameters_is_that_of_the_paper(options, size, expected):
    assert count(unet.UNet(**options), size) == expected


def test_labels_add_one_embedding_a_class():
    assert count(unet.UNet(num_classes=10)) - count(unet.UNet()) == 10 * 4 * 128


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_output_has_the_shape_of_the_images(size, channels):
    net = unet.UNet(out_channels=channels, blocks=1)
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = shapes(net, size, channels)
    assert params["conv_in"]["kernel"].shape == (3, 3, channels, 128)
    out = jax.eval_shape(net.apply, {"params": params}, images, times)
    assert out.shape == images.shape
    assert out.dtype == jnp.float32


def test_labels_change_the_output(unusual):
    params, x, t, run = unusual
    a = run(params, x, t, np.array([0, 1]))
    b = run(params, x, t, np.array([2, 1]))
    assert np.abs(a[0] - b[0]).max() > 0.01
    np.testing.assert_array_equal(a[1], b[1])


# Dropout.


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_rate_in_training_before_the_last_convolution(rate):
    block = res_block(dropout=rate)
    x, time = normal(8, 16, 16, 8), normal(8, 32, seed=2)
    params = parameters(block, x, time, False)
    rngs = {"dropout": FAST_KEY}
    train = functools.partial(block.apply, train=True, rngs=rngs)
    _, inputs, outputs = record(train, params, x, time)
    dropped = outputs["Dropout_0"] == 0
    error = np.sqrt(rate * (1.0 - rate) / dropped.size)
    assert abs(dropped.mean() - rate) < 5.0 * error
    (before,) = inputs["Dropout_0"]
    assert_close(before, numpy_unet.swish(outputs["norm2"]), 2e-6)
    expected = np.where(dropped, 0.0, before / (1.0 - rate))
    assert_close(inputs["conv2"][0], expected, 2e-6)


def test_every_residual_block_drops_at_the_rate_of_the_network():
    rates = []

    def listen(module, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        return module(*args, **kwargs)

    assert unet.UNet().dropout == 0.1
    net = TWO_LEVELS.clone(dropout=0.3)
    params = {"params": shapes(net, 8)}
    with nn.intercept_methods(listen):
        jax.eval_shape(net.apply, params, normal(2, 8, 8, 3), np.zeros(2))
    assert set(rates) == {0.3}
    assert len(rates) == 2 * 2 + 2 + 2 * 3


def test_dropout_depends_on_the_key_in_training_and_is_off_at_sampling():
    block = res_block()
    x, time = normal(2, 4, 4, 8), normal(2, 32, seed=2)
    params = parameters(block, x, time, False)

    @functools.partial(quick_jit, static_argnums=1)
    def run(key, train):
        return block.apply({"params": params}, x, time, train, rngs={"dropout": key})

    keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 0, 1)]
    a, b, c = (run(key, True) for key in keys)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.01
    np.testing.assert_array_equal(run(keys[0], False), run(keys[2], False))
    expected = numpy_unet.res_block(double(params), x, time, 4)
    assert_close(run(keys[0], False), expected)


def test_network_samples_unless_told_to_train_and_training_needs_a_key():
    x, t = np.zeros([1, 8, 8, 3], np.float32), np.zeros(1, np.int32)
    params = {"params": shapes(TWO_LEVELS, 8)}
    jax.eval_shape(TWO_LEVELS.apply, params, x, t)
    train = functools.partial(TWO_LEVELS.apply, train=True)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(train, params, x, t)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(functools.partial(train, rngs=rngs), params, x, t)


# bfloat16.


@pytest.fixture(scope="session")
def half_precision(two_levels):
    """(output, inputs, outputs) of the first network in bfloat16."""
    params, x, t, _ = two_levels
    return record(TWO_LEVELS.clone(dtype=jnp.bfloat16).apply, params, x, t)


def test_bfloat16_keeps_parameters_and_output_in_float32(two_levels, half_precision):
    for leaf in jax.tree.leaves(shapes(unet.UNet(dtype=jnp.bfloat16), 32)):
        assert leaf.dtype == jnp.float32
    output, inputs, outputs = half_precision
    assert output.dtype == np.float32
    # The last convolution is in float32, everything before it is not.
    for name, value in outputs.items():
        if name not in ("", "conv_out"):
            assert value.dtype == jnp.bfloat16, name
    (last,) = double(inputs["conv_out"])
    params = two_levels[0]["conv_out"]
    assert_close(output, numpy_unet.conv3x3(double(params), last))


def test_bfloat16_output_is_close_to_float32(two_levels, half_precision):
    *_, (expected, _, _) = two_levels
    output, _, _ = half_precision
    # bfloat16 has a rounding error of 2^-9 = 0.002; some forty layers follow each
    # other, whose errors add up like a random walk.
    error = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
    assert error < 0.02


def test_group_norm_statistics_are_float32_in_bfloat16():
    # In bfloat16 E[x^2] = 64.25 would be off by up to 0.25, the whole variance.
    x = jnp.asarray(8.0 + 0.5 * normal(1, 16, 16, 8), jnp.bfloat16)
    norm = unet.GroupNorm(groups=2, dtype=jnp.bfloat16)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    out = norm.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    expected = numpy_unet.group_norm(params, np.asarray(x, np.float64), 2)
    # One rounding of the result, relative to each value.
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-4
    )


def test_softmax_is_float32_in_bfloat16():
    # All scores are about 360, where bfloat16 counts in steps of 2; what decides
    # between the pixels is smaller than that.
    block = unet.Attention(groups=4, dtype=jnp.bfloat16)
    x = normal(1, 4, 4, 8)
    params = parameters(block, x)
    params["query"] = {
        "kernel": np.zeros([8, 8], np.float32),
        "bias": np.array([32, 1, 1, 1, 1, 1, 1, 1], np.float32),
    }
    params["key"]["kernel"][:, 0] = 0.0
    params["key"]["bias"][0] = 32.0
    # The output is the mean of the values by the weights alone.
    params["value"] = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8)}
    params["out"] = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8)}
    expected = numpy_unet.attention(double(params), x, 4)
    out = apply(block, params, jnp.asarray(x, jnp.bfloat16))
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert error.max() < 0.02 * np.abs(expected).max()


# Gradients, rematerialisation, compilation.


def training_gradients(net, params, label):
    """A jitted function of parameters to the loss of a training step and gradients."""
    x, t = normal(2, 8, 8, 3), np.array([3, 700])
    images = normal(2, 8, 8, 3, seed=5)

    def loss(params):
        rngs = {"dropout": FAST_KEY}
        out = net.apply({"params": params}, x, t, label, train=True, rngs=rngs)
        return jnp.square(out - images).sum()

    return quick_jit(jax.value_and_grad(loss))


def test_gradients_reach_every_parameter():
    label = np.array([2, 0])
    params = parameters(LABELLED, normal(2, 8, 8, 3), np.zeros(2), label)
    run = training_gradients(LABELLED, params, label)
    grads = by_name(jax.tree.map(np.abs, run(params)[1]))
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        if name.endswith("key/bias"):
            # A constant added to all scores of a query cancels in the softmax.
            assert grad.max() < 1e-4 * grads[name.replace("key", "query")].max(), name
        elif name == "label/embedding":
            assert (grad[[0, 2]] > 0).all()
            assert not grad[1].any()  # No image of the batch has this label.
        else:
            assert (grad > 0).all(), name

    # They do so from the first step, when last layers are near zero.
    def start(path, leaf):
        if path[-1].key == "scale":
            return np.ones_like(leaf)
        if path[-1].key == "bias":
            return np.zeros_like(leaf)
        return np.float32(1e-5) * leaf if is_near_zero(name_of(path)) else leaf

    params = jax.tree_util.tree_map_with_path(start, params)
    for name, grad in by_name(run(params)[1]).items():
        if not name.endswith("key/bias"):
            assert grad.any(), name


def test_remat_changes_neither_value_nor_gradients_nor_names():
    params = parameters(ONE_LEVEL, normal(2, 8, 8, 3), np.zeros(2))
    net = ONE_LEVEL.clone(remat=True)
    assert by_shape(shapes(net, 8)) == by_shape(params)
    value, grads = training_gradients(net, params, None)(params)
    expected, expected_grads = training_gradients(ONE_LEVEL, params, None)(params)
    assert_close(value, expected, 1e-6)
    grads, expected_grads = by_name(grads), by_name(expected_grads)
    size = max(np.abs(grad).max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-6, atol=1e-6 * size)


def test_remat_stores_far_less_for_the_backward_pass():
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    times = jax.ShapeDtypeStruct((8,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def stored(net):
        def backward(params, x, t, key):
            def run(params):
                rngs = {"dropout": key}
                return net.apply({"params": params}, x, t, train=True, rngs=rngs).sum()

            return jax.vjp(run, params)[1]

        params = shapes(net, 32)
        residuals = jax.tree.leaves(
            jax.eval_shape(backward, params, images, times, key)
        )
        activations = sum(leaf.size for leaf in residuals if leaf.ndim)
        return activations - sum(leaf.size for leaf in jax.tree.leaves(params))

    net = unet.UNet(channels=32, multipliers=(1,), attention=(), blocks=1)
    assert stored(net.clone(remat=True)) < 0.2 * stored(net)


@pytest.fixture(scope="session")
def one_level():
    """(params, jitted apply, the list of its traces) of the smallest network."""
    traces = []

    @jax.jit
    def run(params, x, t):
        traces.append(x.shape)
        # A new module each time, as in a function that builds its network.
        return ONE_LEVEL.clone().apply({"params": params}, x, t)

    return parameters(ONE_LEVEL, normal(2, 8, 8, 3), np.zeros(2)), run, traces


def test_second_call_does_not_compile_again(one_level):
    params, run, traces = one_level
    outs = [run(params, normal(2, 8, 8, 3, seed=i), np.array([i, 7])) for i in (0, 1)]
    assert traces == [(2, 8, 8, 3)]
    assert np.abs(outs[0] - outs[1]).max() > 0.01


def test_jit_equals_eager(one_level):
    params, run, _ = one_level
    x, t = normal(2, 8, 8, 3), np.array([3, 700])
    eager = ONE_LEVEL.apply({"params": params}, x, t)
    assert_close(run(params, x, t), eager, 2e-6)


def test_convolutions_as_matrix_products_give_the_same_network(one_level):
    params, run, _ = one_level
    x, t = normal(2, 8, 8, 3), np.array([3, 700])
    net = ONE_LEVEL.clone(conv="matmul")
    assert by_shape(shapes(net, 8)) == by_shape(params)
    assert_close(apply(net, params, x, t), run(params, x, t), 2e-6)


# Wrong input.


@pytest.mark.parametrize(
    ("net", "shape", "label", "parts"),
    [
        (
            unet.UNet(),
            (2, 12, 12, 3),
            None,
            ["H = W a multiple of 8", "got (2, 12, 12, 3)", "Resize or pad"],
        ),
        (unet.UNet(), (2, 7, 7, 3), None, ["multiple of 8", "got (2, 7, 7, 3)", "pad"]),
        (
            unet.UNet(),
            (2, 16, 32, 3),
            None,
            ["H = W", "got (2, 16, 32, 3)", "Resize or pad"],
        ),
        (unet.UNet(), (16, 16, 3), None, ["[B, H, W, C]", "got (16, 16, 3)", "Resize"]),
        (
            unet.UNet(channels=48),
            (2, 16, 16, 3),
            None,
            ["a multiple of groups=32", "got 48", "Change channels"],
        ),
        (
            unet.UNet(conv="fft"),
            (2, 16, 16, 3),
            None,
            ["conv must be 'xla' or 'matmul'", "got 'fft'", "Both"],
        ),
        (
            unet.UNet(channels=2, groups=2),
            (2, 16, 16, 3),
            None,
            ["channels must be at least 4", "got 2", "128"],
        ),
        (
            unet.UNet(num_classes=10),
            (2, 16, 16, 3),
            None,
            ["label must be given", "got num_classes=10 and no label", "Pass labels"],
        ),
        (
            unet.UNet(),
            (2, 16, 16, 3),
            np.array([1, 2]),
            ["label must be given", "got num_classes=0", "class-conditional"],
        ),
    ],
    ids=[
        "size-12",
        "odd-size",
        "not-square",
        "no-batch",
        "groups",
        "convolution",
        "narrow",
        "label-missing",
        "label-superfluous",
    ],
)
def test_wrong_input_gets_an_error_in_three_parts(net, shape, label, parts):
    x, t = np.zeros(shape, np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError) as error:
        net.init(jax.random.key(0), x, t, label)
    message = str(error.value)
    rule, got, advice = parts
    pattern = ".*".join(["must", re.escape(rule), re.escape(got), re.escape(advice)])
    if rule.split()[0] in (
        "label",
        "channels",
        "conv",
    ):  # The rule begins the sentence.
        pattern = ".*".join(map(re.escape, parts))
        assert " must " in message
    assert re.search(pattern, message), message
    assert re.search(r"; got .*\. [A-Z].*\.$", message), message
