"""The Inception score against closed forms, and against the same in loops."""

import math

import numpy as np
import pytest
import scipy.special

from diffusion_jax.evaluation import metrics


@pytest.mark.parametrize("classes", [2, 10, 1008])
def test_inception_score_of_certain_classes_is_their_number(classes):
    certain = np.eye(classes)[np.arange(4 * classes) % classes]
    mean, std = metrics.inception_score(certain, splits=4, from_logits=False)
    assert mean == pytest.approx(classes, rel=1e-12)
    assert std < 1e-9
    logits = 1e4 * certain.astype(np.float32)
    assert metrics.inception_score(logits, splits=4)[0] == pytest.approx(classes)


def test_inception_score_of_equal_predictions_is_one():
    logits = np.tile(np.random.default_rng(0).normal(size=20), (30, 1))
    mean, std = metrics.inception_score(logits)
    assert mean == pytest.approx(1, abs=1e-13)
    assert std < 1e-13


def test_inception_score_of_two_classes_with_doubt():
    """Half the samples (p, 1 - p), half the other way: exp(log 2 - H(p))."""
    p = 0.9
    rows = np.array([[p, 1 - p], [1 - p, p]] * 50)
    true = 2 * p**p * (1 - p) ** (1 - p)
    mean, _ = metrics.inception_score(rows, from_logits=False)
    assert mean == pytest.approx(true, rel=1e-12)
    mean, _ = metrics.inception_score(np.log(rows) + 1e3)
    assert mean == pytest.approx(true, rel=1e-12)


def naive_inception_score(logits, splits):
    """As the original code has it: slices, a mean of divergences, an exponential."""
    probs = scipy.special.softmax(logits.astype(np.float64), axis=1)
    scores = []
    for i in range(splits):
        part = probs[i * len(probs) // splits : (i + 1) * len(probs) // splits]
        marginal = part.mean(axis=0)
        total = 0.0
        for row in part:
            for p, q in zip(row, marginal, strict=True):
                total += p * (math.log(p) - math.log(q))
        scores.append(math.exp(total / len(part)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_inception_score_is_that_of_loops(splits):
    logits = (3 * np.random.default_rng(0).normal(size=(103, 7))).astype(np.float32)
    got = metrics.inception_score(logits, splits=splits)
    np.testing.assert_allclose(got, naive_inception_score(logits, splits), rtol=1e-12)


def test_inception_score_of_a_sorted_file_needs_the_shuffle():
    certain = np.eye(10)[np.arange(1000) // 100]
    options = {"from_logits": False, "splits": 10}
    assert metrics.inception_score(certain, **options)[0] == pytest.approx(1)
    shuffled = metrics.inception_score(certain, seed=1, **options)
    assert 8.5 < shuffled[0] < 10
    assert shuffled == metrics.inception_score(certain, seed=1, **options)
    assert shuffled != metrics.inception_score(certain, seed=2, **options)


# What is refused.

X, OF_PROBABILITIES = np.zeros((4, 3)), {"splits": 1, "from_logits": False}
REFUSED = [
    (lambda: metrics.inception_score(X), "10"),
    (lambda: metrics.inception_score(X, splits=0), "0"),
    (lambda: metrics.inception_score(X - 1, **OF_PROBABILITIES), "a least one of -1"),
    (lambda: metrics.inception_score(X, **OF_PROBABILITIES), "from 0 to 0"),
]


def test_bad_input_is_refused_with_advice(refuses):
    for call, got in REFUSED:
        with refuses(got):
            call()
