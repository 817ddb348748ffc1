"""The discriminator of patches: its size, what a score sees, and what it refuses."""

import itertools

import jax
import numpy as np
from small_unets import normal, parameters, quick_jit

from diffusion_jax.nets import fresh
from diffusion_jax.nets.patch_discriminator import PatchDiscriminator


def test_it_has_the_layers_of_latent_diffusion_and_refuses_less_than_a_patch(refuses):
    """Five convolutions of 4x4, biases where no normalisation follows."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    params = fresh.shapes(PatchDiscriminator(), x)
    widths, expected = (3, 64, 128, 256, 512, 1), 64 + 1 + 2 * (128 + 256 + 512)
    expected += sum(16 * a * b for a, b in itertools.pairwise(widths))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected == 2_765_633
    with refuses("(1, 16, 64, 3)"):
        fresh.shapes(PatchDiscriminator(), x.update(shape=(1, 16, 64, 3)))


def test_a_score_sees_a_patch_of_its_own_image():
    """One level: 16 pixels a side, but for the statistics of the whole image."""
    net = PatchDiscriminator(channels=4, levels=1, groups=8)
    x = normal(2, 24, 24, 1)
    params = {"params": parameters(net, x)}
    assert jax.eval_shape(net.apply, params, x).shape == (2, 10, 10, 1)
    own = quick_jit(jax.grad(lambda x: net.apply(params, x)[0, 0, 0, 0]))(x)
    assert np.all(np.asarray(own)[1] == 0)
    # Those of the normalisation are small beside those of the patch.
    inside, outside = abs(own[0, :14, :14]).mean(), abs(own[0, 14:, 14:]).mean()
    assert inside > 10 * outside
