"""Small U-Nets, parameters for them, and what their modules are given and put out.

Parameters are random and none is trivial: at initialisation biases are 0, scales 1 and
the last layer of every block is nearly 0, which would hide most mistakes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets import blocks, unet

# float32 against float64, relative to the largest value of the result.
TOLERANCE = 1e-5

# Two levels, attention in one of them, two blocks a level as in the paper.
TWO_LEVELS = unet.UNet(channels=8, multipliers=(1, 2), attention=(8,), groups=4)
# The smallest network: no attention but in the middle, no change of size.
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


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape}, not {expected.shape}"
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def whole(value):
    """What a module takes or gives as one array, None where it is none."""
    match value:
        case blocks.Activation():
            return value.whole()
        case (jax.Array(ndim=4), jax.Array(ndim=1)):  # and a bias
            return value[0] + value[1].astype(value[0].dtype)[(None,) * 3]
        case (jax.Array(ndim=4), *_):  # parts
            return jnp.concatenate(value, axis=-1)
    return value if isinstance(value, jax.Array) else None


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
                inputs[name] = [a for a in map(whole, args) if a is not None]
                outputs[name] = whole(out)
            return out

        with nn.intercept_methods(listen):
            out = function({"params": params}, *args)
        return out, inputs, outputs

    return jax.tree.map(np.asarray, quick_jit(run)(params, *args))


@functools.cache
def shapes(net, size, channels=3):
    """Shapes of the parameters; nothing is allocated."""
    sides = np.broadcast_to(size, 2).tolist()
    images = jax.ShapeDtypeStruct((2, *sides, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    label = times if net.num_classes else None
    return jax.eval_shape(net.init, jax.random.key(0), images, times, label)["params"]


def name_of(path):
    return "/".join(entry.key for entry in path)


def by_shape(tree):
    """Shapes of the leaves by their path, "down0_block0/conv1/kernel"."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): leaf.shape for path, leaf in pairs}
