"""How times are drawn: their shares, their cuts, and the variance that they leave.

The variances are those of Gaussian data and the best network there is, for which the
loss at each t is a weighted sum of squares of normal numbers: its first two moments
are known, and so is the variance of the mean over a batch, for each way to draw t.
"""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from oracles import T, oracle

from diffusion_jax import continuous, gaussian, losses, schedule, timesteps

BATCH, KEYS = 16, 10_000
TOP = np.float32(1 - 2.0**-24)  # the largest float32 below 1

SPREADS = {
    "uniform": lambda key, position, batch_size: timesteps.uniform(key, position),
    "antithetic": timesteps.antithetic,
    "low_discrepancy": timesteps.low_discrepancy,
}
spreads = pytest.mark.parametrize("name", SPREADS)


def middles(count):
    """Evenly spread numbers in (0, 1), as float32 has them."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("uniform", 9), ("antithetic", 9), ("antithetic", 12), ("low_discrepancy", 12)],
)
def test_cuts_of_a_batch_draw_what_it_draws(name, batch_size):
    key = jax.random.key(3)
    spread = jax.jit(lambda key, part: SPREADS[name](key, part, batch_size))
    whole = np.asarray(spread(key, jnp.arange(batch_size)))
    assert len(set(whole.tolist())) == batch_size
    for seed, cuts in enumerate(([1], [5], [1, 6])):
        order = np.random.default_rng(seed).permutation(batch_size)
        for part in np.split(order, cuts):
            np.testing.assert_array_equal(spread(key, part), whole[part])
    other = spread(jax.random.key(4), jnp.arange(batch_size))
    assert not np.any(whole == np.asarray(other))


def many(name, count=KEYS, batch_size=BATCH):
    """The numbers of many batches, [count, batch_size]."""
    keys = jax.random.split(jax.random.key(7), count)
    spread = SPREADS[name]
    return jax.jit(
        jax.vmap(lambda key: spread(key, jnp.arange(batch_size), batch_size))
    )(keys)


@spreads
def test_each_number_is_uniform(name):
    u = np.asarray(many(name))
    assert u.dtype == np.float32
    assert ((u >= 0) & (u < 1)).all()
    for column in u.T:
        counts = np.bincount((column * 10).astype(int), minlength=10)
        np.testing.assert_allclose(counts, KEYS / 10, atol=5 * np.sqrt(KEYS * 0.09))


def test_uniform_numbers_are_independent():
    u = np.asarray(many("uniform"), np.float64)
    correlation = np.corrcoef(u.T) - np.eye(BATCH)
    assert abs(correlation).max() < 5 / np.sqrt(KEYS)


def test_every_interval_has_one_of_low_discrepancy():
    u = np.sort(np.asarray(many("low_discrepancy"), np.float64), axis=1)
    np.testing.assert_allclose(np.diff(u, axis=1), 1 / BATCH, atol=2e-7)
    for batch_size in (3, 1000):  # where 1 / B is rounded
        u = timesteps.low_discrepancy(
            jax.random.key(0), jnp.arange(batch_size), batch_size
        )
        u = np.sort(np.asarray(u, np.float64))
        np.testing.assert_allclose(np.diff(u), 1 / batch_size, atol=2e-7)
        assert (u < 1).all()


def test_antithetic_numbers_come_in_pairs():
    u = np.asarray(many("antithetic"))
    np.testing.assert_array_equal(u[:, :8] + u[:, 8:], 1)
    assert abs(np.corrcoef(u[:, :8].T) - np.eye(8)).max() < 5 / np.sqrt(KEYS)
    # The pairs of the authors' code: t and T - 1 - t, counted from 0.
    t = np.asarray(timesteps.steps(u, T))
    total = t[:, :8] + t[:, 8:]
    assert np.mean(total != T + 1) < 1e-4
    assert abs(total - (T + 1)).max() <= 1
    odd = np.asarray(timesteps.antithetic(jax.random.key(0), jnp.arange(5), 5))
    np.testing.assert_array_equal(odd[:2] + odd[3:], 1)
    assert odd[2] not in (1 - odd)


def test_draws_are_the_same_in_double_precision():
    draws = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            draws.append(np.asarray(timesteps.uniform(jax.random.key(0), np.arange(9))))
    np.testing.assert_array_equal(*draws)


def test_steps_have_equal_shares():
    for count in (1, 2, 10, 1000):
        t = timesteps.steps(middles(40_000), count)
        counts = np.bincount(t, minlength=count + 1)
        assert counts[0] == 0
        np.testing.assert_allclose(counts[1:], 40_000 / count, atol=1)


def test_steps_end_where_they_should():
    edge = jnp.asarray([0.0, 2.0**-24, TOP])
    for count in [*range(1, 200), 1000, 1023, 1024, 1025, 4000, 4096, 10_001, 65_537]:
        assert timesteps.steps(edge, count).tolist() == [1, 1, count]


@pytest.mark.parametrize("first", [0.0, 1e-5, 1e-3, 0.3])
def test_times_are_uniform_between_their_ends(first):
    t = np.asarray(timesteps.times(middles(1000), first=first), np.float64)
    expected = first + (1 - first) * middles(1000).astype(np.float64)
    np.testing.assert_allclose(t, expected, rtol=2e-6)
    edges = timesteps.times(jnp.asarray([0.0, TOP]), first=first)
    assert edges[0] == np.float32(first)
    assert edges[1] >= TOP - 1e-7
    assert edges[1] <= 1


VE = continuous.ve(sigma_min=0.002, sigma_max=80.0)


@pytest.mark.parametrize("made", [VE, continuous.vp()], ids=["ve", "vp"])
def test_log_normal_noise(made, precision):
    u = jnp.asarray(middles(2001), precision)
    level = made(timesteps.log_normal(u, made))
    expected = scipy.stats.norm.ppf(np.asarray(u, np.float64), -1.2, 1.2)
    # A time of float32 near 0 is good to 1e-7, where vp has 5e-3 a digit.
    atol = {"float32": 2e-5, "float64": 1e-8}[precision]
    if made is not VE:
        atol = 5 * atol
    np.testing.assert_allclose(-0.5 * level.logsnr, expected, atol=atol)
    ln_sigma = -0.5 * made(timesteps.log_normal(u, made, mean=0.1, std=0.7)).logsnr
    expected = scipy.stats.norm.ppf(np.asarray(u, np.float64), 0.1, 0.7)
    np.testing.assert_allclose(ln_sigma, expected, atol=atol)


def test_log_normal_beyond_the_ends():
    """What share of the draws the ends of EDM's schedule cut: as documented."""
    ends = (np.log([0.002, 80.0]) + 1.2) / 1.2
    share = scipy.stats.norm.cdf(ends[0]) + scipy.stats.norm.sf(ends[1])
    assert f"{share:.1e}" == "1.6e-05"
    at_end = scipy.special.ndtr(ends)
    u = jnp.asarray([0.0, 0.5 * at_end[0], 2 * at_end[0], 1 - 1e-5, TOP])
    t = np.asarray(timesteps.log_normal(u, VE))
    np.testing.assert_allclose(t[[0, 1, 4]], [0, 0, 1], atol=1e-6)
    assert ((t[2:4] > 1e-3) & (t[2:4] < 1 - 1e-3)).all()
    # u = 0 is 5.3 standard deviations away, not infinitely far.
    wide = continuous.ve(sigma_min=1e-6, sigma_max=1e6)
    furthest = -0.5 * wide(timesteps.log_normal(u[jnp.array([0, -1])], wide)).logsnr
    expected = -1.2 + 1.2 * scipy.special.ndtri(2.0**-24) * np.array([1, -1])
    np.testing.assert_allclose(furthest, expected, atol=1e-4)


