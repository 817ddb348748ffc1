"""Schedules against float64 tables in DDPM's own terms, at every step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from oracles import SCHEDULES, T, betas_of, oracle

from diffusion_jax import gaussian, schedule

TIMES = np.arange(T + 1)
BOUND = {"float32": 1e-6, "float64": 1e-10}


def test_levels_at_every_step(precision):
    """As an argument of one compiled program: other betas do not retrace."""
    traces, bound = [], BOUND[precision]

    @jax.jit
    def levels(made, t):
        traces.append(1)
        level = made(t)
        return level, level.alpha, level.sigma

    for name, make in SCHEDULES.items():
        (level, alpha, sigma), truth = levels(make(), TIMES), oracle(name)
        # jsd ends in pure noise: alpha is 0 and log-SNR -inf, ours are as good as.
        finite = TIMES[truth.alphas_bar > 0][1:]
        assert len(finite) == (T - 1 if name == "jsd" else T)
        close = partial(np.testing.assert_allclose, rtol=bound, err_msg=name)
        close(alpha, truth.alphas, atol=1e-16)
        close(sigma, truth.sigmas)
        log_alpha_bar = np.log(truth.alphas_bar[finite])
        close(level.log_alpha[finite], 0.5 * log_alpha_bar)
        # It passes through zero, where only its absolute error means anything.
        logsnr = log_alpha_bar - np.log(truth.noise[finite])
        close(level.logsnr[finite], logsnr, atol=bound)
        # Data have no noise.
        assert (alpha[0], sigma[0], level.logsnr[0]) == (1, 0, np.inf)
    assert len(traces) == 1


def betas(made):
    """From the tables, which are in double precision."""
    return -np.expm1(2 * np.diff(schedule.tables(made)[0]))


def test_betas_are_the_authors():
    for name, make in SCHEDULES.items():
        for num_steps in (2, 10, 25, 1000):
            # The authors' warm-up over fewer than two steps is a matter of rounding.
            if name.startswith("warmup") and num_steps < 25:
                continue
            made = make(num_steps)
            assert schedule.num_steps(made) == num_steps
            truth = betas_of("linear" if name == "from_betas" else name, num_steps)
            np.testing.assert_allclose(
                betas(made), truth, rtol=1e-9, atol=1e-12, err_msg=f"{name} {num_steps}"
            )


def test_options_of_the_schedules():
    ends = {"beta_start": 0.1, "beta_end": 0.4}
    half = np.linspace(0.1**0.5, 0.4**0.5, 4)
    for made, expected in (
        (schedule.linear(4, **ends), [0.1, 0.2, 0.3, 0.4]),
        (schedule.quad(4, **ends), half**2),
        (schedule.const(4, beta=0.3), [0.3] * 4),
        (schedule.warmup(4, fraction=0.5, **ends), [0.1, 0.4, 0.4, 0.4]),
    ):
        np.testing.assert_allclose(betas(made), expected, rtol=1e-12)
    capped = betas(schedule.cosine(4, max_beta=0.5))
    np.testing.assert_allclose(capped[-1], 0.5, rtol=1e-12)
    log_alpha, _ = schedule.tables(schedule.cosine(4, offset=0.5, max_beta=0.9999999))
    expected = np.cos(np.pi / 3) / np.cos(np.pi / 6)
    np.testing.assert_allclose(np.exp(log_alpha[2]), expected, rtol=1e-12)


def test_sigmoid_is_that_of_the_paper():
    """alpha_bar(u) = (s(end / tau) - s(v / tau)) / (s(end / tau) - s(start / tau)),
    summed from the rises of the sigmoid: its tails differ by less than rounding."""
    s = scipy.special.expit
    for start, end, tau in ((-3, 3, 1.0), (0, 3, 0.1), (-2, 1, 0.5)):
        v = start + (end - start) * np.arange(21) / 20
        # s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)).
        rises = s(v[1:] / tau) * s(-v[:-1] / tau)
        rises *= -np.expm1((v[:-1] - v[1:]) / tau)
        left = np.cumsum(rises[::-1])[::-1] / rises.sum()
        noise = np.cumsum(rises) / rises.sum()
        made = partial(schedule.sigmoid, 20, start=start, end=end, tau=tau)
        log_alpha, logsnr = schedule.tables(made(max_beta=1.0))
        alpha, sigma = np.exp(log_alpha), np.exp(log_alpha - 0.5 * logsnr)
        np.testing.assert_allclose(alpha[1:-1] ** 2, left[1:], rtol=1e-10)
        np.testing.assert_allclose(sigma[1:] ** 2, noise, rtol=1e-10)
        assert alpha[-1] < 1e-16
        assert schedule.tables(made(max_beta=0.5))[0][-1] > log_alpha[-1]


def test_strong_noise_keeps_its_betas(precision):
    """alpha_bar falls below e^-80 long before T; the steps there are still steps."""
    lvl, t = schedule.const(beta=0.2), np.arange(1, T + 1)
    large = gaussian.reverse_variance("large", lvl(t), lvl(t - 1))
    bound = {"float32": 1e-2, "float64": 1e-9}[precision]
    np.testing.assert_allclose(large, 0.2, rtol=bound)
    np.testing.assert_allclose(lvl(t).sigma[100:], 1, rtol=1e-6)


def test_any_integer_is_a_time_and_inside_jit_too():
    """A time closed over is still a constant while the function around is traced."""
    lin = schedule.linear()
    integers = (jnp.array([100], kind) for kind in ("uint8", "int8", "int32"))
    for t in (500, np.array([[5, 500]]), *integers):
        expected = lin(np.asarray(t, int)).alpha
        np.testing.assert_array_equal(lin(t).alpha, expected)
        assert expected.shape == np.shape(t)
        inside = jax.jit(lambda x, t=t: x * lin(t).alpha)(1.0)
        np.testing.assert_allclose(inside, expected, rtol=1e-6)


def test_variance_is_preserved_at_any_log_snr(precision):
    logsnr = np.array([-80.0, -13.0, -1.0, 0.0, 2.0, 30.0, np.inf])
    level = schedule.preserving(jnp.asarray(logsnr))
    bound = BOUND[precision] * 10
    np.testing.assert_allclose(level.alpha**2, scipy.special.expit(logsnr), rtol=bound)
    np.testing.assert_allclose(level.sigma**2, scipy.special.expit(-logsnr), rtol=bound)
