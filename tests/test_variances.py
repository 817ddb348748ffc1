"""The variance of a reverse step, for every kind and any jump, down to data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import SCHEDULES, NumpyDDPM, T, draw, oracle, wide

from diffusion_jax import gaussian, losses, prediction, samplers, schedule

TIMES = np.arange(1, T + 1)
JUMPS = (np.array([2, 50, 400, 1000, 1000]), np.array([1, 3, 350, 200, 1]))
BOUND = {"float32": 1e-4, "float64": 1e-9}


def log_variance(kind, levels, **options):
    """For a prediction of shape [N, 2, 3] that has every field."""
    n = len(levels[0].logsnr)
    log, share = draw(5, n, 2, 3), draw(6, n, 2, 3)
    known = np.abs(draw(7, n, 2, 3))
    pred = gaussian.Prediction(
        *(jnp.asarray(a) for a in (0 * log, 0 * log, log, share, known))
    )
    got = prediction.log_variance(kind, pred, *levels, **options)
    return np.asarray(got, np.float64), log, share, known


def numpy_log_variance(kind, truth, t, s, log, share, known):
    small, large = (wide(truth.variance(kind, t, s)) for kind in ("small", "large"))
    c0 = wide(truth.coefficients(t, s)[0])
    return {
        "small": lambda: np.log(small),
        "large": lambda: np.log(large),
        "learned": lambda: log,
        "range": lambda: share * np.log(large) + (1 - share) * np.log(small),
        "analytic": lambda: np.log(small + c0**2 * known),
    }[kind]()


@pytest.mark.parametrize("kind", gaussian.VARIANCES)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_kind_over_any_jump(name, kind, precision):
    """Single steps and coarse ones, against the betas; the fraction has no bounds."""
    truth, made = oracle(name), SCHEDULES[name]()
    for t, s in ((TIMES[1:], TIMES[:-1]), JUMPS):
        got, *given = log_variance(kind, (made(t), made(s)))
        expected = numpy_log_variance(kind, truth, t, s, *given)
        bound = BOUND[precision] * (1 + 2 * np.abs(given[1]))
        assert np.all(np.abs(got - expected) <= bound)


@pytest.mark.parametrize("t", [1, 2, 700])
def test_ends_of_the_range(t, x64):
    """At 0 it is small and at 1 large, and half-way their geometric mean."""
    lin = schedule.linear()
    ends = lin(t), lin(t - 1)
    small = jnp.log(
        gaussian.reverse_variance("small", lin(max(t, 2)), lin(max(t, 2) - 1))
    )
    large = jnp.log(gaussian.reverse_variance("large", *ends))
    for share, expected in ((0.0, small), (1.0, large), (0.5, 0.5 * (small + large))):
        pred = gaussian.Prediction(*[jnp.zeros([1])] * 2, fraction=jnp.full([1], share))
        got = prediction.log_variance("range", pred, *ends, log_small=small)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_step_to_data(x64):
    """Small is -inf there unless told; the large end of a range is beta_1."""
    truth, lin = oracle("linear"), schedule.linear()
    ends, told = (lin(np.array([1])), lin(np.array([0]))), jnp.log(5.4532e-5)
    beta = np.log(truth.betas[1])
    bare = {kind: log_variance(kind, ends)[0] for kind in gaussian.VARIANCES}
    assert np.all(np.isneginf(bare["small"]))
    assert np.all(np.isneginf(bare["range"]))
    np.testing.assert_allclose(bare["large"], beta, rtol=1e-10)
    small, large = (
        log_variance(kind, ends, log_small=told)[0] for kind in ("small", "large")
    )
    np.testing.assert_array_equal(small, large)
    np.testing.assert_allclose(small, told)
    got, _, share, known = log_variance("range", ends, log_small=told)
    np.testing.assert_allclose(got, share * beta + (1 - share) * told, rtol=1e-10)
    # c0 is 1 and nothing of x_t is left: what is uncertain of x0 is all.
    got, *_ = log_variance("analytic", ends, log_small=told)
    np.testing.assert_allclose(got, np.log(known), rtol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_theorem_1_of_analytic_dpm(name, x64):
    """lambda^2 + (sqrt(b_t / a) - sqrt(b_s - lambda^2))^2 (1 - b_t Gamma_t).

    b is 1 - alpha_bar and a = alpha_bar_t / alpha_bar_s; Gamma_t is the mean square of
    the score, E||eps||^2 / (d b_t).
    """
    truth, made = oracle(name), SCHEDULES[name]()
    for t, s in ((TIMES[1:], TIMES[:-1]), JUMPS):
        b_t, b_s = truth.noise[t], truth.noise[s]
        a = truth.alphas_bar[t] / truth.alphas_bar[s]
        square = np.random.default_rng(0).uniform(0, 1, len(t))  # of eps
        gamma = square / b_t
        lam = b_s * truth.beta(t, s) / b_t
        root = np.sqrt(b_t / a) - np.sqrt(b_s - lam)
        expected = lam + root**2 * (1 - b_t * gamma)
        known = b_t / truth.alphas_bar[t] * (1 - square)
        x = jnp.zeros([len(t), 1])
        pred = gaussian.Prediction(x, x, x0_variance=jnp.asarray(known)[:, None])
        got = prediction.log_variance("analytic", pred, made(t), made(s))
        # The root is a difference of near numbers where a step is small.
        lost = 1e-14 * (np.sqrt(b_t / a) / root) * known / b_t
        np.testing.assert_array_less(
            np.abs(np.exp(got[:, 0]) / expected - 1), 1e-9 + lost
        )


@pytest.mark.parametrize("kind", ["range", "analytic"])
def test_bound_with_it(kind, precision):
    """Every term, from the decoder's with its borrowed variance to the last."""
    truth, lin = oracle("linear"), schedule.linear()
    x0 = np.random.default_rng(0).integers(0, 256, (T, 2, 3)) / 127.5 - 1
    x0 = x0.astype(np.float32).astype(np.float64)
    x_t = truth.q_sample(x0, draw(1, T, 2, 3), TIMES)
    guess = x0 + 0.3 * wide(truth.sigmas[1:]) * draw(2, T, 2, 3)
    share = 0.5 + 0.5 * draw(3, T, 2, 3)
    known = 0.1 * wide(truth.noise[1:] / (0.1 * truth.alphas_bar[1:] + truth.noise[1:]))
    c0 = wide(truth.coefficients(TIMES)[0])
    small = wide(truth.log_variance("small", TIMES))
    model = {
        "range": share * np.log(wide(truth.betas[1:])) + (1 - share) * small,
        "analytic": np.log(wide(truth.variance("small", TIMES)) + c0**2 * known),
    }[kind]
    pred = gaussian.Prediction(
        *(jnp.asarray(a) for a in (guess, guess)),
        fraction=jnp.asarray(share),
        x0_variance=jnp.asarray(known),
    )
    got = losses.vlb(
        pred, jnp.asarray(x0), jnp.asarray(x_t), lin, jnp.asarray(TIMES), variance=kind
    )
    expected = truth.bound_term(x0, x_t, guess, TIMES, model)
    bound, least = {"float32": (5e-4, 1e-5), "float64": (1e-8, 1e-12)}[precision]
    np.testing.assert_allclose(got, expected, rtol=bound, atol=least)


