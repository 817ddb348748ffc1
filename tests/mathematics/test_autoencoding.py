"""Losses of autoencoders against what linear ones are known to reach.

A linear autoencoder of Gaussian noise is probabilistic PCA (Tipping and Bishop 1999;
Lucas et al. 2019), whose optima are sums over eigenvalues l_i of the data's covariance.
Data and noise are points with just those second moments, so that no mean is estimated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from diffusion_jax import autoencoding, losses
from diffusion_jax.data import datasets
from diffusion_jax.nets.autoencoder import Moments

LOG_2PI = np.log(2 * np.pi)


def points(covariance):
    """[2 D, D], of mean 0 and just this covariance."""
    values, vectors = np.linalg.eigh(covariance)
    rows = np.sqrt(len(values) * values)[:, None] * vectors.T
    return jnp.asarray(np.concatenate([rows, -rows]))


def digits():
    """The covariance of the digits on 0..255, made continuous by uniform noise."""
    pixels = datasets.load("digits").images.reshape(-1, 64).astype(float)
    return np.cov(pixels.T, ddof=0) + np.eye(64) / 12


def rotated(values):
    rng = np.random.default_rng(3)
    turn = scipy.stats.ortho_group.rvs(len(values), random_state=rng)
    return turn @ np.diag(values) @ turn.T


class Linear:
    """x | z ~ N(W z, e^s), q(z | x) = N(V x, diag d)."""

    def __init__(self, covariance, latent):
        self.x, self.noise = points(covariance), points(np.eye(latent))
        rng = np.random.default_rng(0)
        size = np.sqrt(np.trace(covariance) / len(covariance))
        start = 0.1 * rng.normal(size=(2, latent, len(covariance)))
        self.params = {
            "decode": jnp.asarray(size * start[0]),
            "encode": jnp.asarray(start[1].T / size),
            "log_d": jnp.full(latent, -1.0),
            "s": jnp.asarray(2 * np.log(size)),
        }

    def moments(self, params):
        mean = self.x @ params["encode"]
        return Moments(mean, jnp.broadcast_to(params["log_d"][None], mean.shape))

    def nll(self, params, moments):
        """-log p(x | z) in nats, averaged over data and noise."""
        mean, log_variance = moments
        z = mean[None] + jnp.exp(0.5 * log_variance)[None] * self.noise[:, None]
        errors = jax.vmap(
            lambda guess: autoencoding.reconstruction(
                self.x, guess, params["s"], kind="l2"
            )
        )(z @ params["decode"])
        return 0.5 * (errors.mean() + self.x.shape[1] * LOG_2PI)

    def elbo(self, params, beta=1.0):
        moments = self.moments(params)
        return self.nll(params, moments) + beta * autoencoding.kl(moments).mean()

    def error(self, params):
        """A mean over pixels, without noise."""
        guess = self.x @ params["encode"] @ params["decode"]
        options = {"kind": "l2", "mean": True}
        return autoencoding.reconstruction(self.x, guess, **options).mean()

    def trained(self, loss, *, fixed=(), steps=2000, rate=0.03):
        """Full-batch Adam; returns parameters and all losses on the way."""
        schedule = optax.cosine_decay_schedule(rate, steps)
        rule = optax.adam(schedule, b2=0.99)
        # Each parameter moves in units of its size.
        scale = {
            k: jnp.maximum(jnp.abs(v).mean(), 1e-3) * 10 for k, v in self.params.items()
        }
        scale |= {"s": 1.0, "log_d": 1.0}

        def at(free):
            whole = {k: v * scale[k] for k, v in free.items()}
            return loss(whole | {k: self.params[k] for k in fixed})

        def step(carry, _):
            free, memory = carry
            value, slope = jax.value_and_grad(at)(free)
            update, memory = rule.update(slope, memory)
            return (optax.apply_updates(free, update), memory), value

        @jax.jit
        def run():
            free = {k: v / scale[k] for k, v in self.params.items()}
            (free, _), values = jax.lax.scan(step, (free, rule.init(free)), None, steps)
            return free, values

        free, values = run()
        whole = {k: v * scale[k] for k, v in free.items()}
        return whole | {k: self.params[k] for k in fixed}, np.asarray(values)


@pytest.mark.usefixtures("x64")
def test_a_linear_vae_reaches_probabilistic_pca_on_the_digits_and_never_passes_it():
    covariance, k = digits(), 8
    values = np.linalg.eigvalsh(covariance)[::-1]
    rest = values[k:].mean()
    best = 0.5 * (
        64 * LOG_2PI + np.log(values[:k]).sum() + (64 - k) * np.log(rest) + 64
    )
    bits = 1 / (64 * np.log(2))
    assert abs(best * bits - 7.6729) < 1e-4
    vae = Linear(covariance, k)
    params, passed = vae.trained(vae.elbo)
    assert passed.min() > best * (1 - 1e-9)
    assert (passed[-1] - best) * bits < 0.002
    rate = autoencoding.kl(vae.moments(params)).mean() / np.log(2)
    assert abs(rate - 14.68) < 0.1


@pytest.mark.usefixtures("x64")
def test_latents_are_used_just_where_the_data_vary_more_than_beta_times_the_noise():
    values = np.array([9.0, 6.0, 3.0, 1.6, 0.7, 0.3])
    vae = Linear(rotated(values), 6)
    vae.params["s"] = jnp.zeros(())
    for beta, active in ((0.5, 5), (1.0, 4), (4.0, 2)):
        params, _ = vae.trained(functools.partial(vae.elbo, beta=beta), fixed=("s",))
        lengths = np.sort((params["decode"] ** 2).sum(axis=1))[::-1]
        np.testing.assert_allclose(
            lengths, np.maximum(values - beta, 0), atol=0.02, err_msg=str(beta)
        )
        assert (lengths > 0.1).sum() == active


@pytest.mark.usefixtures("x64")
def test_a_linear_autoencoder_is_pca():
    covariance = rotated([5.0, 3.0, 1.0, 0.6, 0.2, 0.1])
    plain = Linear(covariance, 2)
    params, passed = plain.trained(plain.error)
    best = 1.9 / 6
    assert passed.min() > best * (1 - 1e-9)
    assert passed[-1] < best + 1e-6
    _, vectors = np.linalg.eigh(covariance)
    angles = scipy.linalg.subspace_angles(vectors[:, -2:], params["decode"].T)
    assert angles.max() < 1e-3


def test_elbo_is_below_importance_sampling_and_that_below_the_exact_likelihood():
    """One latent and a bent decoder: the integral over z is a sum on a fine grid."""
    rng = np.random.default_rng(0)
    x = np.round(rng.uniform(60, 190, (5, 3))) / 127.5 - 1
    mean, log_variance = x @ np.array([[1.0], [-0.5], [0.2]]), np.full((5, 1), -1.5)
    spread = np.log(0.2**2)

    def decode(z):
        return np.concatenate([np.tanh(z), np.sin(z), 0.3 * z**2 - 0.2], axis=-1)

    def log_p(z):
        """log p(x, z) of each image, by SciPy."""
        centre = decode(z)
        high, low = (
            scipy.stats.norm.cdf(x + edge, centre, 0.2) for edge in (1 / 255, -1 / 255)
        )
        return (
            np.log(np.maximum(high - low, 1e-300)).sum(-1)
            + scipy.stats.norm.logpdf(z)[..., 0]
        )

    grid = np.linspace(-8, 8, 8001)[:, None, None] + np.zeros((1, 5, 1))
    exact = scipy.special.logsumexp(log_p(grid), axis=0) + np.log(16 / 8000)
    z = mean + np.exp(0.5 * log_variance) * rng.normal(size=(64, 5, 1))
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(0.5 * log_variance))[..., 0]
    importance = scipy.special.logsumexp(log_p(z) - log_q, axis=0) - np.log(64)
    options = jnp.asarray(spread), (jnp.asarray(mean), jnp.asarray(log_variance))
    draw = jax.vmap(lambda guess: autoencoding.elbo(jnp.asarray(x), guess, *options))
    bits = jax.tree.map(np.asarray, draw(jnp.asarray(decode(z))))
    elbo = -bits.total.mean(axis=0) * 3 * np.log(2)
    assert np.all(elbo < importance)
    assert np.all(importance < exact + 0.1)
    # The same terms by SciPy, but for the draws in the KL divergence.
    error = (log_p(z) - log_q).std(axis=0) / 8
    assert np.all(abs(elbo - (log_p(z) - log_q).mean(axis=0)) < 5 * error + 0.01)
    np.testing.assert_allclose(bits.total, bits.reconstruction + bits.kl, rtol=1e-6)


def test_free_bits_cost_nothing_until_they_are_used():
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal([0.01, 1.0, 3.0], 0.01, (4, 2, 2, 3)), jnp.float32)
    moments = mean, jnp.zeros_like(mean)
    channels = losses.normal_kl(*moments, 0 * mean, 0 * mean).sum(axis=(1, 2))
    found, slope = jax.value_and_grad(
        lambda mean: autoencoding.kl((mean, moments[1]), free=1.0).sum()
    )(mean)
    np.testing.assert_allclose(found, 4 * 1.0 + channels[:, 1:].sum(), rtol=1e-5)
    assert np.all(slope[..., 0] == 0)
    np.testing.assert_allclose(slope[..., 1:], mean[..., 1:], rtol=1e-5)
    np.testing.assert_allclose(
        autoencoding.kl(moments), channels.sum(axis=1), rtol=1e-6
    )


def test_a_learned_scalar_ends_at_the_log_of_the_mean_error():
    """Where the derivative of sum(error e^-s + s) by s is 0."""
    rng = np.random.default_rng(0)
    x, guess = (jnp.asarray(rng.normal(size=(3, 4, 4, 2))) for _ in range(2))
    for kind, power in (("l1", 1), ("l2", 2)):
        s = np.log((abs(x - guess) ** power).mean())
        slope = jax.grad(
            lambda s, kind=kind: autoencoding.reconstruction(
                x, guess, s, kind=kind
            ).sum()
        )(s)
        assert abs(slope) < 1e-3
        total = autoencoding.reconstruction(x, guess, kind=kind)
        mean = autoencoding.reconstruction(x, guess, kind=kind, mean=True)
        np.testing.assert_allclose(total, 32 * mean, rtol=1e-6)


def test_the_discriminator_and_the_decoder_pull_against_each_other():
    real, fake = jnp.array([[0.5, 3.0]]), jnp.array([[-0.25, -2.0]])
    np.testing.assert_allclose(autoencoding.hinge(real, fake), [0.5 * (0.25 + 0.375)])
    slope = jax.grad(lambda f: autoencoding.hinge(real, f)[0])(fake)
    against = jax.grad(lambda f: autoencoding.adversarial(f)[0])(fake)
    np.testing.assert_allclose(slope, [[0.25, 0.0]])
    np.testing.assert_allclose(against, [[-0.5, -0.5]])
    weight = autoencoding.adaptive_weight
    np.testing.assert_allclose(weight(3 * fake, -fake), 1.5, rtol=1e-3)
    assert weight(fake, 0 * fake) == 0.5 * 1e4
    assert jax.grad(weight)(fake, real).sum() == 0


def test_unknown_errors_are_refused():
    x = jnp.zeros([1, 2])
    with pytest.raises(ValueError, match="one of l1, l2; got 'l3'"):
        autoencoding.reconstruction(x, x, kind="l3")
