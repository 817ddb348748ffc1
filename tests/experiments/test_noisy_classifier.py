"""The classifier of noisy images, its training and its file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_unets

from diffusion_jax import continuous, gaussian, guidance, schedule
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import replace, to_dict
from diffusion_jax.lab.wiring import guides
from diffusion_jax.nets.classifier import Classifier
from diffusion_jax.nets.noisy_classifier import NoisyClassifier
from experiments import train_noisy_classifier
from experiments.configs import digits

SMALL = NoisyClassifier(3, channels=8, width=8)


# The network.


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 32, 32, 3), (2, 3, 9, 2)])
def test_any_size_of_image(shape):
    net = NoisyClassifier(7)
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:1]))
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)
    assert (out.shape, out.dtype) == ((2, 7), jnp.float32)
    downs = [name for name in variables["params"] if name.startswith("down")]
    # Halved until neither side is above 4; so does the classifier of clean images.
    halved = {8: 1, 32: 3, 9: 2}[max(shape[1:3])]
    assert len(downs) == halved
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    judge = jax.eval_shape(Classifier(7).init, jax.random.key(0), images)["params"]
    assert len([name for name in judge if name.startswith("Conv")]) == 1 + halved


def test_examples_are_computed_on_their_own_and_time_matters():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 8, 1)), jnp.float32)
    params, t = (
        small_unets.parameters(SMALL, x, jnp.zeros(3)),
        jnp.array([3.0, 500.0, 999.0]),
    )
    run = jax.jit(lambda x, t: SMALL.apply({"params": params}, x, t))
    out = run(x, t)
    other = run(x.at[1].multiply(5.0), t)
    np.testing.assert_array_equal(out[jnp.array([0, 2])], other[jnp.array([0, 2])])
    assert np.abs(out - other).max() > 1e-3
    later = run(x, t + 100)
    assert np.all(np.abs(out - later).max(axis=1) > 1e-3)


def test_its_gradient_is_smooth(x64):
    """Finite differences of the gradient agree: relu would break them somewhere."""
    rng = np.random.default_rng(2)
    x, way = (jnp.asarray(rng.normal(size=(8, 4, 4, 1)), jnp.float32) for _ in "ab")
    params, t = (
        small_unets.parameters(SMALL, x, jnp.zeros(8)),
        jnp.linspace(0.0, 999.0, 8),
    )

    def slope(h):
        def total(h):
            return SMALL.apply({"params": params}, x + h * way, t)[:, 0].sum()

        return jax.grad(total)(h)

    slope = jax.jit(slope)
    steps = jnp.linspace(-0.05, 0.05, 201, dtype=jnp.float32)
    values = np.asarray(jax.lax.map(slope, steps), np.float64)
    jumps = np.abs(np.diff(values))
    # 200 steps of a smooth function are all of about one size; a kink is one of all.
    assert jumps.max() < 0.05 * np.ptp(values) + 1e-3


def test_wrong_input_is_refused(refuses):
    x, t, key = jnp.zeros([2, 8, 8, 1]), jnp.zeros(2), jax.random.key(0)
    with refuses("uint8 (2, 8, 8, 1)"):
        SMALL.init(key, x.astype(jnp.uint8), t)
    with refuses("float32 (8, 8, 1)"):
        SMALL.init(key, x[0], t)
    with refuses("()"):
        SMALL.init(key, x, t[0])
    with refuses("12"):
        SMALL.clone(channels=12).init(key, x, t)


# The command.


@jax.jit
def belief(params, label, levels, x_t, t):
    return guides.log_prob_of(params, label, levels)(x_t, t)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as training leaves it, but for its checkpoints."""
    found = runs.Run(tmp_path_factory.mktemp("runs") / "digits")
    runs.write_json(found.config, to_dict(replace(digits.CONFIG, "data", hold_out=0.0)))
    return found


@pytest.fixture(scope="module")
def trained(run):
    assert train_noisy_classifier.main([str(run.folder), "--steps", "50"]) == 0
    return guides.load(guides.path_of(run.folder))


def test_it_reads_digits_better_where_there_is_less_noise(trained):
    assert trained.path.name == "classifier_noisy.safetensors"
    assert trained.num_classes == 10
    assert list(trained.accuracy) == [100, 250, 500, 750]
    low, *_, high = trained.accuracy.values()
    assert low > 0.85
    assert 0.1 < high < 0.7


