"""diffusers' networks, where that is installed, compute what ours do.

With weights of its own initialisation, a little perturbed, since that leaves scales at
1 and biases at 0; written by its save_pretrained and read from that folder.

Outputs differ by less than 1e-4, and than 1e-4 of the largest value. Gradients differ
by less than 1e-3 of the largest value that the gradient of that tensor has.
"""

import inspect
import json

import jax
import make_autoencoder_golden as autoencoders
import make_unet_golden as unets
import numpy as np
import pytest
import safetensors.numpy
from peer_networks import GOLDENS, computed, opened
from small_networks import network_of

from diffusion_jax.interop import (
    autoencoder_config,
    autoencoder_names,
    unet_config,
    unet_names,
)
from diffusion_jax.lab.network_files import networks
from diffusion_jax.lab.wiring import autoencoders as ours
from experiments.configs import EXPERIMENTS

torch = pytest.importorskip("torch")
peer = pytest.importorskip("diffusers")

# As in the file, but for the true size and number of blocks where there it is smaller.
LARGE = unets.config(256, (8, 8, 16, 16, 32, 32), (4,), blocks=2)
WIDE = autoencoders.Case(autoencoders.config((32, 64), groups=32), (32, 32))
SD = autoencoders.config((128, 256, 512, 512), groups=32, blocks=2)
CASES = {
    **{("UNet2DModel", name): case for name, case in unets.CASES.items()},
    ("UNet2DModel", "256"): unets.Case(LARGE, 1),
    **{("AutoencoderKL", name): case for name, case in autoencoders.CASES.items()},
    ("AutoencoderKL", "wider"): WIDE,
    ("AutoencoderKL", "Stable Diffusion"): autoencoders.Case(SD, (24, 16), 1),
}
# Those of smaller ones are in the golden files.
GRADIENTS = ("cifar10", "256", "all")


def initialised(kind, case):
    """diffusers' network as it makes it, a little perturbed."""
    torch.manual_seed(0)
    net = getattr(peer, kind)(**case.config).eval()
    with torch.no_grad():
        for each in net.parameters():
            size = each.abs().mean() if each.ndim > 1 else 1.0
            each += 0.1 * size * torch.randn_like(each)
    return net


def imported(net, folder):
    """(network, names, parameters, tensors, configuration) by a folder of diffusers."""
    net.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    net, names, own = opened(config, where=str(folder))
    path = folder / "diffusion_pytorch_model.safetensors"
    found = safetensors.numpy.load_file(path)
    params = unet_names.from_tensors(found, names, own, where=str(path))
    return net, names, params, found, config


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_computes_the_same_and_diffusers_takes_it_back(kind, name, tmp_path):
    case, stable = CASES[kind, name], name == "Stable Diffusion"
    theirs = initialised(kind, case)
    net, names, params, tensors, config = imported(theirs, tmp_path)
    slopes = name in GRADIENTS
    with jax.default_matmul_precision("highest"):
        made = computed(kind, net, names, case, params, slopes=slopes)
    *expected, gradients = GOLDENS[kind].run(theirs, case)
    found = [(each, 1e-4, 1) for each in made.outputs]
    if slopes and kind == "UNet2DModel":
        found.append((made.of_x, 1e-3, np.inf))
    for (actual, share, bound), wanted in zip(found, expected, strict=slopes):
        off, most = np.abs(actual - wanted).max(), np.abs(wanted).max()
        print(f"{name}: largest difference {off:.1e} of {most:.2f}")
        assert actual.shape == wanted.shape
        assert off < share * min(bound, most)
    largest = max(np.abs(slope).max() for slope in gradients.values())
    for key, slope in made.of_tensors.items():
        # A softmax does not see what is added to all keys: that has no gradient. Nor
        # has a bias before a group of one channel.
        size = np.abs(gradients[key.replace("to_k.bias", "to_q.bias")]).max()
        size = max(size, 1e-3 * largest * (kind == "AutoencoderKL"))
        assert np.abs(slope - gradients[key]).max() < 1e-3 * size, key
    if not stable:
        written = written_as_it_was_read(net, names, params, tensors, config)
        assert kind == "AutoencoderKL" or written == config


def written_as_it_was_read(net, names, params, tensors, config):
    """The configuration that is exported, with tensors that are equal to the bit."""
    exported = unet_names.to_tensors(params, names)
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value, strict=True)
    size, channels = config["sample_size"], config["in_channels"]
    if config["_class_name"] == "AutoencoderKL":
        written = autoencoder_config.write_config(net, image_size=32)
    else:
        written = unet_config.write_config(net, channels, image_size=size)
    written = json.loads(json.dumps(written))
    model = getattr(peer, config["_class_name"]).from_config(written)
    model.load_state_dict({key: torch.from_numpy(a) for key, a in exported.items()})
    version = "_diffusers_version"
    return {**written, version: config[version]}


def test_compvis_names_are_those_that_diffusers_converts(tmp_path):
    """Its own reading of the single file of a whole model."""
    from diffusers.loaders import single_file_utils

    theirs = initialised("AutoencoderKL", WIDE)
    net, _, params, found, _ = imported(theirs, tmp_path)
    names = autoencoder_names.compvis_names(autoencoder_names.shapes(net))
    single = {
        f"first_stage_model.{key}": torch.from_numpy(value)
        for key, value in unet_names.to_tensors(params, names).items()
    }
    converted = single_file_utils.convert_ldm_vae_checkpoint(single, theirs.config)
    assert converted.keys() == found.keys()
    for key, tensor in converted.items():
        there = tensor.numpy().reshape(found[key].shape)
        np.testing.assert_array_equal(there, found[key])


def test_fields_that_are_missing_mean_what_diffusers_takes_them_for():
    signature = inspect.signature(peer.AutoencoderKL.__init__).parameters
    defaults = {name: each.default for name, each in signature.items()}
    del defaults["self"]
    assert defaults == autoencoder_config._DEFAULTS


def test_diffusers_opens_the_folder_of_a_network_of_ours(tmp_path):
    config = EXPERIMENTS["digits_autoencoder"].config
    network = network_of(config)
    digest = networks.write_folder(tmp_path / "net", network)
    theirs = peer.AutoencoderKL.from_pretrained(tmp_path / "net")
    assert theirs.config.scaling_factor == 1
    x = unets.normalized("x", (2, *config.data.shape))
    of = theirs.encode(unets.channels_first(x)).latent_dist.mean
    expected = unets.channels_last(of)
    found = ours.apply(config, network.params, x, "encode").mean
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert digest in (tmp_path / "net" / "README.md").read_text()
