"""Guidance against mixtures of Gaussians, where both ways have a closed form."""

import functools

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest

from diffusion_jax import continuous, gaussian, guidance, schedule

pytestmark = pytest.mark.optimised

T, NONE, SHAPE = 40, 2, (2, 2, 1)
COSINE = schedule.cosine(T)
BOTH = mixtures.two()


PARTS = [
    mixtures.Mixture([1.0], [mean], [cov], SHAPE)
    for mean, cov in zip(BOTH.means, BOTH.covs, strict=True)
]


def network(x, t, label):
    """The best eps for each label; the last stands for none. It counts from 0."""
    outs = [model.denoiser(COSINE)(x, t + 1).eps for model in (*PARTS, BOTH)]
    chosen = label[:, None, None, None]
    return jnp.select([chosen == k for k in range(3)], outs, jnp.nan)


def plain(x, t, label):
    """Of no data, but every operation of it acts on one number."""
    return jnp.tanh(x) * (1.0 + label)[:, None, None, None] + x


def log_prob(label, x, t):
    """log p(y | x_t) by Bayes' rule, from densities written out."""
    level = COSINE(t)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None, None]
    logits = []
    for weight, mean, cov in zip(BOTH.weights, BOTH.means, BOTH.covs, strict=True):
        spread = alpha[..., None] ** 2 * jnp.asarray(cov)[None]
        spread = spread + sigma**2 * jnp.eye(4)[None]
        off = x.reshape(len(x), -1) - alpha * jnp.asarray(mean)[None]
        far = (off * jnp.linalg.solve(spread, off[..., None])[..., 0]).sum(axis=1)
        logits.append(jnp.log(weight) - 0.5 * (far + jnp.linalg.slogdet(spread)[1]))
    logp = jax.nn.log_softmax(jnp.stack(logits, axis=1))
    return jnp.take_along_axis(logp, label[:, None], axis=1)[:, 0]


def points(count=12, seed=0):
    """x_t of the mixture's own size at times all over the chain, and labels."""
    rng = np.random.default_rng(seed)
    t = jnp.asarray(np.linspace(1, T, count).astype(int))
    x = jnp.asarray(rng.normal(size=(count, *SHAPE)))
    return x, t, jnp.asarray(rng.integers(0, 2, count))


def free(label, net=network, **options):
    apply = guidance.classifier_free(net, label, NONE, **options)
    return gaussian.denoiser(apply, COSINE, "eps")


def by_classifier(label, **options):
    belief = functools.partial(log_prob, label)
    return guidance.classifier(BOTH.denoiser(COSINE), belief, COSINE, **options)


@functools.partial(jax.jit, static_argnames=("way", "active"))
def predict(way, label, x, t, scale, active=None):
    options = {"active": active} if way is free else {}
    return way(label, scale=scale, **options)(x, t)