@pytest.mark.parametrize("kind", gaussian.VARIANCES)
def test_sampling_on_a_coarse_grid(kind, x64):
    """Every kind adds its own variance at each jump and none at the last.

    With x0 and eps both 0 a chain is a sum of independent normal numbers.
    """
    truth, lin = oracle("linear"), schedule.linear()
    grid, shape = np.array([1000, 600, 250, 40, 0]), (20_000, 2)

    def denoise(x_t, t):
        none = jnp.zeros_like(x_t)
        return gaussian.Prediction(none, none, none - 1, none + 0.4, none + 0.2)

    rule = samplers.ddpm(denoise, lin, variance=kind)
    _, seen = samplers.trajectory(
        jax.random.key(0), rule, grid, shape, [3], start=jnp.zeros(shape)
    )
    expected = 0.0
    fields = np.array(-1.0), np.array(0.4), np.array(0.2)
    for t, s in ((1000, 600), (600, 250), (250, 40)):
        t, s = np.array(t), np.array(s)
        added = np.exp(numpy_log_variance(kind, truth, t, s, *fields)).item()
        expected = truth.coefficients(t, s)[1] ** 2 * expected + added
    five_sigma = 5 * np.sqrt(2 / seen.x_t[0].size)
    np.testing.assert_allclose(seen.x_t[0].var(), expected, rtol=five_sigma)


@pytest.mark.parametrize("kind", gaussian.VARIANCES)
def test_last_step_has_no_noise_and_no_nan(kind, precision):
    """Whatever the fields are, also 0 and far outside, forward and backward."""
    lin, x = schedule.linear(), jnp.asarray(draw(0, 4, 3))
    t = np.array([1, 1, 2, 2])

    def end(x0, fields):
        pred = gaussian.Prediction(x0, x0, *fields)
        return gaussian.p_sample(
            jax.random.key(0), pred, x, lin(t), lin(t - 1), variance=kind
        )

    for value in (0.0, 1.0, 5.0):
        fields = [jnp.full_like(x, value)] * 3
        np.testing.assert_allclose(end(0.5 * x, fields)[:2], 0.5 * x[:2], rtol=1e-6)
        grads = jax.grad(lambda *args: (end(*args) ** 2).sum(), (0, 1))(x, fields)
        assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("kind", "got"),
    [("range", "none"), ("learned", "none"), ("analytic", "none"), ("big", "'big'")],
)
def test_missing_fields_are_refused(kind, got, refuses):
    x, lin = jnp.zeros([1, 2]), schedule.linear()
    with refuses(got):
        prediction.log_variance(kind, gaussian.Prediction(x, x), lin(5), lin(4))
    x0, t = jnp.zeros([1, 2]), jnp.array([5])
    with refuses(got):
        losses.vlb(gaussian.Prediction(x, x), x0, x, lin, t, variance=kind)


def test_a_short_chain_has_the_same_algebra(x64):
    """The decoder borrows from t = 2 of its own chain."""
    truth, made = NumpyDDPM.named("linear", 2), schedule.linear(2)
    x = jnp.zeros([1, 2])
    pred = gaussian.Prediction(x, x, fraction=x)
    t = jnp.array([1])
    got = losses.vlb(pred, x, x, made, t, variance="range")
    borrowed = np.log(truth.variance("small", np.array([2])))
    learned = gaussian.Prediction(x, x, jnp.asarray(borrowed)[:, None] + x)
    expected = losses.vlb(learned, x, x, made, t, variance="learned")
    np.testing.assert_allclose(got, expected, rtol=1e-12)
