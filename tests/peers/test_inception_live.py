"""The Inception network against pytorch-fid's, where that is installed.

Its weights are random: see make_inception_golden.py, which also says which versions.
"""

import importlib.util

import jax
import make_inception_golden as golden
import numpy as np
import pytest

from diffusion_jax.interop import inception_weights
from diffusion_jax.nets import inception

torch = pytest.importorskip("torch")
for peer in ("torchvision", "pytorch_fid"):
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed", allow_module_level=True)

SALT = "live"


@pytest.fixture(scope="module")
def net():
    return golden.network(SALT)


def test_features_are_those_of_pytorch_fid(net, tmp_path):
    """Through a .pth file, of images that are not square and lose detail on a side."""
    path = tmp_path / "a.pth"
    torch.save(net.state_dict(), path)
    weights = inception_weights.load(path)
    assert weights.format == "pytorch"
    x = golden.images((2, 40, 310, 3), SALT)
    expected = golden.outputs(net, x)
    for preprocessing in inception.PREPROCESSING:
        module = inception.Inception(preprocessing=preprocessing)
        actual = jax.jit(module.apply)(weights.variables, x)
        wanted = expected[preprocessing.replace("-", "_")]
        error = np.abs(actual.pool3 - wanted).max() / np.abs(wanted).max()
        print(f"{preprocessing}: relative error {error:.1e}")
        assert error < 1e-5
        if preprocessing == "tensorflow":
            wanted = expected["logits"]
            assert np.abs(actual.logits - wanted).max() < 1e-5 * np.abs(wanted).max()
