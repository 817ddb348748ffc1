"""Every objective is least for the exact denoiser, and what it costs in closed form.

Data are mixtures of Gaussians, for which E[x0 | x_t] is known. The loss of a prediction
moved from it by h along some function of x_t has no slope at h = 0, but curvature.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import Mixture, normal, one, two

from diffusion_jax import continuous, gaussian, likelihood, losses, schedule, weightings

pytestmark = pytest.mark.usefixtures("x64")
LN2 = np.log(2)
COUNT, STEPS = 12_000, 12
CHAIN, VP = schedule.cosine(STEPS), continuous.vp()
LEARNED = ["learned", "range"]


def spread_of_x0(data: Mixture, level) -> jax.Array:
    """The diagonal of Cov[x0 | x_t] of one component, [B, 2, 2, 1]: not of x_t."""
    alpha, sigma = (np.asarray(a)[:, None] for a in (level.alpha, level.sigma))
    rest = data.spread[0] * sigma**2 / (alpha**2 * data.spread[0] + sigma**2)
    return jnp.asarray((rest @ (data.basis[0] ** 2).T).reshape(-1, *data.shape))


def with_variance(pred, data, t):
    """The best diagonal variance of p(x_s | x_t), in every form that is learned."""
    level, prev = CHAIN(t).like(pred.x0), CHAIN(t - 1).like(pred.x0)
    small = gaussian.reverse_variance("small", level, prev)
    large = gaussian.reverse_variance("large", level, prev)
    c0, _ = gaussian.q_posterior(jnp.ones_like(pred.x0), 0 * pred.x0, level, prev)
    log_variance = jnp.log(small + c0**2 * spread_of_x0(data, CHAIN(t)))
    fraction = (log_variance - jnp.log(small)) / (jnp.log(large) - jnp.log(small))
    return pred._replace(log_variance=log_variance, fraction=fraction)


def objectives():
    """Schedule and loss of (prediction, x0, x_t, eps, t), [B], by name."""

    def simple(space, p, x0, x_t, eps, t):
        return losses.simple(p, x0, eps, CHAIN(t), CHAIN(t - 1), space=space)

    def weighted(name, p, x0, x_t, eps, t):
        return losses.weighted(p, eps, VP(t), getattr(weightings, name)())

    def vlb(variance, p, x0, x_t, eps, t):
        return losses.vlb(p, x0, x_t, CHAIN, t, variance=variance)

    def hybrid(variance, p, x0, x_t, eps, t):
        return losses.hybrid(p, x0, x_t, eps, CHAIN, t, variance=variance)

    def diffusion(_, p, x0, x_t, eps, t):
        return losses.diffusion(p, eps, weightings.slope(VP, t))

    for loss, made, options in (
        (simple, CHAIN, gaussian.KINDS),
        (weighted, VP, ("x0", "sigmoid")),
        (vlb, CHAIN, ("small", "large", *LEARNED)),
        (hybrid, CHAIN, LEARNED[-1:]),
        (diffusion, VP, ("slope",)),
    ):
        for option in options:
            name = f"{loss.__name__}-{option}"
            yield name, (made, functools.partial(loss, option))


OBJECTIVES = dict(objectives())


def ways(x_t, x0):
    """Functions of x_t along which the prediction of x0 is moved, [K, B, ...]."""
    rng = np.random.default_rng(7)
    mix = jnp.asarray(rng.normal(size=(2, 4, 4)))
    shift = jnp.asarray(rng.normal(size=(2, 1, *x_t.shape[1:])))
    flat = x_t.reshape(len(x_t), -1)
    linear = [(flat @ matrix).reshape(x_t.shape) for matrix in mix]
    waves = [jnp.sin(3 * linear[k] + shift[k]) for k in range(2)]
    constant = jnp.broadcast_to(shift[0], x_t.shape)
    return jnp.stack([jnp.ones_like(x_t), constant, x0, x_t, *linear, *waves])


@functools.cache
def drawn(make, made, scale=1.0):
    """(x0, x_t, eps, t) of either kind of schedule, and `scale` times E[x0 | x_t]."""
    data, rng = make(), np.random.default_rng(1)
    part = rng.choice(len(data.weights), COUNT, p=data.weights)
    root = data.basis * np.sqrt(data.spread)[:, None, :]
    flat = np.einsum("bij,bj->bi", root[part], rng.normal(size=(COUNT, 4)))
    x0 = jnp.asarray((flat + data.means[part]).reshape(-1, *data.shape))
    eps = jnp.asarray(rng.normal(size=x0.shape))
    # The step to data alone decodes to the grid, which these data are not on.
    discrete = made is CHAIN
    t = rng.integers(2, STEPS + 1, COUNT) if discrete else rng.uniform(0.1, 1, COUNT)
    t, level = jnp.asarray(t), made(t).like(x0)
    x_t = gaussian.q_sample(x0, eps, level)
    guess = scale * data.denoiser(made)(x_t, t).x0
    pred = gaussian.Prediction(guess, (x_t - level.alpha * guess) / level.sigma)
    return (x0, x_t, eps, t), with_variance(pred, data, t) if discrete else pred


def move_mean(pred, way, h, level):
    off = h * way
    eps = pred.eps - level.alpha / level.sigma * off
    return pred._replace(x0=pred.x0 + off, eps=eps)


@functools.cache
def measured(made, loss, move):
    """A function of a draw, a prediction and directions, [K, B, ...].

    It gives for each direction the mean slope at h = 0 and the curvature, both in
    standard errors, and by how much the loss rises on both sides.
    """

    def along(draw, pred, way):
        x0, x_t, eps, t = draw
        level = made(t).like(x_t)

        def of(h):
            return loss(move(pred, way, h, level), x0, x_t, eps, t)

        def slope(h):
            return jax.jvp(of, (h,), (1.0,))[1]

        first, second = jax.jvp(slope, (0.0,), (1.0,))
        error = first.std() / jnp.sqrt(COUNT)
        bend = second.mean()
        # Ten standard errors of the slope away, the curvature has the better of it.
        h = 10 * error / bend
        rise = jnp.stack([(of(k * h) - of(0.0)).mean() for k in (-1, 1)])
        return first.mean() / error, bend / (second.std() / jnp.sqrt(COUNT)), rise

    return jax.jit(
        lambda draw, pred, directions: jax.lax.map(
            lambda way: along(draw, pred, way), directions
        )
    )


def measure(make, made, loss, *, scale=1.0, move=move_mean):
    draw, pred = drawn(make, made, scale)
    return measured(made, loss, move)(draw, pred, ways(draw[1], pred.x0))


def is_least(slope, bend, rise):
    """No slope within 4.5 standard errors, curvature, and a rise on both sides."""
    assert np.all(np.abs(slope) < 4.5), slope
    assert np.all(bend > 10), bend
    assert np.all(rise > 0), rise


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_oracle_minimises(name):
    """And one a tenth too large in x0 does not: its slope would not pass for none."""
    made, loss = OBJECTIVES[name]
    for make in (one, two):
        is_least(*measure(make, made, loss))
    slope, _, rise = measure(one, made, loss, scale=1.1)
    assert np.abs(slope).max() > 8, slope
    assert np.min(rise) < 0


def move_variance(pred, way, h, level):
    off = h * jnp.tanh(way)
    return pred._replace(
        log_variance=pred.log_variance + off, fraction=pred.fraction + off
    )


@pytest.mark.parametrize("name", ["vlb-learned", "vlb-range", "hybrid-range"])
def test_the_oracle_variance_minimises(name):
    """The same for the variance of the reverse step, which the bound alone teaches.

    Its best value is the posterior's and what x_t leaves open of x0, through c0. A
    variance a fifth too large is again no minimum.
    """
    _, loss = OBJECTIVES[name]
    is_least(*measure(one, CHAIN, loss, move=move_variance))
    draw, pred = drawn(one, CHAIN)
    wide = move_variance(pred, jnp.full_like(pred.x0, 10), 0.2, None)
    slope, _, rise = measured(CHAIN, loss, move_variance)(
        draw, wide, ways(draw[1], pred.x0)
    )
    assert np.abs(slope).max() > 8, slope
    assert np.min(rise) < 0


# The tests below need no draw of x_t.

SMALL_T, GRID = 8, np.linspace(-1, 1, 256)
SHORT = schedule.cosine(SMALL_T)
THETA = {
    "mean": np.array([0.6, -0.2, 0.1]),
    "variance": np.array([0.3, 0.2]),
}
IMAGES = GRID[np.random.default_rng(3).integers(60, 200, (6, 2, 2, 1))]


def tiny(theta):
    """A network of five weights, with both learned variances."""

    def denoise(x_t, t):
        a, b, c = theta["mean"]
        d, e = theta["variance"]
        time = (t / SMALL_T).reshape(-1, 1, 1, 1)
        output = a * x_t + b * jnp.sin(3 * x_t) + c * time
        pred = gaussian.predict("v", output, x_t, SHORT(t))
        free = d + e * jnp.cos(x_t) + 0.1 * time
        return pred._replace(log_variance=free - 3, fraction=free)

    return denoise


def test_the_hybrid_loss_teaches_mean_and_variance_apart():
    """The mean by the simple loss alone, the variance by scale T of the bound alone."""
    x0, t = jnp.asarray(IMAGES), jnp.array([1, 2, 3, 5, 7, 8])
    eps = jnp.asarray(np.random.default_rng(4).normal(size=IMAGES.shape))
    x_t = gaussian.q_sample(x0, eps, SHORT(t))

    @functools.partial(jax.jit, static_argnums=1)
    def grads(theta, variance):
        def of(loss, *args, **options):
            pred = lambda theta: tiny(theta)(x_t, t)  # noqa: E731
            total = lambda theta: loss(pred(theta), *args, **options).sum()  # noqa: E731
            return jax.grad(total)(theta)

        known = {"variance": variance}
        return (
            of(losses.hybrid, x0, x_t, eps, SHORT, t, scale=0.01, **known),
            of(losses.simple, x0, eps, SHORT(t)),
            of(losses.vlb, x0, x_t, SHORT, t, **known),
        )

    for variance in LEARNED:
        both, mean, bound = grads(THETA, variance)
        np.testing.assert_allclose(both["mean"], mean["mean"], rtol=1e-12)
        expected = 0.01 * SMALL_T * bound["variance"]
        np.testing.assert_allclose(both["variance"], expected, rtol=1e-12)
        assert np.all(mean["variance"] == 0)
        # What stop_gradient holds back is not small.
        held = np.abs(0.01 * SMALL_T * bound["mean"])
        assert np.all(held > 1e-3 * np.abs(mean["mean"]))


# Normal data, and a schedule from one log-SNR to another. The noise at t = 0 is wider
# than a bin, so that the best guess for data on the grid is that for normal ones.
FROM, TO, MEAN, DEVIATION = 7.0, -9.0, 0.1, 0.25
NORMAL = normal(np.full(4, MEAN), DEVIATION**2 * np.eye(4))


@schedule.Timed
def path(t):
    share = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.asarray(t, float))
    return schedule.preserving(FROM + (TO - FROM) * share)


def information(logsnr):
    """I(x0; x_t) in nats: its derivative is half the error in eps of the best guess."""
    return 0.5 * np.log1p(DEVIATION**2 * np.exp(logsnr))


EXACT = (information(FROM) - information(TO)) / LN2


def test_continuous_bound_is_unbiased():
    """All of its parts, whose sum is the entropy and what the two ends cost.

    The integral is one of log-SNR (Sec. 5.1, Kingma et al. 2021): any path gives the
    information that x_0 has of x beyond what x_T has.

    The best decoder of z_0 would know that data are normal, and the best prior that
    z_1 is not quite: both are the little by which the bound is not tight.
    """
    rng = np.random.default_rng(5)
    mass = np.exp(-0.5 * ((GRID - MEAN) / DEVIATION) ** 2)
    x0 = jnp.asarray(rng.choice(GRID, (6000, 4), p=mass / mass.sum()))
    bits = jax.jit(
        lambda key, x0: likelihood.continuous_bound(
            key, NORMAL.denoiser(path), path, x0, draws=16
        )
    )(jax.random.key(0), x0)
    snr, end = np.exp(FROM), np.exp(TO)
    power = (DEVIATION**2 + MEAN**2) * end / (1 + end)
    noise = 1 / (1 + end)
    exact = {
        "prior": 0.5 * (noise - 1 - np.log(noise) + power) / LN2,
        "diffusion": EXACT,
        "reconstruction": np.log2(np.sqrt(2 * np.pi * np.e / snr) * 127.5),
    }
    entropy = np.log2(DEVIATION * np.sqrt(2 * np.pi * np.e) * 127.5)
    gap = 0.5 * np.log1p(1 / (DEVIATION**2 * snr)) - information(TO)
    exact["total"] = entropy + gap / LN2 + exact["prior"]
    np.testing.assert_allclose(exact["total"], sum(list(exact.values())[:3]))
    for name, value in exact.items():
        part = np.asarray(getattr(bits, name))
        error = part.std() / np.sqrt(len(part))
        assert error < 0.02, name
        assert abs(part.mean() - value) < 4.5 * error, name
    np.testing.assert_allclose(
        bits.total, bits.prior + bits.diffusion + bits.reconstruction, rtol=1e-12
    )


def test_reconstruction_is_the_softmax_over_256_values():
    rng = np.random.default_rng(6)
    level = schedule.NoiseLevel(jnp.array([-0.02, 0.0, -0.3]), jnp.array([12.0, 7, 1]))
    picked = rng.integers(0, 256, (3, 2, 2))
    alpha = np.exp(np.asarray(level.log_alpha)).reshape(3, 1, 1)
    sigma = alpha * np.exp(-0.5 * np.asarray(level.logsnr)).reshape(3, 1, 1)
    z0 = alpha * GRID[picked] + sigma * rng.normal(size=picked.shape)
    logits = -0.5 * ((z0[..., None] - alpha[..., None] * GRID) / sigma[..., None]) ** 2
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chance = np.take_along_axis(odds, picked[..., None], -1)[..., 0] / odds.sum(axis=-1)
    got = losses.reconstruction(jnp.asarray(GRID[picked]), jnp.asarray(z0), level)
    np.testing.assert_allclose(got, -np.log2(chance).mean(axis=(1, 2)), rtol=1e-9)


def test_reconstruction_in_single_precision():
    """Where the noise of z_0 is that of VDM's ends, and a bin five times as wide."""
    rng = np.random.default_rng(7)
    x0, noise = GRID[rng.integers(0, 256, (200, 8))], rng.normal(size=(200, 8))
    level = schedule.NoiseLevel(jnp.asarray(0.0), jnp.asarray(11.0))
    z0 = x0 + np.exp(-5.5) * noise
    exact = losses.reconstruction(jnp.asarray(x0), jnp.asarray(z0), level)
    short = (jnp.asarray(a, jnp.float32) for a in (x0, z0, *level))
    x0, z0, *level = short
    got = losses.reconstruction(x0, z0, schedule.NoiseLevel(*level))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=1e-4)


