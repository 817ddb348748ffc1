"""The autoencoder: what it is made of, and what it learns."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffusion_jax.lab.schema.facts import SHAPE, Count, Entries, at_least, between


@dataclass(frozen=True)
class Autoencoder:
    """The autoencoder that is trained; with data.latent the one that is named there."""

    kind: Annotated[Literal["none", "kl", "vae", "ae"], SHAPE] = "none"
    """What is trained: none is a diffusion model; kl an autoencoder for latent
    diffusion, with a little weight on the KL divergence; vae the variational bound in
    bits/dim, whose decoder is over 256 values a pixel; ae the classic one, without
    noise."""
    channels: Annotated[int, between(4, 4096), SHAPE] = 128
    """Width of the first level."""
    multipliers: Annotated[tuple[int, ...], Entries(12), SHAPE] = (1, 2, 4, 4)
    """Width of each level in units of channels; each but the last halves the
    resolution: three numbers are f4."""
    blocks: Annotated[int, between(1, 64), SHAPE] = 2
    """Residual blocks a level; the decoder has one more."""
    latent: Annotated[int, between(1, 4096), SHAPE] = 4
    """Channels of the latents."""
    attention: Annotated[tuple[int, ...], Entries(12), SHAPE] = ()
    """Levels with attention, counted from 0 at full resolution."""
    middle_attention: Annotated[bool, SHAPE] = True
    """Whether the middle of each half has attention."""
    groups: Annotated[Count, SHAPE] = 32
    """Groups of every GroupNorm."""
    quant: Annotated[bool, SHAPE] = True
    """Whether there are 1x1 convolutions on both sides of the latents."""
    loss: Literal["l1", "l2"] = "l1"
    """Of a reconstruction; of kl and ae. Sums over an image count, as in CompVis' code,
    divided by its numbers."""
    kl_weight: Annotated[float | None, at_least(0)] = None
    """Of the KL divergence, a sum over the latents, beside that sum: 1e-6 of kl, and
    1, the bound itself, of vae (beta) when not given."""
    free_bits: Annotated[float, at_least(0)] = 0.0
    """Of vae: nats that a channel of the latents may cost an image for nothing."""
    perceptual: Annotated[float, at_least(0)] = 0.0
    """Of kl: weight of the error in the features of the classifier of the data, beside
    the mean error of a pixel. It is no LPIPS, which is of a network of photographs."""
    discriminator: Annotated[float, at_least(0)] = 0.0
    """Of kl: how much of the gradient of all else at the decoder's last layer is that
    of a discriminator of patches, which learns too; 0.5 by the authors, 0 for none."""
    discriminator_start: Annotated[int, at_least(0)] = 0
    """Steps before it begins: 50,001 by the authors."""
