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

with np.load(golden.GOLDEN) as file:
    PEER = dict(file)
"""What pytorch-fid's network says of two images."""


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Of the random network, from a file with PyTorch's names."""
    tensors = {}
    for line in PEER["tensors"]:
        name, shape = line.split()
        tensors[name] = golden.tensor(name, tuple(map(int, shape.split(","))))
    path = tmp_path_factory.mktemp("inception") / "pytorch.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return inception_weights.load(path).variables


@pytest.mark.parametrize("preprocessing", inception.PREPROCESSING)
def test_features_are_those_of_pytorch_fid(variables, preprocessing):
    """With the same weights, in float32: far below what any other network would do."""
    module = inception.Inception(preprocessing=preprocessing)
    found = jax.jit(module.apply)(variables, golden.images())
    pairs = [(found.pool3, PEER[preprocessing.replace("-", "_")])]
    if preprocessing == "tensorflow":
        pairs.append((found.logits, PEER["logits"]))
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        error = np.abs(np.asarray(actual, np.float64) - expected).max()
        print(f"{preprocessing}: relative error {error / np.ptp(expected):.1e}")
        assert error < 1e-5 * np.ptp(expected)


def test_every_product_is_taken_in_full_precision(variables):
    """Else accelerators would round the factors to 11 bits or fewer."""
    text = str(jax.make_jaxpr(inception.Inception().apply)(variables, golden.images()))
    products = text.count("= conv_general_dilated[") + text.count("= dot_general[")
    assert products == 95
    full = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    short = "precision=Precision.HIGHEST"
    assert text.count(full) + text.count(short) == products


@pytest.mark.parametrize("half_pixel", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 40, 31, 1), (1, 13, 26, 3)])
def test_resize_lies_between_the_nearest_pixels(shape, half_pixel):
    x = 255 * golden.uniform("x", shape)
    expected = golden.resize(x, 13, half_pixel=half_pixel)
    actual = inception.resize(jnp.asarray(x), half_pixel=half_pixel, side=13)
    # Places are float32, as in the programs: 1e-6 where neighbours differ by 500.
    np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "most"), [("tensorflow", 127 / 128), ("pytorch-fid", 1)]
)
def test_preprocess_scales_grey_and_floats_alike(name, most):
    x = np.array([0, 255, 17, 200], np.uint8).reshape(1, 2, 2, 1)
    first, *others = (
        inception.preprocess(y, preprocessing=name)
        for y in (x, x.astype(np.float32), x.repeat(3, axis=3))
    )
    for y in others:
        np.testing.assert_array_equal(y, first, strict=True)
    assert (first.shape, first.dtype) == ((1, 299, 299, 3), jnp.float32)
    np.testing.assert_allclose((first.min(), first.max()), (-1, most), atol=1e-6)


def test_other_images_are_refused(refuses):
    for shape in ((2, 8, 8, 2), (8, 8, 3), (0, 8, 8, 3)):
        with refuses(str(shape)):
            inception.preprocess(np.zeros(shape, np.uint8))
    with refuses("int32"):
        inception.preprocess(np.zeros((2, 8, 8, 3), np.int32))
    with refuses("'clean'"):
        inception.preprocess(np.zeros((2, 8, 8, 3), np.uint8), preprocessing="clean")