def test_prior_changes_its_rule_where_sigma_is_one():
    """On both sides the KL to N(0, max(1, sigma)^2), by its textbook expression."""
    x0 = jnp.asarray(IMAGES)
    for alpha, sigma in (
        *((0.7, sigma) for sigma in (0.3, 0.99, 1.0, 1.01, 4.0)),
        *((1.0, sigma) for sigma in (1.5, 50.0)),
    ):
        std = max(1.0, sigma)
        level = schedule.NoiseLevel(
            jnp.asarray(np.log(alpha)), jnp.asarray(2 * np.log(alpha / sigma))
        )
        ratio = (sigma / std) ** 2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + (alpha * IMAGES / std) ** 2)
        expected = nats.mean(axis=(1, 2, 3)) / LN2
        np.testing.assert_allclose(losses.prior(x0, level), expected, rtol=1e-10)


def test_weighted_and_diffusion_are_means_over_pixels_of_squares():
    rng = np.random.default_rng(8)
    eps, guess = rng.normal(size=(2, 6, 2, 2, 1))
    slope, logsnr = rng.uniform(1, 9, 6), np.linspace(-8, 8, 6)
    pred = gaussian.Prediction(jnp.asarray(eps), jnp.asarray(guess))
    square = ((guess - eps) ** 2).mean(axis=(1, 2, 3))
    got = losses.diffusion(pred, jnp.asarray(eps), jnp.asarray(slope))
    np.testing.assert_allclose(got, slope * square / np.log(4), rtol=1e-12)
    level = schedule.NoiseLevel(jnp.zeros(6), jnp.asarray(logsnr))
    got = losses.weighted(pred, jnp.asarray(eps), level, jnp.exp)
    np.testing.assert_allclose(got, np.exp(logsnr) * square, rtol=1e-12)
