"""The scale of latents, from moments that are known."""

import numpy as np
import pytest

from diffusion_jax import latents


def batches(*sizes, seed=0):
    """Moments with channels far from 0, of very different deviations."""
    rng = np.random.default_rng(seed)
    for size in sizes:
        mean = rng.normal([100.0, 0.0, -3.0], [0.1, 2.0, 0.0], (size, 2, 5, 3))
        yield mean, rng.normal(-1.0, 0.5, mean.shape)


def test_scaled_latents_have_mean_0_and_variance_1_whatever_the_batches():
    scale = latents.fit(batches(7, 1, 24))
    mean, log_variance = (
        np.concatenate(a) for a in zip(*batches(7, 1, 24), strict=True)
    )
    total = mean.var(axis=(0, 1, 2)) + np.exp(log_variance).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(scale.shift, mean.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(scale.scale, total**-0.5, rtol=1e-12)
    drawn = np.random.default_rng(1).normal(mean, np.exp(0.5 * log_variance))
    seen = np.asarray(scale.apply(drawn.astype(np.float32)))
    assert np.all(abs(seen.mean(axis=(0, 1, 2))) < 0.2)
    assert np.all(abs(seen.std(axis=(0, 1, 2)) - 1) < 0.1)


def test_inverting_and_applying_are_each_other_and_variances_follow():
    scale = latents.Scale(np.array([1.0, -2.0]), np.array([0.18215, 3.0]))
    z = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    np.testing.assert_allclose(scale.invert(scale.apply(z)), z, atol=1e-6)
    both = scale.apply(np.stack([z, z + 1]))
    assert both.dtype == np.float32
    np.testing.assert_allclose(
        scale.log_variance(z) - z,
        np.broadcast_to(2 * np.log((both[1] - both[0])[0, 0, 0]), z.shape),
        rtol=1e-5,
    )


def test_moments_that_give_no_scale_are_refused(refuses):
    mean, log_variance = next(batches(4))
    with refuses("none"):
        latents.fit([])
    for wrong in (np.nan, np.inf):
        spoiled = mean.copy()
        spoiled[0, 0, 0, 1] = wrong
        with refuses("some that are not"):
            latents.fit([(mean, log_variance), (spoiled, log_variance)])
    with refuses("1 that do not"):
        latents.fit([(mean, np.full_like(mean, -np.inf))])
    with pytest.raises(ValueError, match="some that are not"):
        latents.fit([(mean, np.full_like(mean, 1e5))])
