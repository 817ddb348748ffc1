"""Labels, guidance and the estimated variance, run as a person runs them."""

import functools
import json

import numpy as np
import pytest
import small_run

from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.measure import bound
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build, chains, fitting
from experiments import eval_nll, sample, train, train_noisy_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conditional")


@pytest.fixture(scope="module")
def labelled(folder):
    # Long enough for the label to matter.
    flags = ["--train.steps", "60", "--optimizer.learning-rate", "0.02"]
    argv = ["digits_conditional", *small_run.SMALL, *flags, "--output", str(folder)]
    assert train.main([*argv, "--optimizer.ema-decay", "0.9"]) == 0
    return runs.Run(folder / "digits_conditional")


@pytest.fixture(autouse=True)
def little_is_looked_at(monkeypatch):
    """For a variance and for a classifier, whose worth is not judged here."""
    monkeypatch.setattr(opening, "IMAGES", 128)
    monkeypatch.setattr(fitting, "BATCH", 32)
    monkeypatch.setattr(train_noisy_classifier, "accuracy_at", lambda *_: 1.0)


def draw(run, out, *flags, count=12):
    argv = [str(run.folder), "--count", str(count), "--format", "npz"]
    assert sample.main([*argv, "--out", str(out / "x.npz"), *flags]) == 0
    return np.load(out / "x.npz")["images"].astype(int)


def test_all_classes_are_drawn_in_turn(labelled, tmp_path):
    mixed = draw(labelled, tmp_path)
    cut = draw(labelled, tmp_path, "--batch-size", "6")
    assert np.abs(cut - mixed).max() <= 1
    one = draw(labelled, tmp_path, "--label", "0")
    far = np.abs(mixed - one).reshape(12, -1).max(axis=1)
    own = np.arange(12) % 10 == 0
    assert far[own].max() <= 1
    # Of the others a network this small may draw one alike.
    assert np.sum(far[~own] > 1) > 0.6 * np.sum(~own)


def test_guidance_starts_at_one_and_moves_on(labelled, tmp_path):
    label = ["--label", "0"]
    none = draw(labelled, tmp_path, *label)
    one = draw(labelled, tmp_path, *label, "--guidance", "1")
    assert np.abs(none - one).max() <= 1
    three = draw(labelled, tmp_path, *label, "--guidance", "3")
    assert np.abs(none - three).mean() > 0.5
    # Nowhere on the chain.
    interval = ["--guidance-interval", "1e8", "1e9"]
    nowhere = draw(labelled, tmp_path, *label, "--guidance", "3", *interval)
    assert np.abs(nowhere - none).max() <= 1


def test_the_bound_is_of_the_image_with_its_label(labelled, monkeypatch):
    argv = [str(labelled.folder), "--max-images", "8"]
    assert eval_nll.main(argv) == 0
    written = json.loads((labelled.folder / "eval/nll_train.json").read_text())
    config = runs.read_config(labelled)
    drawable = opening.load(config, labelled, weights.Weights())[0]
    dataset = build.load_data(config)
    wrong = dataset._replace(labels=(dataset.labels + 1) % 10)
    chosen = datasets.choose(len(dataset.images), 8, 0)
    right, other = (
        bound.evaluate(config, drawable, labels, chosen).totals
        for labels in (dataset, wrong)
    )
    assert np.mean(right) == pytest.approx(written["bits_per_dim"], rel=1e-6)
    hold_apart(right, other)

    # By the flow of a network that is quick to compile, and told as the other is.
    monkeypatch.setattr(chains, "given_labels", small_run.told)
    hold_apart(
        *(
            bound.evaluate_ode(config, drawable, labels, chosen, tolerance=1e-2)[:, 0]
            for labels in (dataset, wrong)
        )
    )


def hold_apart(right, other):
    """Each image is told another label, and each number changes."""
    assert np.isfinite([right, other]).all()
    assert np.abs(np.subtract(right, other)).min() > 1e-5


def test_a_classifier_guides_a_network_without_labels(trained, tmp_path):
    with pytest.raises(ConfigError, match="train_noisy_classifier"):
        draw(trained, tmp_path, "--label", "3", "--classifier-guidance", "2")
    argv = [str(trained.folder), "--steps", "30"]
    assert train_noisy_classifier.main(argv) == 0
    # A step takes long: on CPUs little is as slow as a gradient of convolutions.
    few = functools.partial(draw, trained, tmp_path, "--steps", "2", count=8)
    none = few()
    off = few("--classifier-guidance", "0")
    np.testing.assert_array_equal(off, none)
    one, other = (
        few("--label", label, "--classifier-guidance", "5") for label in ("3", "5")
    )
    assert np.abs(one - none).mean() > 0.5
    assert np.abs(one - other).mean() > 0.5
    with pytest.raises(ConfigError, match=r"label must be below 10.*got 10"):
        draw(trained, tmp_path, "--label", "10", "--classifier-guidance", "2")


def test_the_analytic_variance_is_estimated_once(trained, tmp_path):
    first = draw(trained, tmp_path, "--variance", "analytic", "--steps", "5")
    path = trained.folder / "eval" / "x0_variance.json"
    table = np.array(json.loads(path.read_text())["table"])
    assert table.shape == (21,)
    assert table[0] == 0
    assert np.all((table[1:] > 0) & (table[1:] <= 1))
    # A network that has learned little is further off the more noise there is.
    assert table[-1] > table[1]
    written = path.stat().st_mtime_ns
    again = draw(trained, tmp_path, "--variance", "analytic", "--steps", "5")
    assert path.stat().st_mtime_ns == written
    np.testing.assert_array_equal(first, again)
    small = draw(trained, tmp_path, "--variance", "small", "--steps", "5")
    assert np.any(first != small)


def test_the_analytic_variance_has_the_best_bound(trained):
    bits = {}
    for variance in ("small", "large", "analytic"):
        argv = [str(trained.folder), "--max-images", "32", "--variance", variance]
        assert eval_nll.main(argv) == 0
        result = json.loads((trained.folder / "eval/nll_train.json").read_text())
        bits[variance] = result["bits_per_dim"]
    assert bits["analytic"] < min(bits["small"], bits["large"])


def test_labels_must_fit_the_network(folder):
    argv = ["digits", *small_run.SMALL, "--output", str(folder), "--name", "few"]
    with pytest.raises(
        ConfigError,
        match=r"labels must be in 0..4.*got 0..9. In .*, set --net.classes to 10",
    ):
        train.main([*argv, "--net.classes", "5"])
