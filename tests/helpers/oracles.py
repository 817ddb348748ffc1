"""Closed-form truths, in NumPy float64 and in DDPM's own terms.

`NumpyDDPM` is written from the paper and from the facts about its authors' code: betas,
alpha_bar, posterior coefficients. It knows nothing of log-SNR. Time is the paper's, t
in 1..T (the authors' index is t - 1), and every table has a row for t = 0, the data.
"""

from functools import cache

import numpy as np
import scipy.special

from diffusion_jax import schedule

T = 1000


def betas_of(name, num_steps=T):
    """The forward variances of a schedule as its authors define them, [T]."""
    start, end = 1e-4, 0.02
    steps = np.arange(num_steps)
    share = steps / max(num_steps - 1, 1)
    if name == "linear":
        return start + (end - start) * share
    if name == "quad":
        return (start**0.5 + (end**0.5 - start**0.5) * share) ** 2
    if name == "const":
        return np.full(num_steps, end)
    if name == "jsd":
        return 1.0 / (num_steps - steps)
    if name in ("warmup10", "warmup50"):
        rise = num_steps * int(name[-2:]) // 100
        rising = start + (end - start) * steps / max(rise - 1, 1)
        return np.where(steps < rise, rising, end)
    share = np.arange(num_steps + 1) / num_steps
    if name == "cosine":
        alpha_bar = np.cos((share + 0.008) / 1.008 * np.pi / 2) ** 2
    if name == "sigmoid":
        curve = scipy.special.expit(-3 + 6 * share)
        alpha_bar = (curve[-1] - curve) / (curve[-1] - curve[0])
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES = {
    "linear": schedule.linear,
    "quad": schedule.quad,
    "const": schedule.const,
    "jsd": schedule.jsd,
    "warmup10": lambda n=T: schedule.warmup(n, fraction=0.1),
    "warmup50": lambda n=T: schedule.warmup(n, fraction=0.5),
    "cosine": schedule.cosine,
    "sigmoid": schedule.sigmoid,
    "from_betas": lambda n=T: schedule.from_betas(betas_of("linear", n)),
}


class NumpyDDPM:
    """DDPM for one example a row: x [N, ...] at times t [N], each from t to s = t - 1.

    A jump to an earlier s has 1 - alpha_bar_t / alpha_bar_s in the place of beta_t.
    """

    def __init__(self, betas):
        betas = np.asarray(betas, np.float64)
        self.num_steps = len(betas)
        self.betas = np.concatenate([[np.nan], betas])
        self.alphas_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
        # 1 - alpha_bar loses its digits at small t. The variance of the forward chain,
        # Var[x_t] = (1 - beta_t) Var[x_{t-1}] + beta_t from x_0 fixed, does not.
        self.noise = np.zeros(self.num_steps + 1)
        for t, beta in enumerate(betas, 1):
            self.noise[t] = (1 - beta) * self.noise[t - 1] + beta
        self.alphas, self.sigmas = np.sqrt(self.alphas_bar), np.sqrt(self.noise)

    @classmethod
    def named(cls, name, num_steps=T):
        return cls(betas_of("linear" if name == "from_betas" else name, num_steps))

    def beta(self, t, s=None):
        """Variance of q(x_t | x_s)."""
        s = t - 1 if s is None else s
        jump = 1 - self.alphas_bar[t] / self.alphas_bar[s]
        return np.where(np.equal(s, t - 1), self.betas[t], jump)

    def coefficients(self, t, s=None):
        """Those of x0 and x_t in the posterior mean (Eq. 7)."""
        s = t - 1 if s is None else s
        beta = self.beta(t, s)
        c0 = self.alphas[s] * beta / self.noise[t]
        return c0, np.sqrt(1 - beta) * self.noise[s] / self.noise[t]

    def variance(self, kind, t, s=None):
        """fixedsmall: the posterior's (Eq. 7); fixedlarge: beta_t."""
        s = t - 1 if s is None else s
        beta = self.beta(t, s)
        return beta * self.noise[s] / self.noise[t] if kind == "small" else beta

    def log_variance(self, kind, t):
        """Its logarithm; both kinds have the posterior variance of t = 2 at t = 1."""
        first, rest = self.variance("small", 2), self.variance(kind, np.maximum(t, 2))
        return np.log(np.where(np.equal(t, 1), first, rest))

    def q_sample(self, x0, eps, t):
        return _rows(self.alphas[t], x0) * x0 + _rows(self.sigmas[t], x0) * eps

    def posterior_mean(self, x0, x_t, t):
        c0, ct = self.coefficients(t)
        return _rows(c0, x0) * x0 + _rows(ct, x0) * x_t

    def x0_from_eps(self, x_t, eps, t):
        alphas_bar = _rows(self.alphas_bar[t], x_t)
        noise = _rows(self.noise[t], x_t)
        return np.sqrt(1 / alphas_bar) * x_t - np.sqrt(noise / alphas_bar) * eps

    def bound_term(self, x0, x_t, x0_guess, t, model_log_variance):
        """L_{t-1} for t > 1 and L_0 for t = 1, in bits/dim, [N]."""
        truth = self.posterior_mean(x0, x_t, t)
        guess = self.posterior_mean(x0_guess, x_t, t)
        small = _rows(self.log_variance("small", t), x0)
        kl = normal_kl(truth, small, guess, model_log_variance)
        nll = decoder_nll(x0, guess, model_log_variance)
        return bits_per_dim(np.where(_rows(np.equal(t, 1), x0), nll, kl))

    def prior(self, x0):
        """L_T in bits/dim, [N]."""
        mean = self.alphas[-1] * x0
        noise = np.log(self.noise[-1])
        return bits_per_dim(normal_kl(mean, noise, np.zeros(()), np.zeros(())))


