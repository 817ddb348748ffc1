"""Small U-Nets, parameters for them, and how their results are compared.

Parameters are random and none is trivial: at initialisation biases are 0, scales 1 and
the last layer of every block is nearly 0, which would hide most mistakes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets import unet

# Two levels, attention in one of them.
TWO_LEVELS = unet.UNet(
    channels=8, multipliers=(1, 2), attention=(8,), groups=4, blocks=1
)
# The smallest network: no attention but in the middle, no change of size.
ONE_LEVEL = TWO_LEVELS.clone(multipliers=(1,), attention=(), dropout=0.2)

# Both compile many times faster on a CPU than the default.
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


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest value, as float32 against float64."""
    actual, expected = double((actual, expected))
    assert actual.shape == expected.shape, f"{actual.shape}, not {expected.shape}"
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


def shapes(net, size, channels=3):
    """Shapes of the parameters; nothing is allocated."""
    sides = np.broadcast_to(size, 2).tolist()
    images = jax.ShapeDtypeStruct((2, *sides, channels), jnp.float32)
    times = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(net.init, jax.random.key(0), images, times)["params"]


def by_name(tree):
    """Leaves by their path, "down0_block0/conv1/kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
