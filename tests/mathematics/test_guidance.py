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
COSINE, BOTH = schedule.cosine(T), mixtures.two()
PARTS = [
    mixtures.normal(mean.reshape(SHAPE), cov)
    for mean, cov in zip(BOTH.means, BOTH.covs, strict=True)
]


def network(x, t, label):
    """The best eps for each label; the last stands for none. It counts from 0."""
    outs = [model.denoiser(COSINE)(x, t + 1).eps for model in (*PARTS, BOTH)]
    return jnp.stack(outs)[label, jnp.arange(len(x))]


def plain(x, t, label):
    """Of no data, but every operation of it acts on one number."""
    return jnp.tanh(x) * (1.0 + label)[:, None, None, None] + x


def log_prob(label, x, t):
    """log p(y | x_t) by Bayes' rule, from densities written out."""
    level = COSINE(t)
    alpha, sigma = level.alpha[:, None], level.sigma[:, None, None]
    logits = []
    for weight, mean, cov in zip(BOTH.weights, BOTH.means, BOTH.covs, strict=True):
        spread = alpha[..., None] ** 2 * cov[None] + sigma**2 * np.eye(4)[None]
        off = x.reshape(len(x), -1) - alpha * mean[None]
        far = (off * jnp.linalg.solve(spread, off[..., None])[..., 0]).sum(axis=1)
        logits.append(jnp.log(weight) - 0.5 * (far + jnp.linalg.slogdet(spread)[1]))
    logp = jax.nn.log_softmax(jnp.stack(logits, axis=1))
    return jnp.take_along_axis(logp, label[:, None], axis=1)[:, 0]


