"""The variance of a reverse step, for every kind and any jump, down to data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from oracles import SCHEDULES, T, draw, oracle, wide

from diffusion_jax import gaussian, prediction, schedule

TIMES = np.arange(1, T + 1)
JUMPS = (np.array([2, 50, 400, 1000, 1000]), np.array([1, 3, 350, 200, 1]))
BOUND = {"float32": 1e-4, "float64": 1e-9}


@jax.jit
def all_kinds(fields, levels, log_small):
    pred = gaussian.Prediction(0 * fields[0], 0 * fields[0], *fields)
    log_variance = partial(prediction.log_variance, log_small=log_small)
    return {kind: log_variance(kind, pred, *levels) for kind in gaussian.VARIANCES}


def log_variances(levels, log_small=None):
    """For a prediction of shape [N, 2, 3] that has every field."""
    log, share, known = (draw(seed, len(levels[0].logsnr), 2, 3) for seed in (5, 6, 7))
    fields = log, share, np.abs(known)
    got = all_kinds(fields, levels, log_small)
    return {k: np.asarray(a, np.float64) for k, a in got.items()}, *fields


def test_every_kind_over_any_jump(precision):
    """Single steps and coarse ones, against the betas; the fraction has no bounds."""
    for name in ("linear", "cosine"):
        truth, made = oracle(name), SCHEDULES[name]()
        for t, s in ((TIMES[1:], TIMES[:-1]), JUMPS):
            levels = made(t), made(s)
            got, log, share, known = log_variances(levels)
            small, large = (wide(truth.variance(k, t, s)) for k in ("small", "large"))
            c0 = wide(truth.coefficients(t, s)[0])
            expected = {
                "small": np.log(small),
                "large": np.log(large),
                "learned": log,
                "range": share * np.log(large) + (1 - share) * np.log(small),
                "analytic": np.log(small + c0**2 * known),
            }
            bound = BOUND[precision]
            for kind, truly in expected.items():
                error = np.abs(got[kind] - truly)
                assert np.all(error <= bound * (1 + 2 * np.abs(share))), (name, kind)
            for kind, truly in (("small", small), ("large", large)):
                plain = gaussian.reverse_variance(kind, *levels)
                np.testing.assert_allclose(plain, truly.ravel(), rtol=bound)


def test_step_to_data(x64):
    """Small is -inf there unless told; the large end of a range is beta_1."""
    truth, lin = oracle("linear"), schedule.linear()
    ends, told = (lin(np.array([1])), lin(np.array([0]))), jnp.log(5.4532e-5)
    beta = np.log(truth.betas[1])
    bare = log_variances(ends)[0]
    assert np.all(np.isneginf(bare["small"]))
    assert np.all(np.isneginf(bare["range"]))
    np.testing.assert_allclose(bare["large"], beta, rtol=1e-10)
    got, _, share, known = log_variances(ends, log_small=told)
    np.testing.assert_array_equal(got["small"], got["large"])
    np.testing.assert_allclose(got["small"], told)
    expected = share * beta + (1 - share) * told
    np.testing.assert_allclose(got["range"], expected, rtol=1e-10)
    # c0 is 1 and nothing of x_t is left: what is uncertain of x0 is all.
    np.testing.assert_allclose(got["analytic"], np.log(known), rtol=1e-10)


def test_last_step_has_no_noise_and_no_nan(precision):
    """Whatever the fields are, also 0 and far outside, forward and backward."""
    lin, x = schedule.linear(), jnp.asarray(draw(0, 4, 3))
    t = np.array([1, 1, 2, 2])
    levels = lin(t), lin(t - 1)

    def ends(x0, fields, levels):
        pred = gaussian.Prediction(x0, x0, *fields)
        sample = partial(gaussian.p_sample, jax.random.key(0), pred, x, *levels)
        return jnp.stack([sample(variance=kind) for kind in gaussian.VARIANCES])

    def total(*args):
        return (ends(*args) ** 2).sum(axis=(1, 2))

    both = jax.jit(lambda *args: (ends(*args), jax.jacrev(total, (0, 1, 2))(*args)))
    for value in (0.0, 1.0, 5.0):
        fields = [jnp.full_like(x, value)] * 3
        drawn, slopes = both(0.5 * x, fields, levels)
        for kind, end in zip(gaussian.VARIANCES, drawn, strict=True):
            np.testing.assert_allclose(end[:2], 0.5 * x[:2], rtol=1e-6, err_msg=kind)
        for slope in jax.tree.leaves(slopes):
            assert np.all(np.isfinite(slope)), value