def close(actual, expected):
    for name in ("x0", "eps"):
        a, b = getattr(actual, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_both_ways_are_one(x64):
    x, t, label = points()
    level = COSINE(t).like(x)
    for scale in (0.0, 0.5, 1.0, 3.0):
        pred = predict(by_classifier, label, x, t, scale)
        close(predict(free, label, x, t, scale), pred)
        again = level.alpha * pred.x0 + level.sigma * pred.eps
        np.testing.assert_allclose(again, x, rtol=1e-12, atol=1e-12)


def test_scale_1_is_conditional_to_the_last_bit_and_scale_0_unconditional(precision):
    x, t, label = points()

    def out(scale):
        return guidance.classifier_free(plain, label, NONE, scale=scale)(x, t)

    np.testing.assert_array_equal(out(1.0), plain(x, t, label))
    rtol = 1e-5 if precision == "float32" else 1e-13
    none = plain(x, t, jnp.full_like(label, NONE))
    np.testing.assert_allclose(out(0.0), none, rtol=rtol)


def test_within_is_an_interval_of_sigma_over_alpha(x64):
    lin = schedule.linear()
    t = np.arange(1, 1001)
    level = lin(t)
    noise = np.asarray(level.sigma / level.alpha)
    low, high = float(noise[99]) * (1 - 1e-12), float(noise[599]) * (1 + 1e-12)
    got = guidance.within(lin, low, high)(jnp.asarray(t - 1))
    np.testing.assert_array_equal(got, (t >= 100) & (t <= 600))
    # In continuous time, and with another shift.
    made = continuous.vp()
    at = float(made(0.5).sigma / made(0.5).alpha)
    got = guidance.within(made, 0.0, at)(jnp.array([0.0, 0.49, 0.51]))
    np.testing.assert_array_equal(got, [False, True, False])
    got = guidance.within(lin, low, np.inf, time_shift=0)(jnp.asarray(t))
    np.testing.assert_array_equal(got, t >= 100)
    # The lower end is out and the upper in.
    made = continuous.ve(sigma_min=1.0, sigma_max=1.0)
    for low, high, expected in ((1.0, 2.0, False), (0.5, 1.0, True)):
        assert bool(guidance.within(made, low, high)(jnp.asarray(0.3))) == expected


def test_outside_of_the_interval_there_is_no_guidance(x64):
    x, t, label = points()
    active = guidance.within(COSINE, 0.3, 2.0)
    inside = np.asarray(active(t - 1))
    assert 2 < inside.sum() < len(x) - 2
    got = predict(free, label, x, t, 3.0, active).eps
    off, on = (predict(free, label, x, t, scale).eps for scale in (1.0, 3.0))
    np.testing.assert_allclose(got[~inside], off[~inside], rtol=1e-13)
    np.testing.assert_allclose(got[inside], on[inside], rtol=1e-13)
    assert (np.abs(on - off).max(axis=(1, 2, 3))[inside] > 0.1).sum() > 2


def test_a_call_outside_asks_the_network_once_an_example():
    seen = []

    def counted(x, t, label):
        jax.debug.callback(lambda: seen.append(len(x)))
        return plain(x, t, label)

    x, _, label = points()
    active = guidance.within(COSINE, 0.3, 2.0)
    apply = guidance.classifier_free(counted, label, NONE, scale=3.0, active=active)
    run = jax.jit(apply)
    for t in (T - 1, 20):
        got = run(x, jnp.full(len(x), t))
        assert np.all(np.isfinite(got))
        jax.effects_barrier()
    assert seen == [len(x), 2 * len(x)]


def test_outputs_of_every_kind_combine_as_predictions_do(x64):
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(6, 2, 3))), jnp.arange(5, 35, 5)
    out, base = (jnp.asarray(rng.normal(size=x.shape)) for _ in range(2))

    def outputs(x, t, label):
        both = jnp.stack([out, base], axis=1).reshape(-1, 2, 3)
        assert len(x) == len(both)
        np.testing.assert_array_equal(label, [7, 9] * 6)
        np.testing.assert_array_equal(t[::2], t[1::2])
        np.testing.assert_array_equal(x[::2], x[1::2])
        return both

    apply = guidance.classifier_free(outputs, 7, 9, scale=2.5)
    for kind in gaussian.KINDS:
        one, other = (
            gaussian.denoiser(lambda x, t, a=a: a, COSINE, kind)(x, t)
            for a in (out, base)
        )
        x0, eps = (b + 2.5 * (a - b) for a, b in zip(one[:2], other[:2], strict=True))
        got = gaussian.denoiser(apply, COSINE, kind)(x, t)
        close(got, gaussian.Prediction(x0, eps))
        # What is clipped is what was combined.
        clipped = gaussian.denoiser(apply, COSINE, kind, clip=True)(x, t)
        expected = np.clip(x0, -1, 1)
        np.testing.assert_allclose(clipped.x0, expected, atol=1e-10, err_msg=kind)
        assert np.abs(x0).max() > 1.5


def test_a_learned_variance_is_that_of_the_conditional_network(x64):
    x, t, label = points()

    def wide(x, t, label):
        return jnp.concatenate([plain(x, t, label), x * label[:, None, None, None]], -1)

    def guided(net, **options):
        return guidance.classifier_free(net, label, NONE, scale=3.0, **options)(x, t)

    out = guided(wide, channels=1)
    assert out.shape == (len(x), 2, 2, 2)
    np.testing.assert_array_equal(out[..., 1:], x * label[:, None, None, None])
    np.testing.assert_array_equal(out[..., :1], guided(plain))
    # All channels when nothing is said.
    assert np.abs(guided(wide)[..., 1:] - out[..., 1:]).max() > 0.1


def test_guidance_of_a_bfloat16_network_is_in_float32():
    def half(x, t, label):
        return (x + label.sum(axis=-1, keepdims=True)).astype(jnp.bfloat16)

    x = jnp.full([2, 3], 0.3)
    # A label may be a vector.
    label, none = jnp.full([2, 4], 0.25), jnp.zeros(4)
    out = guidance.classifier_free(half, label, none, scale=1.37)(x, jnp.zeros(2))
    one, other = (np.float32(jnp.bfloat16(np.float32(0.3) + k)) for k in (1, 0))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, one + 0.37 * (one - other), rtol=1e-6)


def test_a_classifier_may_clip_after_its_guidance(x64):
    x, t, label = points()
    loose = predict(by_classifier, label, x, t, 5.0)
    clipped = functools.partial(by_classifier, clip=True)
    pred = predict(clipped, label, x, t, 5.0)
    assert np.abs(loose.x0).max() > 1.5
    np.testing.assert_allclose(pred.x0, np.clip(loose.x0, -1, 1), rtol=1e-12)
    level = COSINE(t).like(x)
    again = level.alpha * pred.x0 + level.sigma * pred.eps
    np.testing.assert_allclose(again, x, atol=1e-12)


@pytest.mark.parametrize("clip", [False, True])
def test_a_classifier_leaves_the_rest_of_a_prediction_alone(clip):
    x = jnp.ones([2, 3])
    rest = {"log_variance": x - 4, "fraction": x / 2, "x0_variance": x / 8}

    def denoise(x_t, t):
        return gaussian.Prediction(x_t, 0 * x_t, **rest)

    guided = guidance.classifier(denoise, lambda x, t: x.sum(axis=1), COSINE, clip=clip)
    found = guided(x, 9)
    for name, value in rest.items():
        np.testing.assert_array_equal(getattr(found, name), value)
