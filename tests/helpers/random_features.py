"""Features and covariances drawn at random, and their statistics."""

import numpy as np

from diffusion_jax.evaluation import moments


def features(seed=0, count=1000, dimension=12, shift=0.0):
    """Correlated float32 features whose mean is `shift` of their deviations from 0."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dimension, dimension)) / dimension**0.5
    return (rng.normal(size=(count, dimension)) @ mix + shift).astype(np.float32)


def streamed(x, size):
    stats = moments.init(x.shape[1])
    for i in range(0, len(x), size):
        stats = moments.update(stats, x[i : i + size])
    return stats


def covariance(rng, dimension, rank=None):
    root = rng.normal(size=(dimension, rank or dimension))
    return root @ root.T / root.shape[1]


def rotation(rng, dimension):
    return np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
