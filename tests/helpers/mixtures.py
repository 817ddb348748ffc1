"""Mixtures of Gaussians as data: what the best network says of them, at any level.

In NumPy float64 where they are set up; the denoiser is of arrays, and knows a schedule
as the levels that it gives: discrete or continuous.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from diffusion_jax import gaussian


class Mixture:
    """x0 ~ sum_k weights_k N(means_k, covs_k), an image of `shape` with d pixels."""

    def __init__(self, weights, means, covs, shape):
        self.weights = np.asarray(weights, np.float64)
        self.means = np.asarray(means, np.float64).reshape(len(self.weights), -1)
        self.covs, self.shape = np.asarray(covs, np.float64), tuple(shape)
        self.spread, self.basis = np.linalg.eigh(self.covs)

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def cov(self):
        off = self.means - self.mean
        inner = np.einsum("k,kij->ij", self.weights, self.covs)
        return inner + np.einsum("k,ki,kj->ij", self.weights, off, off)

    def denoiser(self, made):
        """E[x0 | x_t] and E[eps | x_t], by Bayes' rule over the components."""

        def denoise(x_t, t):
            level = made(jnp.broadcast_to(t, x_t.shape[:1]))
            dtype = x_t.dtype
            # Bases side by side, [d, K d]: a product for all components at once.
            size = self.means.shape[1]
            aside = self.basis.transpose(1, 0, 2).reshape(size, -1)
            turned = np.einsum("kd,kde->ke", self.means, self.basis)
            weights, means, spread, aside, turned = (
                jnp.asarray(a, dtype)
                for a in (self.weights, self.means, self.spread, aside, turned)
            )
            alpha, sigma = (
                a.astype(dtype)[:, None, None] for a in (level.alpha, level.sigma)
            )
            # [B, K, d], in each component's own axes.
            off = (x_t.reshape(len(x_t), -1) @ aside).reshape(-1, *spread.shape)
            off = off - alpha * turned[None]
            variance = alpha**2 * spread[None] + sigma**2
            share = jnp.ones_like(off[..., 0])
            if len(weights) > 1:
                far = (off**2 / variance + jnp.log(variance)).sum(axis=-1)
                share = jax.nn.softmax(jnp.log(weights)[None] - 0.5 * far, axis=-1)

            def back(a):
                return (share[..., None] * a).reshape(len(x_t), -1) @ aside.T

            x0 = share @ means + back(off * alpha * spread[None] / variance)
            eps = back(off * sigma / variance)
            return gaussian.Prediction(x0.reshape(x_t.shape), eps.reshape(x_t.shape))

        return denoise

    def flow(self, x_t, level, end):
        """Where the exact probability flow takes x_t of one component: its quantile."""
        if len(self.weights) != 1:
            raise ValueError("the flow of a mixture has no closed form")
        x_t = np.asarray(x_t, np.float64)
        alpha, sigma = (float(level.alpha), float(level.sigma))
        off = (x_t.reshape(len(x_t), -1) - alpha * self.means[0]) @ self.basis[0]
        to = float(end.alpha) ** 2 * self.spread[0] + float(end.sigma) ** 2
        scale = np.sqrt(to / (alpha**2 * self.spread[0] + sigma**2))
        out = float(end.alpha) * self.means[0] + (off * scale) @ self.basis[0].T
        return out.reshape(x_t.shape)

    def logp(self, x_t, level):
        """Log density of the marginal of one component, nats, [B]."""
        alpha, sigma = (float(level.alpha), float(level.sigma))
        cov = alpha**2 * self.cov + sigma**2 * np.eye(len(self.cov))
        flat = np.asarray(x_t, np.float64).reshape(len(x_t), -1)
        return scipy.stats.multivariate_normal(alpha * self.mean, cov).logpdf(flat)

    def draw(self, count, seed=0):
        """Samples of one component, [count, *shape]."""
        rng = np.random.default_rng(seed)
        flat = rng.multivariate_normal(self.means[0], self.covs[0], count)
        return jnp.asarray(flat.reshape(count, *self.shape))

    def shares(self, x):
        """The share of the samples that lies nearest to each mean, [K]."""
        flat = x.reshape(len(x), 1, -1)
        nearest = ((flat - self.means) ** 2).sum(axis=-1).argmin(axis=1)
        return np.bincount(nearest, minlength=len(self.weights)) / len(x)


def normal(mean, cov):
    """One component: an image of mean.shape, with `cov` over its pixels."""
    return Mixture([1.0], [np.ravel(mean)], [cov], np.shape(mean))


def one(shape=(2, 2, 1)):
    """Correlated pixels with a mean: standard deviations from 0.2 to 0.6."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    root = rng.normal(size=(size, size)) * 0.4 / np.sqrt(size)
    mean = rng.uniform(-0.6, 0.6, size).reshape(shape)
    return normal(mean, root @ root.T + 0.04 * np.eye(size))


def two(shape=(2, 2, 1)):
    """Two components far apart, one three times as heavy."""
    size = int(np.prod(shape))
    first = np.linspace(0.4, 0.8, size)
    covs = [0.04 * np.eye(size), 0.02 * np.eye(size) + 0.02]
    return Mixture([0.25, 0.75], [first, -first], covs, shape)