def test_the_accuracy_is_that_of_other_images(run, trained):
    """Held-out images, noised by the schedule of the run."""
    dataset, levels = datasets.load("digits"), schedule.cosine(1000)
    held = np.random.default_rng(0).permutation(1797)[: int(0.2 * 1797)]
    images, labels = dataset.images[held], dataset.labels[held]
    again = train_noisy_classifier.accuracy_at(
        trained.params, levels, 500, images, labels
    )
    assert again == trained.accuracy[500]
    # The belief in the right label says the same, at whatever noise is drawn.
    x0 = images.astype(np.float32) / 127.5 - 1
    t = jnp.full(len(x0), 500)
    x_t = gaussian.q_sample(x0, gaussian.normal(jax.random.key(5), x0.shape), levels(t))
    every = [belief(trained.params, k, levels, x_t, t) for k in range(10)]
    every = np.stack(every, axis=1)
    np.testing.assert_allclose(np.exp(every).sum(axis=1), 1, rtol=1e-5)
    assert abs((every.argmax(axis=1) == labels).mean() - again) < 0.1
    right = belief(trained.params, jnp.asarray(labels), levels, x_t, t)
    np.testing.assert_allclose(right, every[np.arange(len(t)), labels], rtol=1e-4)


def test_steps_and_real_time_are_one(trained):
    made, x_t = continuous.vp(), jnp.ones([2, 8, 8, 1])
    chain = continuous.discretize(made, 500)
    one = belief(trained.params, 3, chain, x_t, jnp.array([50, 350]))
    other = belief(trained.params, 3, made, x_t, jnp.array([0.1, 0.7]))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_images_are_seen_at_one_size_where_variance_explodes(trained):
    made, plain = continuous.ve(), continuous.vp()
    x_t, t = jnp.ones([1, 8, 8, 1]), jnp.array([0.9])
    seen = belief(trained.params, 3, made, float(made(0.9).sigma) * x_t, t)
    # sigma is above 20, so that alpha = 1 adds a thousandth to the size.
    np.testing.assert_allclose(
        seen, belief(trained.params, 3, plain, x_t, t), rtol=5e-3, atol=5e-3
    )


def test_it_guides(trained):
    """A step along the guidance makes the label likelier."""
    levels = schedule.cosine(1000)
    x_t = gaussian.normal(jax.random.key(0), (6, 8, 8, 1))
    t, label = jnp.full(6, 400), jnp.arange(6)
    log_prob = guides.log_prob_of(trained.params, label, levels)
    denoise = gaussian.denoiser(lambda x, t: 0 * x, levels, "x0")
    pred = jax.jit(guidance.classifier(denoise, log_prob, levels))(x_t, t)
    nearer = belief(trained.params, label, levels, x_t + 0.1 * pred.x0, t)
    assert np.all(nearer > belief(trained.params, label, levels, x_t, t))


def test_labels_beyond_the_classes(trained, refuses):
    levels, x_t = schedule.cosine(1000), jnp.ones([2, 8, 8, 1])
    for wrong in (10, -1):
        with refuses(f"values from {min(wrong, 0)} to {max(wrong, 0)}"):
            guides.log_prob_of(trained.params, [0, wrong], levels)

    for wrong, expected in (([0, 10], [False, True]), ([-1, 9], [True, False])):
        t = jnp.array([5, 5])
        out = belief(trained.params, jnp.array(wrong), levels, x_t, t)
        np.testing.assert_array_equal(np.isnan(out), expected)


def test_what_cannot_be_trained_or_read_is_refused(run, trained, tmp_path, refuses):
    unlabelled = datasets.load("digits")._replace(labels=None)
    with refuses("digits"):
        train_noisy_classifier.train(digits.CONFIG, run, unlabelled)
    content, path = trained.path.read_bytes(), tmp_path / trained.path.name
    path.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=r"; got .*Or train it: "):
        guides.load(path)
    path.write_bytes(content)
    again = guides.load(path)
    assert (again.sha256, again.accuracy) == (trained.sha256, trained.accuracy)
    assert not list(trained.path.parent.glob(".*"))


def test_a_run_in_continuous_time_has_its_chain(run):
    changed = dataclasses.replace(digits.CONFIG.diffusion, schedule="vp", num_steps=50)
    config = dataclasses.replace(digits.CONFIG, diffusion=changed)
    levels = train_noisy_classifier.levels_of(config, run)
    expected = continuous.vp()(jnp.linspace(0.0, 1.0, 51)[1:])
    np.testing.assert_allclose(
        levels(np.arange(1, 51)).logsnr, expected.logsnr, rtol=1e-5
    )