def points():
    """x_t of the mixture's own size at times all over the chain, and labels."""
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(12, *SHAPE)), rng.integers(0, 2, 12)
    return jnp.asarray(x), jnp.linspace(1, T, 12).astype(int), jnp.asarray(label)


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
    for a, b in zip(actual[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def holds_x(pred, x, t):
    again = gaussian.q_sample(pred.x0, pred.eps, COSINE(t))
    np.testing.assert_allclose(again, x, rtol=1e-12, atol=1e-12)


def test_both_ways_are_one(x64):
    x, t, label = points()
    for scale in (0.0, 0.5, 1.0, 3.0):
        pred = predict(by_classifier, label, x, t, scale)
        close(predict(free, label, x, t, scale), pred)
        holds_x(pred, x, t)


def test_scale_1_is_conditional_to_the_last_bit_and_scale_0_unconditional(precision):
    x, t, label = points()
    guided = functools.partial(guidance.classifier_free, plain, label, NONE)
    one, zero = (guided(scale=scale)(x, t) for scale in (1.0, 0.0))
    np.testing.assert_array_equal(one, plain(x, t, label))
    rtol = 1e-5 if precision == "float32" else 1e-13
    none = plain(x, t, jnp.full_like(label, NONE))
    np.testing.assert_allclose(zero, none, rtol=rtol)


def test_within_is_an_interval_of_sigma_over_alpha(x64):
    lin, t = schedule.linear(), np.arange(1, 1001)
    noise = np.exp(-0.5 * np.asarray(lin(t).logsnr))
    low, high = float(noise[99]) * (1 - 1e-12), float(noise[599]) * (1 + 1e-12)
    got = guidance.within(lin, low, high)(jnp.asarray(t - 1))
    np.testing.assert_array_equal(got, (t >= 100) & (t <= 600))
    # In continuous time, and with another shift.
    made = continuous.vp()
    at = float(jnp.exp(-0.5 * made(0.5).logsnr))
    got = guidance.within(made, 0.0, at)(jnp.array([0.0, 0.49, 0.51]))
    np.testing.assert_array_equal(got, [False, True, False])
    got = guidance.within(lin, low, np.inf, time_shift=0)(jnp.asarray(t))
    np.testing.assert_array_equal(got, t >= 100)
    # The lower end is out and the upper in.
    made = continuous.ve(sigma_min=1.0, sigma_max=1.0)
    assert not guidance.within(made, 1.0, 2.0)(jnp.asarray(0.3))
    assert guidance.within(made, 0.5, 1.0)(jnp.asarray(0.3))


def test_outside_of_the_interval_there_is_no_guidance(x64):
    x, t, label = points()
    active = guidance.within(COSINE, 0.3, 2.0)
    inside = np.asarray(active(t - 1)).reshape(-1, 1, 1, 1)
    assert 2 < inside.sum() < len(x) - 2
    off, on = (predict(free, label, x, t, scale).eps for scale in (1.0, 3.0))
    got = predict(free, label, x, t, 3.0, active).eps
    np.testing.assert_allclose(got, np.where(inside, on, off), rtol=1e-13)
    assert (np.abs(on - off).max(axis=(1, 2, 3))[inside.ravel()] > 0.1).sum() > 2


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
        assert np.all(np.isfinite(run(x, jnp.full(len(x), t))))
        jax.effects_barrier()
    assert seen == [len(x), 2 * len(x)]


def test_outputs_of_every_kind_combine_as_predictions_do(x64):
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(6, 2, 3))), jnp.arange(5, 35, 5)
    out, base = (jnp.asarray(rng.normal(size=x.shape)) for _ in range(2))

    def outputs(x, t, label):
        both = jnp.stack([out, base], axis=1).reshape(-1, 2, 3)
        np.testing.assert_array_equal(label, [7, 9] * 6)
        np.testing.assert_array_equal(t[::2], t[1::2])
        np.testing.assert_array_equal(x[::2], x[1::2])
        return both

    apply = guidance.classifier_free(outputs, 7, 9, scale=2.5)
    for kind in gaussian.KINDS:

        def seen(net, kind=kind, **options):
            return gaussian.denoiser(net, COSINE, kind, **options)(x, t)

        one, other = (seen(lambda *_, a=a: a) for a in (out, base))
        expected = [b + 2.5 * (a - b) for a, b in zip(one[:2], other[:2], strict=True)]
        close(seen(apply), expected)
        # What is clipped is what was combined.
        clipped = np.clip(expected[0], -1, 1)
        np.testing.assert_allclose(seen(apply, clip=True).x0, clipped, atol=1e-10)
        assert np.any(clipped != expected[0])


def test_a_learned_variance_is_that_of_the_conditional_network(x64):
    x, t, label = points()

    def told(x, t, label):
        return x * label[:, None, None, None]

    def wide(*of):
        return jnp.concatenate([plain(*of), told(*of)], -1)

    def guided(net, **options):
        return guidance.classifier_free(net, label, NONE, scale=3.0, **options)(x, t)

    both = [guided(plain), told(x, t, label)]
    np.testing.assert_array_equal(guided(wide, channels=1), jnp.concatenate(both, -1))
    # All channels when nothing is said.
    np.testing.assert_array_equal(guided(wide)[..., 1:], guided(told))


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
    rest = {"log_variance": x - 4, "fraction": x / 2, "x0_variance": x / 8}

    def denoise(x_t, t):
        return BOTH.denoiser(COSINE)(x_t, t)._replace(**rest)

    def guided(clip):
        belief = functools.partial(log_prob, label)
        return guidance.classifier(denoise, belief, COSINE, scale=5.0, clip=clip)(x, t)

    loose, pred = guided(clip=False), guided(clip=True)
    assert np.abs(loose.x0).max() > 1.5
    np.testing.assert_allclose(pred.x0, np.clip(loose.x0, -1, 1), rtol=1e-12)
    holds_x(pred, x, t)
    # The rest of a prediction is left alone.
    for name, value in rest.items():
        np.testing.assert_array_equal(getattr(loose, name), value)
        np.testing.assert_array_equal(getattr(pred, name), value)
