"""How times are drawn: their shares, their cuts, and what is remembered of losses."""

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from oracles import T, oracle

from diffusion_jax import continuous, schedule, timesteps

BATCH, KEYS = 16, 10_000
TOP = np.float32(1 - 2.0**-24)  # the largest float32 below 1

SPREADS = {
    "uniform": lambda key, position, batch_size: timesteps.uniform(key, position),
    "antithetic": timesteps.antithetic,
    "low_discrepancy": timesteps.low_discrepancy,
}


def middles(count):
    """Evenly spread numbers in (0, 1), as float32 has them."""
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def test_cuts_of_a_batch_draw_what_it_draws():
    for name, size in (("uniform", 9), ("antithetic", 9), ("low_discrepancy", 12)):
        spread = jax.jit(partial(SPREADS[name], batch_size=size))
        key, all_of = jax.random.key(3), jnp.arange(size)
        whole, other = (
            np.asarray(spread(k, position=all_of)) for k in (key, jax.random.key(4))
        )
        assert len(np.unique(whole)) == size
        assert np.all(whole != other), name
        order = np.random.default_rng(0).permutation(size)
        for part in np.split(order, [1, 6]):
            np.testing.assert_array_equal(spread(key, position=part), whole[part])


def many(name):
    """The numbers of many batches, [KEYS, BATCH]."""
    keys, spread = jax.random.split(jax.random.key(7), KEYS), SPREADS[name]
    return jax.jit(jax.vmap(lambda key: spread(key, jnp.arange(BATCH), BATCH)))(keys)


def test_each_number_is_uniform():
    """And those of `uniform` are independent, and the same in double precision."""
    for name in SPREADS:
        u = np.asarray(many(name))
        assert u.dtype == np.float32
        assert ((u >= 0) & (u < 1)).all()
        for column in u.T:
            counts = np.bincount((column * 10).astype(int), minlength=10)
            np.testing.assert_allclose(counts, KEYS / 10, atol=5 * np.sqrt(KEYS * 0.09))
    u = np.asarray(many("uniform"))
    correlation = np.corrcoef(u.T.astype(np.float64)) - np.eye(BATCH)
    assert abs(correlation).max() < 5 / np.sqrt(KEYS)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(many("uniform"), u)


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


def test_steps_have_equal_shares_to_the_ends():
    edge = jnp.asarray([0.0, 2.0**-24, TOP])
    for count in (1, 2, 10, 1000, 1023, 1024, 4096):
        counts = np.bincount(timesteps.steps(middles(40_000), count))
        assert counts[0] == 0
        np.testing.assert_allclose(counts[1:], 40_000 / count, atol=1)
        assert timesteps.steps(edge, count).tolist() == [1, 1, count]


def test_times_are_uniform_between_their_ends():
    u = np.concatenate([[0.0], middles(1000), [TOP]]).astype(np.float32)
    for first in (0.0, 1e-5, 0.3):
        t = np.asarray(timesteps.times(u, first=first), np.float64)
        np.testing.assert_allclose(t, first + (1 - first) * u.astype(float), rtol=2e-6)
        assert t[0] == np.float32(first)
        assert t[-1] <= 1


VE = continuous.ve(sigma_min=0.002, sigma_max=80.0)


def test_log_normal_noise_and_logit_normal_times(precision):
    u = jnp.asarray(middles(2001), precision)
    wide, digits = np.asarray(u, np.float64), precision == "float32"
    for options in ({}, {"mean": 0.1, "std": 0.7}):
        for made, digit in ((VE, 1), (continuous.vp(), 5)):
            # A time of float32 near 0 is good to 1e-7, where vp has 5e-3 a digit.
            found = made(timesteps.log_normal(u, made, **options)).logsnr
            expected = scipy.stats.norm.ppf(wide, *(options.values() or (-1.2, 1.2)))
            atol = digit * (2e-5 if digits else 1e-8)
            np.testing.assert_allclose(-0.5 * found, expected, atol=atol)
        t = timesteps.logit_normal(u, **options)
        expected = scipy.special.expit(scipy.stats.norm.ppf(wide, *options.values()))
        np.testing.assert_allclose(t, expected, rtol=2e-5 if digits else 1e-10)
    edges = np.asarray(timesteps.logit_normal(jnp.asarray([0.0, TOP])))
    assert ((edges > 0) & (edges < 1)).all()


