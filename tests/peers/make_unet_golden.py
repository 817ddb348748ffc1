"""Makes tests/golden/diffusers_unets.npz: what diffusers' UNet2DModel computes.

    python tests/peers/make_unet_golden.py

Made with torch 2.13.0+cpu, diffusers 0.42.1 and numpy 2.4.6, in float64 but for the
time embedding, which diffusers has in float32. There are no weights in the file: they
are numbers drawn from the name of each tensor, by a generator whose bits never change,
so that tests draw the same ones without PyTorch.

The file holds of each case the names and shapes of all tensors as diffusers has them,
the output, and of sum(output * c), c drawn as the weights are, the gradient: with
respect to the images all of it, with respect to each tensor its norm and its inner
products with DIRECTIONS drawn vectors of numbers of variance 1. Images are
[B, H, W, C]. The case "256" has all six levels of the networks of 256 pixels a side,
at 64 pixels, 1/16 of their width and one block a level; the rest of them is left to
test_networks_live.py.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_inception_golden import uniform
from make_scheduler_golden import channels_first, write

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "diffusers_unets.npz"
DIRECTIONS = 3

# Of diffusers' conversions of the authors' networks; left out they are its defaults.
OFFICIAL = types.MappingProxyType(
    {
        "norm_eps": 1e-6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "attention_head_dim": None,
    }
)


class Case(NamedTuple):
    """One shape of the network: keyword arguments of UNet2DModel, and images."""

    config: Mapping
    batch: int = 2


def levels(widths, attention, *, groups, blocks, down="", up=""):
    """Keyword arguments of both networks, with attention at some levels."""
    kinds = ["Attn" if i in attention else "" for i in range(len(widths))]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(f"{kind}Down{down}Block2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}Up{up}Block2D" for kind in kinds[::-1]),
        "layers_per_block": blocks,
        "norm_num_groups": groups,
    }


def config(size, widths, attention, *, groups=4, blocks=1, constants=OFFICIAL, **rest):
    made = levels(widths, attention, groups=groups, blocks=blocks)
    return {"sample_size": size, **made, **constants, **rest}


GREY = {"in_channels": 1, "out_channels": 1}
CIFAR10 = config(32, (128, 256, 256, 256), (1,), groups=32, blocks=2)
CASES = {
    "cifar10": Case(CIFAR10, 1),
    "256": Case(config(64, (8, 8, 16, 16, 32, 32), (4,)), 1),
    "grey": Case(config(28, (8, 16), (1,), **GREY)),
    "attention at two": Case(config(16, (8, 24, 16), (1, 2))),
    "attention at none": Case(config(8, (8, 16), ())),
    "learned variance": Case(config(8, (8,), (0,), out_channels=6)),
    "labels": Case(config(8, (8,), (), blocks=2, num_class_embeds=3)),
    "defaults": Case(config(16, (16, 32), (1,), constants={})),
}

# Of GroupNorm by itself: its images, and its epsilon in both sets of constants.
PIECE, EPSILONS = (2, 8, 8, 16), {"official": 1e-6, "diffusers": 1e-5}
TINY = 1e-3
"""By which the images of GroupNorm are scaled: to a variance of its epsilon."""


# What tests draw too.


def normalized(name, shape):
    """Numbers of mean 0 and variance 1."""
    return uniform(name, shape) * np.float32(np.sqrt(3))


def tensor(name, shape):
    """A tensor of the random network, by diffusers' name and layout."""
    if name == "class_embedding.weight":
        return normalized(name, shape)
    if len(shape) > 1:  # keeps the size of activations through the layers
        return normalized(name, shape) / np.float32(np.sqrt(np.prod(shape[1:])))
    u = uniform(name, shape) * np.float32(0.5)
    return 1 + u if name.endswith(".weight") else u


def inputs(case):
    """(images, times, labels or None) of a case; times as the network counts them."""
    size, options = case.config["sample_size"], case.config
    x = normalized("x", (case.batch, size, size, options.get("in_channels", 3)))
    t = np.array([3, 999])[-case.batch :]
    return x, t, np.array([2, 0]) if options.get("num_class_embeds") else None


def weighting(case):
    """c of sum(output * c), of the shape of the output."""
    size, channels = case.config["sample_size"], case.config.get("out_channels", 3)
    return normalized("c", (case.batch, size, size, channels))


def figures(name, gradient):
    """The norm of a tensor's gradient, and its inner products, [1 + DIRECTIONS]."""
    flat = np.asarray(gradient, np.float64).reshape(-1)
    along = (normalized(f"{name} direction {i}", flat.shape) for i in range(DIRECTIONS))
    return np.array([np.linalg.norm(flat), *(flat @ each for each in along)])


# What diffusers does.


def network(case):
    import diffusers

    return diffusers.UNet2DModel(**case.config)


def drawn(module, prefix=""):
    """The module, with tensors that are drawn from their names."""
    import torch

    state = {
        name: torch.from_numpy(tensor(prefix + name, tuple(value.shape)))
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module.eval()


def run(net, case):
    """(output, gradient with respect to the images, those by the names of tensors)."""
    import torch

    x, t, label = inputs(case)
    x = channels_first(x).to(net.dtype).requires_grad_()
    label = None if label is None else torch.from_numpy(label)
    output = net(x, torch.from_numpy(t), class_labels=label).sample
    (of_x,), gradients = slopes(net, [x], (output, weighting(case)))
    return channels_last(output), channels_last(of_x), gradients


def slopes(net, others, *pairs):
    """Gradients of sum(output * c) with respect to others, and to named tensors."""
    import torch

    named = dict(net.named_parameters())
    loss = sum((output * channels_first(c).to(net.dtype)).sum() for output, c in pairs)
    found = torch.autograd.grad(loss, [*others, *named.values()])
    rest = [each.numpy() for each in found[len(others) :]]
    return found[: len(others)], dict(zip(named, rest, strict=True))


def measured(keys, run, network, cases):
    """What a file holds of each case, its outputs by the last words of their keys."""
    made = {}
    for name, case in cases.items():
        *outputs, gradients = run(drawn(network(case)).double(), case)
        print(f"{name:20} output up to {np.abs(outputs[0]).max():.2f}")
        found = {k: a.astype(np.float32) for k, a in zip(keys, outputs, strict=True)}
        shapes = [" ".join(map(str, each.shape)) for each in gradients.values()]
        found |= {"names": np.array(list(gradients)), "shapes": np.array(shapes)}
        found["figures"] = np.stack([figures(*pair) for pair in gradients.items()])
        made |= {f"{name}: {key}": value for key, value in found.items()}
    return made


def pieces():
    """Outputs of GroupNorm with both."""
    from diffusers.models.resnet import ResnetBlock2D

    x, made = TINY * channels_first(normalized("x", PIECE)).double(), {}
    shape = {"in_channels": PIECE[-1], "temb_channels": 4, "groups": 4}
    for variant, epsilon in EPSILONS.items():
        norm = drawn(ResnetBlock2D(**shape, eps=epsilon).norm1, "norm.")
        made[f"norm: {variant}"] = channels_last(norm.double()(x))
    return made


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


if __name__ == "__main__":
    made = measured(("output", "gradient"), run, network, CASES)
    write(GOLDEN, {**pieces(), **made})
