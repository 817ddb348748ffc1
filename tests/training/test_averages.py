"""Averages of the weights against their definitions, summed in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from diffusion_jax.training import averages

TRACKED = (0.05, 0.10)
SOUGHT = (0.03, 0.04, 0.06, 0.08, 0.12, 0.15, 0.20, 0.25)


def track(profiles, path, start=None):
    """What training keeps: after every update, each average, [n, profiles, d]."""
    start = np.zeros(path.shape[1], np.float32) if start is None else start

    def update(carry, params):
        step, kept = carry
        kept = [
            optax.incremental_update(params, average, 1 - profile(step))
            for profile, average in zip(profiles, kept, strict=True)
        ]
        return (step + 1, kept), jnp.stack(kept)

    first = (jnp.zeros((), jnp.int32), [jnp.asarray(start)] * len(profiles))
    return np.asarray(jax.jit(lambda: jax.lax.scan(update, first, path)[1])())


def walk(steps, d):
    """A random walk that goes about as far as it began, and its drift twice that."""
    rng = np.random.default_rng(0)
    start, way = rng.normal(size=(2, d))
    noise = rng.normal(size=(steps, d)) / np.sqrt(steps)
    path = start + np.cumsum(noise + 2 * way / steps, axis=0)
    return path.astype(np.float32)


def test_gamma_is_the_papers_and_solves_its_equation():
    assert averages.gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert averages.gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    for length in (1e-3, 0.03, 0.05, 0.10, 0.25, 0.28):
        g = averages.gamma(length)
        assert g > 0
        found = np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))
        np.testing.assert_allclose(found, length, rtol=1e-9)


def geometric(decay, steps):
    """Of averages of constant decay, which are a copy after the first update."""
    kept = decay ** np.arange(steps - 1, -1, -1.0)
    kept[1:] *= 1 - decay
    return kept


def power(length, steps):
    """Of power-function averages: differences of (k / n)^p."""
    ends = np.arange(steps + 1) / steps
    return np.diff(ends ** (averages.gamma(length) + 1))


PROFILES = {
    "constant decay": (averages.exponential, geometric, (0.7,)),
    "power function": (averages.power, power, (0.03, 0.10, 0.28)),
}


@pytest.mark.parametrize("kind", PROFILES)
def test_an_average_weighs_each_update_as_its_formula_says(kind):
    make, weights, values = PROFILES[kind]
    path, profiles = walk(1000, d=20), [make(value) for value in values]
    seen = track(profiles, path, start=np.full(20, 100, np.float32))
    for k, value in enumerate(values):
        # Weakly typed: an average keeps the type of its weights.
        assert profiles[k](jnp.int32(3)).weak_type
        for steps in (1, 2, 30, 1000):
            expected = weights(value, steps) @ path[:steps].astype(np.float64)
            got = seen[steps - 1, k]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_power_decay_keeps_its_digits_late_in_training():
    # 1 - decay is 2e-5 there: what is left of float32 is its spacing near 1, 6e-8.
    steps = np.array([800_000, 999_999])
    truth = -np.expm1((averages.gamma(0.05) + 1) * np.log1p(-1 / (steps + 1.0)))
    got = 1 - np.asarray(averages.power(0.05)(steps), np.float64)
    np.testing.assert_allclose(got, truth, atol=6e-8)


def test_closed_form_is_the_integral_of_the_running_sums():
    tracked = [(250, 0.05), (500, 0.28), (1000, 0.1)]
    middles = (np.arange(200_000) + 0.5) / 200_000
    sums = [
        np.minimum(middles * 1000 / t, 1) ** (averages.gamma(length) + 1)
        for t, length in [*tracked, (1000, 0.15)]
    ]
    weights = averages.solve(tracked, 1000, 0.15)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    off = weights @ np.array(sums[:-1]) - sums[-1]
    expected = np.sqrt(np.mean(off**2) / np.mean(sums[-1] ** 2))
    error = averages.expected_error(tracked, weights, 1000, 0.15)
    np.testing.assert_allclose(error, expected, rtol=1e-6)


def test_any_length_is_made_of_two_that_were_tracked():
    steps = 800
    path, lengths = walk(steps, d=200), (*TRACKED, *SOUGHT)
    made = track([averages.power(length) for length in lengths], path)
    seen = dict(zip(lengths, made.transpose(1, 0, 2), strict=True))
    for count, bound in ((8, 4e-3), (32, 2e-4)):
        ends = [round(steps * (i + 1) / count) for i in range(count)]
        tracked = [(end, length) for end in ends for length in TRACKED]
        kept = [seen[one][step - 1] for step, one in tracked]
        for length in SOUGHT:
            weights = averages.solve(tracked, steps, length)
            made, truth = averages.reconstruct(kept, weights), seen[length][-1]
            assert made.dtype == np.float32
            far = np.linalg.norm(made.astype(np.float64) - truth)
            assert far < bound * np.linalg.norm(truth), (count, length)
            # And of what sets it apart from the last weights.
            apart = np.linalg.norm(truth - path[-1])
            assert count < 16 or far < 3e-2 * apart, (count, length)


def test_sum_is_in_float64_and_one_tree_is_read_at_a_time():
    trees = ({"a": [jnp.full(2, x)], "b": jnp.full((), x)} for x in (1.0, 1e-9, -1.0))
    made = averages.reconstruct(trees, [1.0, 1.0, 1.0])
    np.testing.assert_allclose(made["a"][0], [1e-9, 1e-9], rtol=1e-6)
    assert made["b"].dtype == np.float32
    # The factors too: they cancel as well.
    made = averages.reconstruct([jnp.ones(2)] * 2, [1 / 3, 1e-12 - 1 / 3])
    np.testing.assert_allclose(made, [1e-12, 1e-12], rtol=1e-3)


REFUSED = [
    (averages.power, (0,), "0"),
    (averages.power, (0.281,), "0.281"),
    (averages.power, (float("nan"),), "nan"),
    (averages.exponential, (1.0,), "1.0"),
    (averages.exponential, (-0.1,), "-0.1"),
    (averages.exponential, (float("nan"),), "nan"),
    (averages.solve, ([(100, 0.1)], 100, 0.0), "0.0"),
    (averages.solve, ([], 100, 0.08), "0"),
    (averages.solve, ([(50, 0.1)], 100, 0.08), "1 ending with 50 of length 0.1"),
    (averages.solve, ([(100, 0.1), (101, 0.1)], 100, 0.08), "2 ending with"),
    (averages.solve, ([(0, 0.1), (100, 0.1)], 100, 0.08), "2 ending with"),
    (averages.solve, ([(100, 0.1), (100, 0.1)], 100, 0.08), "2 ending with"),
    (averages.solve, ([(100, 0.3)], 100, 0.08), "0.3"),
    (averages.reconstruct, ([], [0.5, 0.5]), "0"),
    (averages.reconstruct, ([np.ones(1)], [0.5, 0.5]), "1"),
    (averages.reconstruct, ([np.ones(1)] * 3, [0.5, 0.5]), "more"),
]


def test_bad_input_is_refused(refuses):
    for call, given, got in REFUSED:
        with refuses(got):
            call(*given)


def test_snapshot_comes_back_to_the_bit_into_the_same_network(tmp_path, refuses):
    net = {"conv": {"kernel": jnp.arange(6.0).reshape(3, 2)}, "bias": jnp.array(0.1)}
    file = averages.save(tmp_path / "new" / "a.safetensors", net, 30, 0.05)
    assert averages.header(file) == (30, 0.05)
    loaded = averages.load(file, jax.eval_shape(lambda: net))
    jax.tree.map(np.testing.assert_array_equal, loaded, net)
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]
    assert set(safetensors.numpy.load_file(file)) == {"conv.kernel", "bias"}
    again = averages.save(tmp_path / "b.safetensors", net, 30, 0.05)
    assert again.read_bytes() == file.read_bytes()
    with refuses("bias: float32[] for float32[2]"):
        averages.load(file, {**net, "bias": jnp.ones(2)})
    for lossy, got in (
        ({"w": jnp.ones(1, jnp.bfloat16)}, "bfloat16 for w"),
        ({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "2 leaves with 1 paths"),
    ):
        with refuses(got):
            averages.save(tmp_path / "lossy", lossy, 1, 0.05)
    assert not (tmp_path / "lossy").exists()