def test_log_normal_beyond_the_ends_of_a_schedule():
    """At its end; and u = 0 is 5.3 standard deviations away, not endlessly far."""
    low = scipy.stats.norm.cdf(np.log(0.002), -1.2, 1.2)
    u = jnp.asarray([0.0, 0.5 * low, 2 * low, 1 - 1e-5, TOP])
    t = np.asarray(timesteps.log_normal(u, VE))
    np.testing.assert_allclose(t[[0, 1, 4]], [0, 0, 1], atol=1e-6)
    assert ((t[2:4] > 1e-3) & (t[2:4] < 1 - 1e-3)).all()
    wide = continuous.ve(sigma_min=1e-6, sigma_max=1e6)
    furthest = -0.5 * wide(timesteps.log_normal(u[jnp.array([0, -1])], wide)).logsnr
    expected = -1.2 + 1.2 * scipy.special.ndtri(2.0**-24) * np.array([1, -1])
    np.testing.assert_allclose(furthest, expected, atol=1e-4)


def test_log_normal_takes_the_nearest_step_of_a_chain_and_no_gradient():
    t = timesteps.log_normal(jnp.asarray([0.0, 0.5]), schedule.linear())
    ln_sigma = np.log(oracle("linear").sigmas[1:] / oracle("linear").alphas[1:])
    assert jnp.issubdtype(t.dtype, jnp.integer)
    assert t.tolist() == [1, 1 + np.argmin(abs(ln_sigma + 1.2))]
    assert jax.jit(jax.grad(lambda u: timesteps.log_normal(u, VE)))(0.3) == 0


RECORD = jax.jit(timesteps.record)


@pytest.mark.parametrize("length", [1, 3])
def test_history_keeps_the_last_losses(length):
    """Against a queue for each t, over batches that have the same t many times."""
    num_steps, rng = 5, np.random.default_rng(length)
    past = timesteps.history(num_steps, length=length)
    queues = [deque(maxlen=length) for _ in range(num_steps)]
    counts = np.zeros(num_steps, int)
    for _ in range(8):
        t = np.minimum(rng.geometric(0.4, 24), num_steps)
        loss = rng.uniform(0.1, 5, 24).astype(np.float32)
        loss[rng.random(24) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        past = RECORD(past, jnp.asarray(t), jnp.asarray(loss))
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
    # A time outside is none of them.
    after = RECORD(past, jnp.full(24, num_steps + 1), jnp.asarray(loss))
    np.testing.assert_array_equal(after.losses, past.losses)


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
    past = filled(values)
    np.testing.assert_allclose(timesteps.probabilities(past), expected, rtol=1e-6)
    # Uniform until every t has ten losses, and where all are 0.
    short = past._replace(counts=past.counts.at[4].set(9))
    for known, share in ((short, 0.0), (filled(0 * values), 0.0), (past, 1.0)):
        got = timesteps.probabilities(known, uniform=share)
        np.testing.assert_allclose(got, 1 / 6, rtol=1e-6)
    for scale in (1e-30, 1e30):  # whose squares are beyond float32
        past = filled(scale * np.repeat([[1.0, 3.0]], 10, axis=0))
        got = timesteps.probabilities(past, uniform=0.0)
        np.testing.assert_allclose(got, [0.25, 0.75], rtol=1e-6)


def uneven(num_steps=4000):
    rng, t = np.random.default_rng(0), np.arange(1, num_steps + 1)
    shapes = {
        "steep": t**-2.0,
        "rough": np.exp(8 * rng.normal(size=num_steps)),
        "holes": np.where(rng.random(num_steps) < 0.5, 0, t**-1.0),
        "last": np.where(t == num_steps, 1.0, 1e-12),
        "early holes": np.where(t <= 5, 0, 1.0),
        "late holes": np.where(t > num_steps - 5, 0, 1.0),
    }
    return {kind: (p / p.sum()).astype(np.float32) for kind, p in shapes.items()}


def test_importance_in_float32():
    """Times in 1..T for all u, never where p is 0, and the shares that were asked."""
    u = np.concatenate([[0.0, 2.0**-24], middles(2**20), [1 - 2.0**-23, TOP]])
    u, importance = jnp.asarray(u, jnp.float32), jax.jit(timesteps.importance)
    for kind, p in uneven().items():
        t, weight = map(np.asarray, importance(u, p))
        assert 1 <= t[0] <= t[-1] <= len(p)
        assert (np.diff(t) >= 0).all()
        assert (p[t - 1] > 0).all(), kind
        shares = np.bincount(t[2:-2] - 1, minlength=len(p)) / 2**20
        np.testing.assert_allclose(shares, p, atol=2**-20 + 3e-7, err_msg=kind)
        # The weight undoes a share within 3e-7 of p.
        undone = 1 / (len(p) * weight)
        np.testing.assert_allclose(undone, p[t - 1], rtol=1e-5, atol=3e-7, err_msg=kind)
