"""The Inception network against pytorch-fid's.

tests/golden/inception.npz has the outputs of pytorch-fid's own network for random
weights, drawn here once more from the names of its tensors.
"""

import jax
import jax.numpy as jnp
import make_inception_golden as golden
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax.interop import inception_weights
from diffusion_jax.nets import inception


@pytest.fixture(scope="module")
def peer():
    """What pytorch-fid's network says of two images."""
    with np.load(golden.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def pytorch_file(peer, tmp_path_factory):
    """The random network under PyTorch's names."""
    tensors = {}
    for line in peer["tensors"]:
        name, shape = line.split()
        tensors[name] = golden.tensor(name, tuple(map(int, shape.split(","))))
    path = tmp_path_factory.mktemp("inception") / "pytorch.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def variables(pytorch_file):
    return inception_weights.load(pytorch_file).variables


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.ptp(expected)


# The whole network.


@pytest.mark.parametrize("preprocessing", inception.PREPROCESSING)
def test_features_are_those_of_pytorch_fid(peer, variables, preprocessing):
    """With the same weights, in float32: far below what any other network would do."""
    module = inception.Inception(preprocessing=preprocessing)
    actual = jax.jit(module.apply)(variables, golden.images())
    expected = peer[preprocessing.replace("-", "_")]
    assert actual.pool3.shape == (2, 2048)
    error = relative_error(actual.pool3, expected)
    print(f"pool3, {preprocessing}: relative error {error:.1e}")
    assert error < 1e-5
    if preprocessing == "tensorflow":
        assert relative_error(actual.logits, peer["logits"]) < 1e-5


def test_size_is_that_of_the_released_network():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
    key = jax.random.key(0)
    shapes = jax.eval_shape(inception.Inception().init, key, images)
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    assert count == {"params": 23_850_960, "batch_stats": 34_432}
    softmax = shapes["params"].pop("softmax")
    assert sum(x.size for x in jax.tree.leaves(softmax)) == 2_065_392
    kernels = [x for x in jax.tree.leaves(shapes["params"]) if x.ndim == 4]
    assert len(kernels) == 94
    assert sum(x.size for x in kernels) == 21_751_136


def test_every_product_is_taken_in_full_precision(variables):
    """Else accelerators would round the factors to 11 bits or fewer."""
    jaxpr = jax.make_jaxpr(inception.Inception().apply)(variables, golden.images())
    text = str(jaxpr)
    products = text.count("= conv_general_dilated[") + text.count("= dot_general[")
    assert products == 95
    full = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    short = "precision=Precision.HIGHEST"
    assert text.count(full) + text.count(short) == products


# Preprocessing.


@pytest.mark.parametrize("half_pixel", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 40, 31, 1), (1, 13, 26, 3)])
def test_resize_lies_between_the_nearest_pixels(shape, half_pixel):
    x = 255 * golden.uniform("x", shape)
    expected = golden.resize(x, 13, half_pixel=half_pixel)
    actual = inception.resize(jnp.asarray(x), half_pixel=half_pixel, side=13)
    # Places are float32, as in the programs: 1e-6 where neighbours differ by 500.
    np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("preprocessing", "ends"),
    [("tensorflow", (-1, 127 / 128)), ("pytorch-fid", (-1, 1))],
)
def test_preprocess_scales_grey_and_floats_alike(preprocessing, ends):
    x = np.array([0, 255, 17, 200], np.uint8).reshape(1, 2, 2, 1)
    made = [
        inception.preprocess(y, preprocessing=preprocessing)
        for y in (x, x.astype(np.float32), x.repeat(3, axis=3))
    ]
    for y in made:
        assert y.shape == (1, 299, 299, 3)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, made[0])
    np.testing.assert_allclose((made[0].min(), made[0].max()), ends, atol=1e-6)


def test_other_images_are_refused(refuses):
    ways = {"int32": {"dtype": np.int32}, "'clean'": {"preprocessing": "clean"}}
    shapes = (2, 8, 8, 2), (8, 8, 3), (0, 8, 8, 3)
    ways |= {str(shape): {"shape": shape} for shape in shapes}
    for got, options in ways.items():
        images = np.zeros(
            options.pop("shape", (2, 8, 8, 3)), options.pop("dtype", np.uint8)
        )
        with refuses(got):
            inception.preprocess(images, **options)