def test_log_normal_has_no_gradient_and_takes_steps():
    vp = continuous.vp()
    slope = jax.jit(jax.grad(lambda u: timesteps.log_normal(u, vp)))(0.3)
    assert slope == 0
    made = schedule.linear()
    t = timesteps.log_normal(jnp.asarray([0.0, 0.5, TOP]), made)
    assert jnp.issubdtype(t.dtype, jnp.integer)
    truth = oracle("linear")
    ln_sigma = np.log(truth.sigmas[1:] / truth.alphas[1:])
    assert t[1] == 1 + np.argmin(abs(ln_sigma + 1.2))
    assert t[0] == 1


def test_logit_normal_times(precision):
    u = jnp.asarray(middles(2001), precision)
    wide = np.asarray(u, np.float64)
    rtol = {"float32": 2e-5, "float64": 1e-10}[precision]
    for options in ({}, {"mean": -0.5, "std": 1.4}):
        t = timesteps.logit_normal(u, **options)
        mean, std = options.get("mean", 0.0), options.get("std", 1.0)
        expected = scipy.special.expit(scipy.stats.norm.ppf(wide, mean, std))
        np.testing.assert_allclose(t, expected, rtol=rtol)
    edges = np.asarray(timesteps.logit_normal(jnp.asarray([0.0, TOP])))
    assert (edges > 0).all()
    assert (edges < 1).all()


