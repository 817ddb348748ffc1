"""Every objective is least for the exact denoiser, and what it costs in closed form.

Data are mixtures of Gaussians, for which E[x0 | x_t] is known. The loss of a prediction
moved from it by h along some function of x_t has no slope at h = 0, but curvature.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import Mixture, one, two

from diffusion_jax import continuous, gaussian, likelihood, losses, schedule

pytestmark = pytest.mark.usefixtures("x64")
LN2 = np.log(2)
COUNT, STEPS = 12_000, 12
CHAIN, VP = schedule.cosine(STEPS), continuous.vp()
WEIGHTINGS = {
    "sigmoid": jax.nn.sigmoid,
    "x0": lambda logsnr: jnp.exp(-logsnr),
    "snr": lambda logsnr: jnp.minimum(jnp.exp(logsnr), 5),
}
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


def vp_slope(t):
    return -jax.jvp(VP, (t,), (jnp.ones_like(t),))[1].logsnr


def objectives():
    """Name, schedule and loss of (prediction, x0, x_t, eps, t), [B]."""
    for space in gaussian.KINDS:
        yield (
            f"simple-{space}",
            CHAIN,
            lambda p, x0, x_t, eps, t, space=space: losses.simple(
                p, x0, eps, CHAIN(t), CHAIN(t - 1), space=space
            ),
        )
    for name, weighting in WEIGHTINGS.items():
        yield (
            f"weighted-{name}",
            VP,
            lambda p, x0, x_t, eps, t, w=weighting: losses.weighted(p, eps, VP(t), w),
        )
    for variance in ("small", "large", *LEARNED):
        yield (
            f"vlb-{variance}",
            CHAIN,
            lambda p, x0, x_t, eps, t, variance=variance: losses.vlb(
                p, x0, x_t, CHAIN, t, variance=variance
            ),
        )
    yield (
        "hybrid",
        CHAIN,
        lambda p, x0, x_t, eps, t: losses.hybrid(
            p, x0, x_t, eps, CHAIN, t, variance=LEARNED[-1]
        ),
    )
    yield (
        "diffusion",
        VP,
        lambda p, x0, x_t, eps, t: losses.diffusion(p, eps, vp_slope(t)),
    )


OBJECTIVES = list(objectives())
every_objective = pytest.mark.parametrize(
    ("made", "loss"),
    [row[1:] for row in OBJECTIVES],
    ids=[row[0] for row in OBJECTIVES],
)


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


@cache
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


@cache
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


@pytest.mark.parametrize("make", [one, two])
@every_objective
def test_the_oracle_minimises(made, loss, make):
    is_least(*measure(make, made, loss))


@every_objective
def test_a_biased_oracle_does_not(made, loss):
    """A tenth too large in x0: what passes for no slope above would not be one."""
    slope, _, rise = measure(one, made, loss, scale=1.1)
    assert np.abs(slope).max() > 8, slope
    assert np.min(rise) < 0


def move_variance(pred, way, h, level):
    off = h * jnp.tanh(way)
    return pred._replace(
        log_variance=pred.log_variance + off, fraction=pred.fraction + off
    )


@pytest.mark.parametrize("name", [*(f"vlb-{kind}" for kind in LEARNED), "hybrid"])
def test_the_oracle_variance_minimises(name):
    """The same for the variance of the reverse step, which the bound alone teaches.

    Its best value is the posterior's and what x_t leaves open of x0, through c0. A
    variance a fifth too large is again no minimum.
    """
    loss = next(row[2] for row in OBJECTIVES if row[0] == name)
    is_least(*measure(one, CHAIN, loss, move=move_variance))
    draw, pred = drawn(one, CHAIN)
    wide = move_variance(pred, jnp.full_like(pred.x0, 10), 0.2, None)
    slope, _, rise = measured(CHAIN, loss, move_variance)(
        draw, wide, ways(draw[1], pred.x0)
    )
    assert np.abs(slope).max() > 8, slope
    assert np.min(rise) < 0


# The tests below need no draw of x_t, or the very one that the bound makes.

SMALL_T, GRID = 8, np.linspace(-1, 1, 256)
SHORT = schedule.cosine(SMALL_T)
THETA = {
    "mean": np.array([0.6, -0.2, 0.1]),
    "variance": np.array([0.3, 0.2]),
}
IMAGES = GRID[np.random.default_rng(3).integers(60, 200, (6, 2, 2, 1))]


def tiny(theta):
    """A network of five weights, with every kind of reverse variance."""

    def denoise(x_t, t):
        a, b, c = theta["mean"]
        d, e = theta["variance"]
        time = (t / SMALL_T).reshape(-1, 1, 1, 1)
        output = a * x_t + b * jnp.sin(3 * x_t) + c * time
        pred = gaussian.predict("v", output, x_t, SHORT(t))
        free = d + e * jnp.cos(x_t) + 0.1 * time
        return pred._replace(
            log_variance=free - 3, fraction=free, x0_variance=jnp.exp(free - 3)
        )

    return denoise


def noise_of_the_bound(keys, shape):
    """(t, eps) for t = 1..T: that of example i at t comes from (key i, t) alone."""
    fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))
    for t in range(1, SMALL_T + 1):
        yield jnp.asarray(t), gaussian.normal(fold(keys, t), shape)


@pytest.mark.parametrize("variance", gaussian.VARIANCES)
def test_the_gradient_of_the_terms_is_that_of_the_evaluated_bound(variance):
    """Over t = 1..T, with its own noise; and that of its finite differences."""
    keys, x0 = jax.random.split(jax.random.key(0), len(IMAGES)), jnp.asarray(IMAGES)

    @jax.jit
    @jax.value_and_grad
    def evaluated(theta):
        bits = likelihood.bound(keys, tiny(theta), SHORT, x0, variance=variance)
        return bits.terms.sum()

    def trained(theta, t, eps):
        times = jnp.full(len(x0), t)
        x_t = gaussian.q_sample(x0, eps, SHORT(times))
        pred = tiny(theta)(x_t, times)
        return losses.vlb(pred, x0, x_t, SHORT, times, variance=variance).sum()

    step = jax.jit(jax.grad(trained))
    each = [step(THETA, *drawn) for drawn in noise_of_the_bound(keys, x0.shape)]
    summed = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *each)
    whole = evaluated(THETA)[1]
    free = variance not in ("small", "large")
    for group in THETA:
        np.testing.assert_allclose(summed[group], whole[group], rtol=1e-9, atol=1e-9)
        assert np.any(summed[group] != 0) == (free or group == "mean")
        for k in range(len(THETA[group])):
            off = 1e-5 * np.eye(len(THETA[group]))[k]
            ahead, behind = (
                evaluated({**THETA, group: THETA[group] + way})[0]
                for way in (off, -off)
            )
            slope = (ahead - behind) / 2e-5
            np.testing.assert_allclose(slope, whole[group][k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", LEARNED)
def test_the_hybrid_loss_teaches_mean_and_variance_apart(variance):
    """The mean by the simple loss alone, the variance by scale T of the bound alone."""
    x0, t = jnp.asarray(IMAGES), jnp.array([1, 2, 3, 5, 7, 8])
    eps = jnp.asarray(np.random.default_rng(4).normal(size=IMAGES.shape))
    x_t = gaussian.q_sample(x0, eps, SHORT(t))

    @jax.jit
    def grads(theta):
        def of(loss):
            return jax.grad(lambda theta: loss(tiny(theta)(x_t, t)).sum())(theta)

        return (
            of(
                lambda pred: losses.hybrid(
                    pred, x0, x_t, eps, SHORT, t, variance=variance, scale=0.01
                )
            ),
            of(lambda pred: losses.simple(pred, x0, eps, SHORT(t))),
            of(lambda pred: losses.vlb(pred, x0, x_t, SHORT, t, variance=variance)),
        )

    both, mean, bound = grads(THETA)
    np.testing.assert_allclose(both["mean"], mean["mean"], rtol=1e-12)
    expected = 0.01 * SMALL_T * bound["variance"]
    np.testing.assert_allclose(both["variance"], expected, rtol=1e-12)
    assert np.all(mean["variance"] == 0)
    # What stop_gradient holds back is not small.
    assert np.all(np.abs(0.01 * SMALL_T * bound["mean"]) > 1e-3 * np.abs(mean["mean"]))


# Normal data, and three schedules from one log-SNR to another. The noise at t = 0 is
# wider than a bin, so that the best guess for data on the grid is that for normal ones.
FROM, TO, MEAN, DEVIATION = 7.0, -9.0, 0.1, 0.25
PATHS = {
    "linear": lambda t: t,
    "quadratic": lambda t: t**2,
    "cosine": lambda t: 0.5 - 0.5 * jnp.cos(jnp.pi * t),
}


def path(name):
    def made(t):
        logsnr = FROM + (TO - FROM) * PATHS[name](jnp.asarray(t, float))
        return schedule.NoiseLevel(0.5 * jax.nn.log_sigmoid(logsnr), logsnr)

    return made


def normal_data(shape=(1,)):
    size = int(np.prod(shape))
    cov = DEVIATION**2 * np.eye(size)
    return Mixture([1.0], [np.full(size, MEAN)], [cov], shape)


def information(logsnr):
    """I(x0; x_t) in nats: its derivative is half the error in eps of the best guess."""
    return 0.5 * np.log1p(DEVIATION**2 * np.exp(logsnr))


EXACT = (information(FROM) - information(TO)) / LN2


def averaged(made, t, loss):
    """The mean of the loss over x0 and eps, by quadrature exact to fifth order, [t]."""
    node, weight = np.polynomial.hermite_e.hermegauss(3)
    weight = weight / weight.sum()
    z, e, times = (a.ravel() for a in np.meshgrid(node, node, t, indexing="ij"))
    x0, eps = (jnp.asarray(a)[:, None] for a in (MEAN + DEVIATION * z, e))
    times = jnp.asarray(times)

    @jax.jit
    def of(x0, eps, times):
        x_t = gaussian.q_sample(x0, eps, made(times))
        pred = normal_data().denoiser(made)(x_t, times)
        return loss(pred, x0, x_t, eps, times)

    each = np.asarray(of(x0, eps, times)).reshape(3, 3, -1)
    return np.einsum("i,j,ijt->t", weight, weight, each)


@pytest.mark.parametrize("name", PATHS)
def test_the_continuous_bound_knows_the_ends_alone(name):
    """The integral is one of log-SNR (Sec. 5.1, Kingma et al. 2021): any path gives it.

    For normal data it is the information that x_0 has of x beyond what x_T has.
    """
    made = path(name)
    node, weight = np.polynomial.legendre.leggauss(80)

    def loss(pred, x0, x_t, eps, t):
        slope = jax.jvp(lambda t: made(t).logsnr, (t,), (jnp.ones_like(t),))[1]
        return losses.diffusion(pred, eps, -slope)

    terms = averaged(made, (node + 1) / 2, loss)
    np.testing.assert_allclose(weight @ terms / 2, EXACT, rtol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_the_discrete_bound_tends_to_the_continuous_one(name):
    """The terms of the steps between the ends, from above and like 1 / T."""
    gaps = []
    for count in (128, 256, 512):
        tables = schedule.tables(continuous.discretize(path(name), count))
        # One more step, to data, which the continuous bound has not.
        chain = schedule.from_tables(
            *(
                np.concatenate([[end], a])
                for end, a in zip((0, np.inf), tables, strict=True)
            )
        )

        def loss(pred, x0, x_t, eps, t, chain=chain):
            return losses.vlb(pred, x0, x_t, chain, t, variance="small")

        gaps.append(averaged(chain, np.arange(2, count + 2), loss).sum() - EXACT)
    assert gaps[-1] > 0
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2, atol=0.05)


def test_continuous_bound_is_unbiased():
    """All of its parts, whose sum is the entropy and what the two ends cost.

    The best decoder of z_0 would know that data are normal, and the best prior that
    z_1 is not quite: both are the little by which the bound is not tight.
    """
    rng, made = np.random.default_rng(5), path("cosine")
    mass = np.exp(-0.5 * ((GRID - MEAN) / DEVIATION) ** 2)
    x0 = jnp.asarray(rng.choice(GRID, (6000, 4), p=mass / mass.sum()))
    bits = jax.jit(
        lambda key, x0: likelihood.continuous_bound(
            key, normal_data((4,)).denoiser(made), made, x0, draws=16
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


@pytest.mark.parametrize("logsnr", [13.3, 8.0, 0.0])
def test_reconstruction_probabilities_sum_to_one(logsnr):
    level = schedule.NoiseLevel(jnp.asarray(-0.01), jnp.asarray(logsnr))
    for z0 in (-1.3, 0.123, 0.9):
        bits = losses.reconstruction(
            jnp.asarray(GRID)[:, None], jnp.full((256, 1), z0), level
        )
        np.testing.assert_allclose(np.exp2(-np.asarray(bits)).sum(), 1, rtol=1e-9)


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


def test_prior_of_an_exploding_chain_is_the_data_in_its_noise():
    x0 = jnp.asarray(IMAGES)
    for sigma in (1.5, 50.0):
        level = schedule.NoiseLevel(jnp.asarray(0.0), jnp.asarray(-2 * np.log(sigma)))
        expected = (IMAGES**2).mean(axis=(1, 2, 3)) / (2 * sigma**2 * LN2)
        np.testing.assert_allclose(losses.prior(x0, level), expected, rtol=1e-12)


def test_prior_changes_its_rule_where_sigma_is_one():
    """On both sides the KL to N(0, max(1, sigma)^2), by its textbook expression."""
    x0 = jnp.asarray(IMAGES)
    for sigma in (0.3, 0.99, 1.0, 1.01, 4.0):
        alpha, std = 0.7, max(1.0, sigma)
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
