"""From a network to a denoiser: times, clipping, learned variance, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import draw, oracle, output_of

from diffusion_jax import continuous, gaussian, schedule

LIN = schedule.linear()
FED = [
    # Released networks count from 0: at t they are fed t - 1.
    (LIN, np.array([1, 500, 1000]), {}, [0, 499, 999]),
    (LIN, 500, {"time_shift": 0}, [500, 500, 500]),
    (continuous.interpolate(LIN), 4.5, {}, [3.5, 3.5, 3.5]),
    (continuous.vp(), 0.25, {}, [0.25, 0.25, 0.25]),
]


@pytest.mark.parametrize(("made", "t", "options", "expected"), FED)
def test_denoiser_shifts_time(made, t, options, expected):
    """One less where times count steps."""
    seen = []
    network = lambda *a: seen.extend(a) or a[0]  # noqa: E731
    gaussian.denoiser(network, made, "v", **options)(jnp.ones([3, 2]), t)
    np.testing.assert_array_equal(seen[1], expected)


@pytest.mark.parametrize("kind", gaussian.KINDS)
def test_denoiser_clips_x0_and_makes_eps_agree(kind, x64):
    truth = oracle("linear")
    t = np.arange(100, 901, 50)
    x0, eps = 3 * draw(4, len(t), 2, 3), draw(1, len(t), 2, 3)
    x_t = jnp.asarray(truth.q_sample(x0, eps, t))
    output = jnp.asarray(output_of(kind, truth, x0, eps, t))
    for clip, expected in ((False, x0), (True, np.clip(x0, -1, 1))):
        pred = gaussian.denoiser(lambda *_: output, LIN, kind, clip=clip)(x_t, t)
        np.testing.assert_allclose(pred.x0, expected, rtol=1e-8, atol=1e-8)
        again = truth.q_sample(np.asarray(pred.x0), np.asarray(pred.eps), t)
        np.testing.assert_allclose(again, x_t, rtol=1e-9, atol=1e-9)
        inside = abs(x0) <= 1
        np.testing.assert_allclose(pred.eps[inside], eps[inside], atol=1e-7)
    assert np.any(abs(x0) > 1)
    assert np.any(inside)


SAID = jnp.array([-1.0, 0.0, 1.0, 3.0, -2.0])[:, None, None, None]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("variance", "field", "expected"),
    # -1 means the small variance and 1 the large, without bounds (Improved DDPM).
    [("learned", "log_variance", SAID), ("range", "fraction", 0.5 + 0.5 * SAID)],
)
def test_denoiser_splits_off_the_learned_variance(variance, field, expected, clip):
    x_t = jnp.full([5, 3, 3, 1], 0.5)

    def network(x, t):
        return jnp.concatenate([0 * x, 0 * x + SAID], -1)

    options = {"variance": variance, "clip": clip}
    pred = gaussian.denoiser(network, LIN, "eps", **options)(x_t, 300)
    plain = gaussian.denoiser(lambda x, t: 0 * x, LIN, "eps", clip=clip)(x_t, 300)
    told = plain._replace(**{field: jnp.broadcast_to(expected, x_t.shape)})
    jax.tree.map(np.testing.assert_array_equal, pred, told)


def test_denoiser_feeds_edm_what_karras_feeds(x64):
    """c_in x and c_noise = log(s) / 4, at x = x_t / alpha and s = sigma / alpha."""
    truth, seen = oracle("linear"), []
    t, x_t = np.array([1, 400, 1000]), draw(0, 3, 2)
    options = {"sigma_data": 0.7, "time_shift": 5}
    denoise = gaussian.denoiser(
        lambda *a: seen.extend(a) or a[0], LIN, "edm", **options
    )
    denoise(jnp.asarray(x_t), t)
    alpha, sigma = truth.alphas[t], truth.sigmas[t]
    c_in = 1 / np.sqrt((sigma / alpha) ** 2 + 0.7**2)
    np.testing.assert_allclose(seen[0], (c_in / alpha)[:, None] * x_t, rtol=1e-10)
    np.testing.assert_allclose(seen[1], np.log(sigma / alpha) / 4, rtol=1e-9)