@pytest.mark.parametrize("length", [1, 3, 10])
def test_history_keeps_the_last_losses(length):
    """Against a queue for each t, over batches that have the same t many times."""
    num_steps, rng = 5, np.random.default_rng(length)
    past = timesteps.history(num_steps, length=length)
    queues = [deque(maxlen=length) for _ in range(num_steps)]
    counts = np.zeros(num_steps, int)
    record = jax.jit(timesteps.record)
    for _ in range(8):
        t = np.minimum(rng.geometric(0.4, 24), num_steps)
        loss = rng.uniform(0.1, 5, 24).astype(np.float32)
        loss[rng.random(24) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        past = record(past, jnp.asarray(t), jnp.asarray(loss))
        for k, value in zip(t, loss, strict=True):
            if np.isfinite(value):
                queues[k - 1].append(value)
                counts[k - 1] += 1
        np.testing.assert_array_equal(past.counts, counts)
        for row, queue, count in zip(past.losses, queues, counts, strict=True):
            # The oldest comes first once the ring is turned to where it goes on.
            turned = np.roll(row, -(count % length)) if count >= length else row
            np.testing.assert_array_equal(turned[: len(queue)], np.float32(queue))
    assert past.losses.dtype == jnp.float32
    assert past.counts.dtype == jnp.int32


def test_a_traced_time_outside_is_not_recorded():
    past = timesteps.history(3, length=2)
    after = jax.jit(timesteps.record)(past, jnp.array([-1, 0, 4]), jnp.ones(3))
    assert not np.any(after.losses)
    assert not np.any(after.counts)


RECORD = jax.jit(timesteps.record)


def filled(values, length=10):
    """A history of these losses, [length, T]."""
    past = timesteps.history(values.shape[1], length=length)
    t = jnp.arange(1, values.shape[1] + 1)
    for row in values:
        past = RECORD(past, t, jnp.asarray(row, jnp.float32))
    return past


def test_probabilities_are_roots_of_second_moments(precision):
    values = np.random.default_rng(0).exponential(size=(10, 6)).astype(np.float32)
    expected = np.sqrt((values.astype(np.float64) ** 2).mean(axis=0))
    expected = 0.999 * expected / expected.sum() + 0.001 / 6
    got = timesteps.probabilities(filled(values))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    uniform = np.full(6, 1 / 6)
    # Not every t has ten yet.
    past = filled(values)
    short = past._replace(counts=past.counts.at[4].set(9))
    np.testing.assert_allclose(timesteps.probabilities(short), uniform, rtol=1e-6)
    got = timesteps.probabilities(past, uniform=1.0)
    np.testing.assert_allclose(got, uniform, rtol=1e-6)
    got = timesteps.probabilities(filled(0 * values))
    np.testing.assert_allclose(got, uniform, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_probabilities_of_extreme_losses(scale):
    """Their squares are beyond float32."""
    values = scale * np.repeat([[1.0, 3.0]], 10, axis=0)
    got = timesteps.probabilities(filled(values), uniform=0.0)
    np.testing.assert_allclose(got, [0.25, 0.75], rtol=1e-6)


def uneven(kind, num_steps=4000):
    rng, t = np.random.default_rng(0), np.arange(1, num_steps + 1)
    p = {
        "flat": np.ones(num_steps),
        "steep": t**-2.0,
        "rising": t**4.0,
        "rough": np.exp(8 * rng.normal(size=num_steps)),
        "holes": np.where(rng.random(num_steps) < 0.5, 0, t**-1.0),
        "last": np.where(t == num_steps, 1.0, 1e-12),
        "early holes": np.where(t <= 5, 0, 1.0),
        "late holes": np.where(t > num_steps - 5, 0, 1.0),
    }[kind]
    return (p / p.sum()).astype(np.float32)


EARLY, LATE = "early holes", "late holes"
SHAPES = ["flat", "steep", "rising", "rough", "holes", "last", EARLY, LATE]


@pytest.mark.parametrize("kind", SHAPES)
def test_importance_in_float32(kind):
    """Times in 1..T for all u, never where p is 0, and the shares that were asked."""
    p = uneven(kind)
    u = np.concatenate([[0.0, 2.0**-24], middles(2**20), [1 - 2.0**-23, TOP]])
    t, weight = jax.jit(timesteps.importance)(u.astype(np.float32), p)
    t = np.asarray(t)
    assert t.min() >= 1
    assert t.max() <= len(p)
    assert (np.diff(t) >= 0).all()
    assert (p[t - 1] > 0).all()
    shares = np.bincount(t[2:-2] - 1, minlength=len(p)) / 2**20
    np.testing.assert_allclose(shares, p, atol=2**-20 + 3e-7)
    # The weight undoes a share within 3e-7 of p.
    np.testing.assert_allclose(1 / (len(p) * weight), p[t - 1], rtol=1e-5, atol=3e-7)


def test_importance_keeps_the_expectation():
    rng = np.random.default_rng(1)
    loss = rng.exponential(size=1000) * 100 / np.arange(1, 1001)
    past = filled(np.repeat(loss[None], 2, axis=0), length=2)
    p = jax.jit(timesteps.probabilities)(past)
    t, weight = jax.jit(timesteps.importance)(middles(2**18), p)
    got = np.mean(np.asarray(weight, np.float64) * loss[t - 1])
    assert abs(got / loss.mean() - 1) < 2e-4


# The variance of the loss of a batch. Four pixels of zero mean and these variances.
SPREAD = np.array([1.0, 0.1, 0.01, 0.001])
TRUTH = oracle("linear")


def error_variance(t):
    """Of each pixel's eps given x_t, [..., 4]: that of the best network's error."""
    signal = TRUTH.alphas_bar[t][..., None] * SPREAD
    return signal / (signal + TRUTH.noise[t][..., None])


def moments(scale):
    """Mean and variance of scale_t mean(error^2) for t = 1..T, each [T]."""
    each = error_variance(np.arange(1, T + 1))
    mean, variance = each.mean(axis=1), 2 * (each**2).sum(axis=1) / 16
    return scale * mean, scale**2 * variance


def bound_scale():
    """What mean(eps error^2) has before it in L_{t-1}, in bits (Eqs. 7 and 8)."""
    t = np.arange(2, T + 1)
    c0, _ = TRUTH.coefficients(t)
    off = c0**2 * TRUTH.noise[t] / TRUTH.alphas_bar[t]
    scale = 0.5 * off / TRUTH.variance("small", t) / np.log(2)
    return np.concatenate([[scale[0]], scale])  # L_0 stands aside: see _losses


@jax.jit
def _losses(key, t):
    """L_simple and the term of the bound for one example of each t, both [N].

    The term of t = 1 is the decoder's, of other moments: t = 2 is in its place.
    """
    made, t_bound = schedule.linear(), jnp.maximum(t, 2)
    x0_key, eps_key = jax.random.split(key)
    x0 = jax.random.normal(x0_key, (len(t), 4)) * jnp.sqrt(jnp.asarray(SPREAD))[None]
    eps = jax.random.normal(eps_key, x0.shape)

    def predict(t):
        level = made(t)
        x_t = gaussian.q_sample(x0, eps, level)
        level = level.like(x_t)
        variance = level.alpha**2 * SPREAD[None] + level.sigma**2
        return x_t, gaussian.predict("eps", level.sigma / variance * x_t, x_t, made(t))

    _, pred = predict(t)
    simple = losses.simple(pred, x0, eps, made(t))
    x_t, pred = predict(t_bound)
    bound = losses.vlb(pred, x0, x_t, made, t_bound, variance="small")
    return simple, bound


def measured(estimates):
    """The variance of batch means, and the standard error of that variance."""
    off = estimates.mean(axis=1) - estimates.mean()
    variance = np.mean(off**2)
    return variance, np.sqrt((np.mean(off**4) - variance**2) / len(off))


def spread_variance(values, weights, grid=4096):
    """Of the mean of values_t over a batch of low discrepancy, t by its shares.

    Over all u_0, by its closed form: an integral over one cell of length 1 / B.
    """
    u = (np.arange(grid) + 0.5) / grid / BATCH
    u = u[:, None] + np.arange(BATCH) / BATCH
    index = np.searchsorted(np.cumsum(weights), u * (1 - 1e-12), side="right")
    return np.var(values[np.minimum(index, len(values) - 1)].mean(axis=1))


def agree(got, expected):
    variance, error = got
    assert error < 0.1 * variance
    assert abs(variance - expected) < 5 * error, (variance, expected, error)


def test_variance_of_the_simple_loss(x64):
    """uniform > antithetic > low discrepancy, each as its theory has it."""
    mean, variance = moments(np.ones(T))
    assert (np.diff(mean) < 0).all()  # monotone in t
    within, between = variance.mean(), np.var(mean)
    opposite = np.mean((mean - mean.mean()) * (mean - mean.mean())[::-1])
    expected = {
        "uniform": (within + between) / BATCH,
        "antithetic": (within + between + opposite) / BATCH,
        "low_discrepancy": within / BATCH + spread_variance(mean, np.full(T, 1 / T)),
    }
    got = {}
    for name in SPREADS:
        t = timesteps.steps(many(name), T)
        loss, _ = _losses(jax.random.key(1), t.ravel())
        loss = np.asarray(loss).reshape(t.shape)
        assert abs(loss.mean() / mean.mean() - 1) < 0.02
        got[name] = measured(loss)
        print(f"{name}: {got[name][0]:.3e} expected {expected[name]:.3e}")
        agree(got[name], expected[name])
    for one, other in (("uniform", "antithetic"), ("antithetic", "low_discrepancy")):
        apart = expected[one] - expected[other]
        assert apart > 0
        assert got[one][0] - got[other][0] > 0.5 * apart


def test_variance_of_the_bound(x64):
    """uniform > importance > importance of low discrepancy, each by its theory.

    For independent draws from p: (sum_t E[L_t^2] / (T^2 p_t) - L^2) / B, which is
    least for p_t proportional to sqrt(E[L_t^2]) among all p.
    """
    mean, variance = moments(bound_scale())
    second = variance + mean**2
    rough = np.exp(0.7 * np.random.default_rng(0).normal(size=T))
    shapes = {
        "uniform": np.ones(T),
        "importance": np.sqrt(second),
        "absolute": mean,
        "perturbed": np.sqrt(second) * rough,
    }
    expected, got = {}, {}
    for name, shape in shapes.items():
        p = shape / shape.sum()
        weight = 1 / (T * p)
        expected[name] = ((p * weight**2 * second).sum() - mean.mean() ** 2) / BATCH
        cases = [(name, "uniform")]
        if name == "importance":
            cases.append(("both", "low_discrepancy"))
            expected["both"] = (p * weight**2 * variance).sum() / BATCH
            expected["both"] += spread_variance(weight * mean, p)
        for case, spread in cases:
            u = many(spread)
            t, weights = timesteps.importance(u.ravel(), jnp.asarray(p))
            _, loss = _losses(jax.random.key(2), t)
            loss = np.asarray(weights * loss).reshape(u.shape)
            got[case] = measured(loss)
            off = np.sqrt(expected[case] / KEYS)
            print(f"{case}: {got[case][0]:.3e} expected {expected[case]:.3e}")
            assert abs(loss.mean() - mean.mean()) < 5 * off
            agree(got[case], expected[case])
    assert expected["uniform"] > expected["perturbed"] > expected["importance"]
    assert got["uniform"][0] > got["perturbed"][0] > got["importance"][0]
    assert expected["absolute"] > expected["importance"] > expected["both"]


def test_variance_of_the_bound_that_is_of_its_times(x64):
    """Of the mean of weight E[L_t]: what importance leaves, low discrepancy takes."""
    mean, variance = moments(bound_scale())
    shape = np.sqrt(variance + mean**2)
    p = shape / shape.sum()
    values = mean / (T * p)
    expected = {
        "uniform": ((p * values**2).sum() - mean.mean() ** 2) / BATCH,
        "low_discrepancy": spread_variance(values, p),
    }
    assert expected["low_discrepancy"] < 0.1 * expected["uniform"]
    for name, variance in expected.items():
        u = many(name)
        t, weights = timesteps.importance(u.ravel(), jnp.asarray(p))
        loss = np.asarray(weights * jnp.asarray(mean)[t - 1]).reshape(u.shape)
        print(f"{name}: {measured(loss)[0]:.3e} expected {variance:.3e}")
        agree(measured(loss), variance)


def test_history_of_the_losses_finds_the_best_probabilities(x64):
    """Ten losses of each t leave it within a few hundredths of the least variance."""
    mean, variance = moments(bound_scale())
    second, past = variance + mean**2, timesteps.history(T)
    t = jnp.arange(1, T + 1)
    for k in range(10):
        _, loss = _losses(jax.random.key(k), t)
        past = RECORD(past, t, loss)
    p = np.asarray(timesteps.probabilities(past), np.float64)
    got = (second / p).sum() / T**2 - mean.mean() ** 2
    best = np.sqrt(second).mean() ** 2 - mean.mean() ** 2
    print(f"{got / best:.3f} of the least, uniform {np.var(mean) / best:.1f}")
    assert best < got < 1.2 * best


def test_what_is_refused(refuses):
    key = jax.random.key(0)
    for spread in (timesteps.antithetic, timesteps.low_discrepancy):
        with refuses("4"):
            spread(key, jnp.arange(5), 4)
        with refuses("-1"):
            spread(key, jnp.array([-1]), 4)
        with refuses("0"):
            spread(key, jnp.arange(5), 0)
    with refuses("1"):
        timesteps.times(jnp.zeros(1), first=1)
    with refuses("0"):
        timesteps.steps(jnp.zeros(1), 0)
    with refuses("0"):
        timesteps.log_normal(jnp.zeros(1), continuous.vp(), std=0)
    with refuses("-1"):
        timesteps.logit_normal(jnp.zeros(1), std=-1)
    with refuses("0"):
        timesteps.history(10, length=0)
    with refuses("2"):
        timesteps.probabilities(timesteps.history(3), uniform=2)
    with refuses("4"):
        timesteps.record(timesteps.history(3), jnp.array([4]), jnp.ones(1))
