"""diffusers' AutoencoderKL, where it is installed, computes what our autoencoder does.

With weights of its own initialisation, a little perturbed, written by its
save_pretrained and read from that folder; and the golden file is what it does.
Moments and images differ by less than 1e-4, gradients by less than 1e-3 of the largest
value that the gradient of that tensor has.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import make_autoencoder_golden as golden
import numpy as np
import pytest
import safetensors.numpy
from make_scheduler_golden import channels_first
from small_networks import network_of
from small_unets import quick_jit

from diffusion_jax.interop import autoencoder_config, autoencoder_names, unet_names
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.wiring import autoencoders
from experiments.configs import EXPERIMENTS

torch = pytest.importorskip("torch")
peer = pytest.importorskip("diffusers")

SD = golden.Case(golden.config((128, 256, 512, 512), groups=32, blocks=2), (64, 64), 1)
CASES = {
    **golden.CASES,
    "wider": golden.Case(golden.config((32, 64), groups=32), (32, 32)),
    "Stable Diffusion": SD,
}


def initialised(case):
    """diffusers' network as it makes it, a little perturbed."""
    torch.manual_seed(0)
    net = peer.AutoencoderKL(**case.config).eval()
    with torch.no_grad():
        for each in net.parameters():
            size = each.abs().mean() if each.ndim > 1 else 1.0
            each += 0.1 * size * torch.randn_like(each)
    return net


def imported(folder):
    """(network, parameters, names, tensors of the file) of a folder of diffusers'."""
    config = json.loads((folder / "config.json").read_text())
    path = folder / "diffusion_pytorch_model.safetensors"
    net = autoencoder_config.read_config(config, where=str(folder)).net
    own = autoencoder_names.shapes(net)
    names = autoencoder_names.diffusers_names(own, len(net.multipliers))
    found = safetensors.numpy.load_file(path)
    given = unet_names.from_tensors(found, names, own, where=str(path))
    return net, given, names, found


@pytest.mark.parametrize("name", CASES)
def test_moments_images_and_gradients_are_the_same(name, tmp_path):
    case = CASES[name]
    theirs = initialised(case)
    theirs.save_pretrained(tmp_path)
    net, params, names, _ = imported(tmp_path)
    x, z, c, d = golden.inputs(case)

    def weighted(params):
        moments = net.apply({"params": params}, x, method="encode")
        moments = jnp.concatenate(moments, axis=-1)
        decoded = net.apply({"params": params}, z, method="decode")
        return (moments * c).sum() + (decoded * d).sum(), (moments, decoded)

    with jax.default_matmul_precision("highest"):
        if case is SD:
            slopes, ours = {}, jax.jit(weighted)(params)[1]
        else:
            slopes, ours = quick_jit(jax.grad(weighted, has_aux=True))(params)
            slopes = unet_names.to_tensors(slopes, names)
    *expected, gradients = golden.run(theirs, case)
    for found, wanted in zip(ours, expected, strict=True):
        off = np.abs(np.asarray(found) - wanted).max()
        print(f"{name}: largest difference {off:.1e}, of up to {abs(wanted).max():.2f}")
        assert found.shape == wanted.shape
        assert off < 1e-4
    largest = max(np.abs(slope).max() for slope in gradients.values())
    for key, slope in slopes.items():
        # A bias before a group of one channel has none.
        size = max(np.abs(gradients[key]).max(), 1e-3 * largest)
        assert np.abs(slope - gradients[key]).max() < 1e-3 * size, key


@pytest.mark.parametrize("name", golden.CASES)
def test_a_folder_is_written_as_it_was_read(name, tmp_path):
    initialised(CASES[name]).save_pretrained(tmp_path)
    net, params, names, found = imported(tmp_path)
    exported = unet_names.to_tensors(params, names)
    assert exported.keys() == found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(exported[key], value, strict=True)
    written = autoencoder_config.write_config(net, image_size=32)
    model = peer.AutoencoderKL.from_config(json.loads(json.dumps(written)))
    model.load_state_dict({key: torch.from_numpy(exported[key]) for key in exported})


def test_compvis_names_are_those_that_diffusers_converts(tmp_path):
    """Its own reading of the single file of a whole model."""
    from diffusers.loaders import single_file_utils

    case = golden.Case(golden.config((32, 64), groups=32), (32, 32))
    theirs = initialised(case)
    theirs.save_pretrained(tmp_path)
    net, params, _, found = imported(tmp_path)
    names = autoencoder_names.compvis_names(autoencoder_names.shapes(net))
    single = {
        f"first_stage_model.{key}": torch.from_numpy(value)
        for key, value in unet_names.to_tensors(params, names).items()
    }
    converted = single_file_utils.convert_ldm_vae_checkpoint(single, theirs.config)
    assert converted.keys() == found.keys()
    for key, tensor in converted.items():
        np.testing.assert_array_equal(
            tensor.numpy().reshape(found[key].shape), found[key]
        )


def test_fields_that_are_missing_mean_what_diffusers_takes_them_for():
    signature = inspect.signature(peer.AutoencoderKL.__init__)
    defaults = {
        name: each.default
        for name, each in signature.parameters.items()
        if name != "self"
    }
    assert defaults == autoencoder_config._DEFAULTS


def test_diffusers_opens_the_folder_of_a_network_of_ours(tmp_path):
    config = EXPERIMENTS["digits_autoencoder"].config
    network = network_of(config)
    digest = networks.write_folder(tmp_path / "net", network)
    theirs = peer.AutoencoderKL.from_pretrained(tmp_path / "net")
    assert theirs.config.scaling_factor == 1
    x = channels_first(golden.normalized("x", (2, *config.data.shape)))
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mean.numpy().transpose(0, 2, 3, 1)
    found = autoencoders.apply(
        config, network.params, x.numpy().transpose(0, 2, 3, 1), "encode"
    )
    assert np.abs(found.mean - expected).max() < 1e-4 * np.abs(expected).max()
    assert digest in (tmp_path / "net" / "README.md").read_text()
