"""diffusers' UNet2DModel, where that is installed, computes what our U-Net does.

With weights of its own initialisation, a little perturbed, since that leaves scales at
1 and biases at 0; written by its save_pretrained and read from that folder.

Outputs differ by less than 1e-4, and than 1e-4 of the largest value. Gradients differ
by less than 1e-3 of the largest value that the gradient of that tensor has.
"""

import json

import jax
import jax.numpy as jnp
import make_unet_golden as golden
import numpy as np
import pytest
import safetensors.numpy
from small_unets import quick_jit

from diffusion_jax.interop import unet_config, unet_names

torch = pytest.importorskip("torch")
peer = pytest.importorskip("diffusers")

# As in the file, but for the true size and number of blocks where there it is smaller.
LARGE = golden.config(256, (8, 8, 16, 16, 32, 32), (4,), blocks=2)
CASES = golden.CASES | {"256": golden.Case(LARGE, 1)}


def initialised(case):
    """diffusers' network as it makes it, a little perturbed."""
    torch.manual_seed(0)
    net = peer.UNet2DModel(**case.config).eval()
    with torch.no_grad():
        for each in net.parameters():
            size = each.abs().mean() if each.ndim > 1 else 1.0
            each += 0.1 * size * torch.randn_like(each)
    return net


def imported(folder):
    """(network, parameters, names, tensors of the file) of a folder of diffusers'."""
    config = json.loads((folder / "config.json").read_text())
    path = folder / "diffusion_pytorch_model.safetensors"
    net, size, channels = unet_config.read_config(config, where=str(folder))
    own = unet_names.shapes(net, channels, image_size=size)
    names = unet_names.diffusers_names(own, len(net.multipliers))
    found = safetensors.numpy.load_file(path)
    return (
        net,
        unet_names.from_tensors(found, names, own, where=str(path)),
        names,
        found,
    )


def difference(name, actual, expected):
    """The largest one, relative to the largest value."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{name}: largest difference {error:.1e}")
    return error


# Networks that diffusers has made.


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_same(name, tmp_path):
    case = CASES[name]
    theirs = initialised(case)
    theirs.save_pretrained(tmp_path)
    net, params, names, _ = imported(tmp_path)
    x, t, label = golden.inputs(case)

    def weighted(params, x):
        output = net.apply({"params": params}, x, t, label)
        return jnp.sum(output * golden.weighting(case)), output

    with jax.default_matmul_precision("highest"):
        run = quick_jit(jax.grad(weighted, (0, 1), has_aux=True))
        (of_params, of_x), output = run(params, x)
    expected, expected_of_x, gradients = golden.run(theirs, case)
    assert difference(f"{name}, output", output, expected) < 1e-4
    assert np.abs(output - expected).max() < 1e-4
    assert difference(f"{name}, images", of_x, expected_of_x) < 1e-3
    worst = 0.0
    for key, of_tensor in unet_names.to_tensors(of_params, names).items():
        # A softmax does not see what is added to all keys: that has no gradient.
        size = np.abs(gradients[key.replace("to_k.bias", "to_q.bias")]).max()
        off = np.abs(of_tensor - gradients[key]).max()
        assert off < 1e-3 * size, key
        worst = max(worst, off / size)
    print(f"{name}, tensors: largest difference {worst:.1e}")


@pytest.mark.parametrize("name", CASES)
def test_export_is_what_was_imported_and_diffusers_takes_it(name, tmp_path):
    """To the bit, and the configuration too."""
    initialised(CASES[name]).save_pretrained(tmp_path)
    net, params, names, found = imported(tmp_path)
    exported = unet_names.to_tensors(params, names)
    assert exported.keys() == found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(exported[key], value, strict=True)
    config = json.loads((tmp_path / "config.json").read_text())
    written = unet_config.write_config(
        net, config["in_channels"], image_size=config["sample_size"]
    )
    written = json.loads(json.dumps(written))
    ours, theirs = (
        {key: value for key, value in each.items() if key != "_diffusers_version"}
        for each in (written, config)
    )
    assert ours == theirs
    model = peer.UNet2DModel.from_config(written)
    model.load_state_dict({key: torch.from_numpy(exported[key]) for key in exported})
