"""Makes tests/golden/diffusers_autoencoders.npz: what AutoencoderKL computes.

    python tests/peers/make_autoencoder_golden.py

Made with torch 2.13.0+cpu, diffusers 0.42.1 and numpy 2.4.6, in float64; of
diffusion_jax comes nothing. As in make_unet_golden.py there are no weights in the file:
they are drawn from the name of each tensor.

The file holds of each case the names and shapes of all tensors, the moments of some
images, what is decoded of some latents, and of sum(moments * c) + sum(decoded * c'),
both drawn too, the figures of the gradients. Arrays are [B, H, W, C].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_scheduler_golden import channels_first, versions
from make_unet_golden import channels_last, drawn, figures, normalized

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "diffusers_autoencoders.npz"


class Case(NamedTuple):
    """One shape of the network."""

    config: Mapping
    """Keyword arguments of AutoencoderKL."""
    size: tuple[int, int] = (16, 16)
    batch: int = 2


def config(widths, *, groups=2, blocks=1, attention=(), **rest):
    """Keyword arguments of AutoencoderKL, with attention at some levels."""
    kinds = ["Attn" if i in attention else "" for i in range(len(widths))]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]),
        "layers_per_block": blocks,
        "norm_num_groups": groups,
        **rest,
    }


NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
CASES = {
    "two levels": Case(config((2, 4))),
    "all": Case(
        config(
            (4, 8, 8),
            blocks=2,
            attention=(2,),
            groups=4,
            in_channels=1,
            out_channels=1,
            latent_channels=3,
        ),
        (8, 16),
    ),
    "bare": Case(
        config((4, 8), mid_block_add_attention=False, latent_channels=2, **NO_QUANT),
        (4, 6),
        1,
    ),
}


# What tests draw too.


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


# What diffusers does.


def network(case):
    """diffusers' network with the weights that we draw."""
    import diffusers

    return drawn(diffusers.AutoencoderKL(**case.config))


def run(net, case):
    """(moments, decoded, gradients by the names of tensors)."""
    import torch

    x, z, c, d = (channels_first(a).to(net.dtype) for a in inputs(case))
    of = net.encode(x).latent_dist
    moments, decoded = torch.cat([of.mean, of.logvar], dim=1), net.decode(z).sample
    named = dict(net.named_parameters())
    loss = (moments * c).sum() + (decoded * d).sum()
    slopes = torch.autograd.grad(loss, list(named.values()))
    gradients = {name: grad.numpy() for name, grad in zip(named, slopes, strict=True)}
    return channels_last(moments), channels_last(decoded), gradients


def measured(case):
    """What the file holds of a case, by the last word of its key."""
    moments, decoded, gradients = run(network(case).double(), case)
    shapes = [" ".join(map(str, each.shape)) for each in gradients.values()]
    return {
        "names": np.array(list(gradients)),
        "shapes": np.array(shapes),
        "moments": moments.astype(np.float32),
        "decoded": decoded.astype(np.float32),
        "figures": np.stack([figures(*pair) for pair in gradients.items()]),
    }


def main():
    made = {"versions": np.array(versions())}
    for name, case in CASES.items():
        found = measured(case)
        print(f"{name:12} up to {abs(found['decoded']).max():.2f}")
        made |= {f"{name}: {key}": value for key, value in found.items()}
    np.savez_compressed(GOLDEN, **made)
    print(f"{GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