@cache
def oracle(name):
    return NumpyDDPM.named(name)


def said(kind, x0, eps, alpha, sigma, c0, ct):
    """What a perfect network of this kind puts out, by the coefficients of a step."""
    x_t = alpha * x0 + sigma * eps
    # Table 1 of Karras et al. 2022 at x = x_t / alpha, with 0.5 for sigma_data.
    x, ratio = x_t / alpha, sigma / alpha
    skip, out = 0.25 / (ratio**2 + 0.25), 0.5 * ratio / np.sqrt(ratio**2 + 0.25)
    return {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "edm": (x0 - skip * x) / out,
        "velocity": eps - x0,
        "mean": c0 * x0 + ct * x_t,
    }[kind]


def output_of(kind, truth, x0, eps, t):
    numbers = truth.alphas[t], truth.sigmas[t], *truth.coefficients(t)
    return said(kind, x0, eps, *(wide(a) for a in numbers))


def draw(seed, *shape):
    """Normal numbers without rounding error in float32."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return numbers.astype(np.float32).astype(np.float64)


def wide(a):
    return np.reshape(a, (-1, 1, 1))


def normal_kl(mean1, log1, mean2, log2):
    distance = (mean1 - mean2) ** 2 * np.exp(-log2)
    return 0.5 * (-1 + log2 - log1 + np.exp(log1 - log2) + distance)


def decoder_nll(x0, mean, log_variance, *, exact=False):
    """Eq. 13 in nats; the distribution function is the authors' tanh unless exact."""

    def cdf(x):
        if exact:
            return scipy.special.ndtr(x)
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    scale = np.exp(0.5 * log_variance)
    above = np.where(x0 > 0.999, 1, cdf((x0 + 1 / 255 - mean) / scale))
    below = np.where(x0 < -0.999, 0, cdf((x0 - 1 / 255 - mean) / scale))
    return -np.log(np.maximum(above - below, 1e-12))


def bits_per_dim(nats):
    return nats.reshape(len(nats), -1).mean(axis=1) / np.log(2)


def _rows(a, x):
    a = np.asarray(a)
    return a.reshape(a.shape + (1,) * (np.ndim(x) - a.ndim))


def ancestral(data, ddpm, t, s):
    """Slope [d, d] and offset [d] of E[x_s | x_t] in x_t, for data of one component.

    With the best network there is a step of ancestral sampling is affine.
    """
    (c0, ct), alpha = ddpm.coefficients(t, s), ddpm.alphas[t]
    unit = np.eye(len(data.cov))
    spread = alpha**2 * data.cov + ddpm.noise[t] * unit
    gain = alpha * data.cov @ np.linalg.inv(spread)
    return c0 * gain + ct * unit, c0 * (data.mean - alpha * gain @ data.mean)
