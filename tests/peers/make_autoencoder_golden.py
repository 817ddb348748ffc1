"""Makes tests/golden/diffusers_autoencoders.npz: what AutoencoderKL computes.

    python tests/peers/make_autoencoder_golden.py

As make_unet_golden.py, with the moments of some images, what is decoded of some
latents, and the figures of the gradients of sum(moments * c) + sum(decoded * c').
"""

from collections.abc import Mapping
from typing import NamedTuple

from make_scheduler_golden import channels_first, write
from make_unet_golden import GOLDEN as UNETS
from make_unet_golden import channels_last, levels, measured, normalized, slopes

GOLDEN = UNETS.with_name("diffusers_autoencoders.npz")


class Case(NamedTuple):
    """One shape of the network: keyword arguments of AutoencoderKL, and images."""

    config: Mapping
    size: tuple[int, int] = (16, 16)
    batch: int = 2


def config(widths, *, groups=2, blocks=1, attention=(), **rest):
    halves = {"down": "Encoder", "up": "Decoder"}
    return levels(widths, attention, groups=groups, blocks=blocks, **halves) | rest


GREY = {"in_channels": 1, "out_channels": 1, "latent_channels": 3}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 2}
BARE |= {"mid_block_add_attention": False}
ALL = config((4, 8, 8), blocks=2, attention=(2,), groups=4, **GREY)
CASES = {
    "two levels": Case(config((2, 4))),
    "all": Case(ALL, (8, 16)),
    "bare": Case(config((4, 8), **BARE), (4, 6), 1),
}


def inputs(case):
    """(images, latents, c of the moments, c of what is decoded) of a case."""
    options = case.config
    factor = 2 ** (len(options["block_out_channels"]) - 1)
    low = tuple(side // factor for side in case.size)
    channels, latent = options.get("in_channels", 3), options.get("latent_channels", 4)
    return (
        normalized("x", (case.batch, *case.size, channels)),
        normalized("z", (case.batch, *low, latent)),
        normalized("c", (case.batch, *low, 2 * latent)),
        normalized("d", (case.batch, *case.size, channels)),
    )


def network(case):
    import diffusers

    return diffusers.AutoencoderKL(**case.config)


def run(net, case):
    """(moments, decoded, gradients by the names of tensors)."""
    import torch

    x, z, c, d = inputs(case)
    x, z = (channels_first(a).to(net.dtype) for a in (x, z))
    of, decoded = net.encode(x).latent_dist, net.decode(z).sample
    moments = torch.cat([of.mean, of.logvar], dim=1)
    _, gradients = slopes(net, [], (moments, c), (decoded, d))
    return channels_last(moments), channels_last(decoded), gradients


if __name__ == "__main__":
    write(GOLDEN, measured(("moments", "decoded"), run, network, CASES))
