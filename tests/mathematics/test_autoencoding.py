"""Losses of autoencoders against what linear ones are known to reach.

A linear autoencoder of Gaussian noise is probabilistic PCA (Tipping and Bishop 1999;
Lucas et al. 2019), whose optima are sums over eigenvalues l_i of the data's covariance.
Data and noise are points with just those second moments, so that no mean is estimated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
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

    def elbo(self, params, beta):
        moments = self.moments(params)
        return self.nll(params, moments) + beta * autoencoding.kl(moments).mean()

    def trained(self, betas, fixed=()):
        """Full-batch Adam for each beta; returns parameters and losses on the way."""
        rule = optax.adam(optax.cosine_decay_schedule(0.03, 2000), b2=0.99)
        # Each parameter moves in units of its size.
        scale = {
            k: jnp.maximum(jnp.abs(v).mean(), 1e-3) * 10 for k, v in self.params.items()
        }
        scale |= {"s": 1.0, "log_d": 1.0}

        def whole(free):
            return {k: v * scale[k] for k, v in free.items()} | {
                k: self.params[k] for k in fixed
            }

        @jax.jit
        @jax.vmap
        def run(beta):
            def step(carry, _):
                free, memory = carry
                value, slope = jax.value_and_grad(
                    lambda free: self.elbo(whole(free), beta)
                )(free)
                update, memory = rule.update(slope, memory)
                return (optax.apply_updates(free, update), memory), value

            free = {k: v / scale[k] for k, v in self.params.items()}
            (free, _), values = jax.lax.scan(step, (free, rule.init(free)), None, 2000)
            return whole(free), values

        return run(jnp.asarray(betas))


@pytest.mark.usefixtures("x64")
def test_a_linear_vae_reaches_probabilistic_pca_on_the_digits_and_never_passes_it():
    # Of the digits on 0..255, made continuous by uniform noise.
    pixels = datasets.load("digits").images.reshape(-1, 64).astype(float)
    covariance, k = np.cov(pixels.T, ddof=0) + np.eye(64) / 12, 8
    values = np.linalg.eigvalsh(covariance)[::-1].copy()
    values[k:] = values[k:].mean()
    best = 0.5 * (64 * LOG_2PI + np.log(values).sum() + 64)
    bits = 1 / (64 * np.log(2))
    assert abs(best * bits - 7.6729) < 1e-4
    vae = Linear(covariance, k)
    params, passed = (jax.tree.map(lambda a: a[0], both) for both in vae.trained([1.0]))
    assert passed.min() > best * (1 - 1e-9)
    assert (passed[-1] - best) * bits < 0.002
    rate = autoencoding.kl(vae.moments(params)).mean() / np.log(2)
    assert abs(rate - 14.68) < 0.1


@pytest.mark.usefixtures("x64")
def test_latents_are_used_just_where_the_data_vary_more_than_beta_times_the_noise():
    values = np.array([9.0, 6.0, 3.0, 1.6, 0.7, 0.3])
    turn = scipy.stats.ortho_group.rvs(6, random_state=np.random.default_rng(3))
    vae = Linear(turn @ np.diag(values) @ turn.T, 6)
    vae.params["s"] = jnp.zeros(())
    betas = np.array([0.5, 1.0, 4.0])
    params, _ = vae.trained(betas, fixed=("s",))
    lengths = np.sort((params["decode"] ** 2).sum(axis=-1))[:, ::-1]
    left = np.maximum(values - betas[:, None], 0)
    np.testing.assert_allclose(lengths, left, atol=0.02)


def test_elbo_is_the_sum_of_its_terms_and_below_the_exact_likelihood():
    """One latent and a bent decoder: the integral over z is a sum on a fine grid."""
    rng = np.random.default_rng(0)
    x = np.round(rng.uniform(60, 190, (5, 3))) / 127.5 - 1
    mean, log_variance = x @ np.array([[1.0], [-0.5], [0.2]]), np.full((5, 1), -1.5)
    spread = np.log(0.2**2)

    def decode(z):
        return np.concatenate([np.tanh(z), np.sin(z), 0.3 * z**2 - 0.2], axis=-1)

    def nll(z, **options):
        return oracles.decoder_nll(x, decode(z), spread, **options).sum(axis=-1)

    grid = np.linspace(-8, 8, 8001)[:, None, None] + np.zeros((1, 5, 1))
    logp = scipy.stats.norm.logpdf(grid)[..., 0] - nll(grid, exact=True)
    exact = scipy.special.logsumexp(logp, axis=0) + np.log(16 / 8000)
    z = mean + np.exp(0.5 * log_variance) * rng.normal(size=(64, 5, 1))
    moments = jnp.asarray(mean), jnp.asarray(log_variance)
    bits = jax.vmap(
        lambda guess: autoencoding.elbo(
            jnp.asarray(x), guess, spread, moments, beta=0.5
        )
    )(jnp.asarray(decode(z)))
    total, told, kl = (np.asarray(a) * 3 * np.log(2) for a in bits)
    expected = oracles.normal_kl(mean, log_variance, 0, 0).sum(axis=1)
    np.testing.assert_allclose(kl, np.broadcast_to(expected, (64, 5)), rtol=1e-5)
    np.testing.assert_allclose(told, nll(z), rtol=1e-4)
    np.testing.assert_allclose(total, told + 0.5 * kl, rtol=1e-6)
    assert np.all(-(told + kl).mean(axis=0) < exact)


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
    whole = channels.sum(axis=1)
    np.testing.assert_allclose(autoencoding.kl(moments), whole, rtol=1e-6)


def test_a_learned_scalar_ends_at_the_log_of_the_mean_error(refuses):
    """Where the derivative of sum(error e^-s + s) by s is 0."""
    rng = np.random.default_rng(0)
    x, guess = (jnp.asarray(rng.normal(size=(3, 4, 4, 2))) for _ in range(2))
    for kind, power in (("l1", 1), ("l2", 2)):

        def error(s=0.0, kind=kind, **options):
            return autoencoding.reconstruction(x, guess, s, kind=kind, **options)

        s = np.log((abs(x - guess) ** power).mean())
        assert abs(jax.grad(lambda s, error=error: error(s).sum())(s)) < 1e-3
        np.testing.assert_allclose(error(), 32 * error(mean=True), rtol=1e-6)
    with refuses("'l3'"):
        autoencoding.reconstruction(x, guess, kind="l3")


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
