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


def track(profiles, path, *, start=None):
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


def walk(steps, *, d=200, drift=2.0):
    """A random walk that goes about as far as it began, and its drift twice that."""
    rng = np.random.default_rng(0)
    start, way = rng.normal(size=(2, d))
    noise = rng.normal(size=(steps, d)) / np.sqrt(steps)
    return start + np.cumsum(noise + drift * way / steps, axis=0)


def descent(steps):
    """Weights of a linear regression by noisy gradient descent."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 100)) * np.linspace(0.1, 1, 100)
    y = x @ rng.normal(size=100) + 0.5 * rng.normal(size=400)
    w, path = 0.1 * rng.normal(size=100), []
    for _ in range(steps):
        rows = rng.integers(400, size=8)
        w = w - 0.01 * x[rows].T @ (x[rows] @ w - y[rows])
        path.append(w)
    return np.array(path)


def exact(length, steps):
    """Weights of the updates in a power-function average: differences of (k / n)^p."""
    ends = np.arange(steps + 1) / steps
    return np.diff(ends ** (averages.gamma(length) + 1))


def snapshots(steps, count):
    return [
        (round(steps * (i + 1) / count), length)
        for i in range(count)
        for length in TRACKED
    ]


def test_gamma_is_the_papers():
    assert averages.gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert averages.gamma(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("length", [1e-3, 0.03, 0.05, 0.10, 0.25, 0.28])
def test_gamma_solves_its_equation(length):
    g = averages.gamma(length)
    assert g > 0
    found = np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))
    np.testing.assert_allclose(found, length, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_average_of_constant_decay_is_a_copy_first_and_then_a_geometric_sum(steps):
    path, decay = walk(steps, d=3).astype(np.float32), 0.7
    start = np.full(3, 100, np.float32)
    (got,) = track([averages.exponential(decay)], path, start=start)[-1]
    weights = (1 - decay) * decay ** np.arange(steps - 1, -1, -1.0)
    weights[0] = decay ** (steps - 1)
    np.testing.assert_allclose(got, weights @ path.astype(np.float64), rtol=1e-5)


def test_average_with_ramp_keeps_its_start_at_first():
    steps, decay = 30, 0.7
    path = walk(steps, d=3).astype(np.float32)
    start = np.full(3, 100, np.float32)
    (got,) = track([averages.exponential(decay, ramp=True)], path, start=start)[-1]
    kept = np.minimum(decay, (1 + np.arange(steps)) / (10 + np.arange(steps)))
    later = np.append(np.cumprod(kept[::-1])[::-1], 1)
    expected = later[0] * start + (later[1:] * (1 - kept)) @ path.astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.10, 0.28])
def test_power_average_weighs_each_update_as_its_formula_says(length):
    path = walk(1000, d=20).astype(np.float32)
    start = np.full(20, 100, np.float32)
    seen = track([averages.power(length)], path, start=start)[:, 0]
    for steps in (1, 2, 40, 1000):
        expected = exact(length, steps) @ path[:steps].astype(np.float64)
        np.testing.assert_allclose(seen[steps - 1], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.10, 0.25])
def test_relative_length_is_the_standard_deviation_of_the_profile(length):
    n = 1000
    decays = np.asarray(jax.jit(averages.power(length))(np.arange(n)), np.float64)
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    weights, when = later * (1 - decays), (np.arange(n) + 0.5) / n
    mean = weights @ when
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    spread = np.sqrt(weights @ (when - mean) ** 2)
    np.testing.assert_allclose(spread, length, rtol=0.01)


def test_power_decay_keeps_its_digits_late_in_training():
    # 1 - decay is 2e-5 there: what is left of float32 is its spacing near 1, 6e-8.
    steps = np.array([800_000, 999_999])
    truth = -np.expm1((averages.gamma(0.05) + 1) * np.log1p(-1 / (steps + 1.0)))
    got = 1 - np.asarray(averages.power(0.05)(steps), np.float64)
    np.testing.assert_allclose(got, truth, atol=6e-8)


@pytest.mark.parametrize(
    "profile", [averages.exponential(0.9), averages.power(0.1)], ids=["exp", "power"]
)
def test_average_keeps_the_type_of_its_weights(profile):
    params = jnp.ones(2, jnp.bfloat16)
    moved = optax.incremental_update(params, params, 1 - profile(jnp.int32(3)))
    assert moved.dtype == jnp.bfloat16


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
    for nudge in ([1, -1, 0], [0, 1, -1]):
        for size in (-1e-3, 1e-3):
            other = weights + size * np.array(nudge)
            assert averages.expected_error(tracked, other, 1000, 0.15) > error


def test_what_was_tracked_comes_back_as_it_is():
    tracked = snapshots(160, 8)
    weights = averages.solve(tracked, 160, 0.10)
    expected = [float(one == (160, 0.10)) for one in tracked]
    np.testing.assert_allclose(weights, expected, atol=1e-5)


@pytest.fixture(scope="module", params=[800, 5000], ids="{} steps".format)
def wandering(request):
    path = walk(request.param)
    lengths = (*TRACKED, *SOUGHT)
    profiles = [averages.power(length) for length in lengths]
    seen = track(profiles, path.astype(np.float32))
    return path, dict(zip(lengths, seen.transpose(1, 0, 2), strict=True))


@pytest.mark.parametrize("length", SOUGHT)
@pytest.mark.parametrize(("count", "bound"), [(8, 4e-3), (16, 1e-3), (32, 2e-4)])
def test_any_length_is_made_of_two_that_were_tracked(wandering, length, count, bound):
    path, seen = wandering
    steps = len(path)
    tracked = snapshots(steps, count)
    weights = averages.solve(tracked, steps, length)
    kept = [seen[one][step - 1] for step, one in tracked]
    made, truth = averages.reconstruct(kept, weights), seen[length][-1]
    assert made.dtype == np.float32
    far = np.linalg.norm(made.astype(np.float64) - truth)
    assert far < bound * np.linalg.norm(truth)


@pytest.mark.parametrize("count", [1, 4, 16, 50])
@pytest.mark.parametrize("length", SOUGHT)
def test_error_is_as_foretold_for_independent_updates(length, count):
    steps, path = 800, walk(800, d=1000, drift=0)
    tracked = snapshots(steps, count)
    weights = averages.solve(tracked, steps, length)
    kept = np.array([exact(one, t) @ path[:t] for t, one in tracked])
    truth = exact(length, steps) @ path
    error = np.linalg.norm(weights @ kept - truth) / np.linalg.norm(truth - path[-1])
    expected = averages.expected_error(tracked, weights, steps, length)
    np.testing.assert_allclose(error, expected, rtol=0.15)


@pytest.mark.parametrize("steps", [800, 5000])
def test_lengths_are_made_along_gradient_descent(steps):
    path = descent(steps)
    tracked = snapshots(steps, 16)
    kept = np.array([exact(length, t) @ path[:t] for t, length in tracked])
    for length in SOUGHT:
        truth = exact(length, steps) @ path
        made = averages.solve(tracked, steps, length) @ kept
        far = np.linalg.norm(made - truth)
        assert far < 1e-3 * np.linalg.norm(truth)
        assert far < 3e-2 * np.linalg.norm(truth - path[-1])


def test_sum_is_in_float64_and_one_tree_is_read_at_a_time():
    def trees():
        for value in (1.0, 1e-9, -1.0):
            yield {"a": {"w": jnp.full(2, value)}, "b": jnp.full((), value)}

    made = averages.reconstruct(trees(), [1.0, 1.0, 1.0])
    np.testing.assert_allclose(made["a"]["w"], [1e-9, 1e-9], rtol=1e-6)
    assert made["b"].dtype == np.float32
    # The factors too: they cancel as well.
    ones = [{"w": jnp.ones(2)}] * 2
    made = averages.reconstruct(ones, [1 / 3, 1e-12 - 1 / 3])
    np.testing.assert_allclose(made["w"], [1e-12, 1e-12], rtol=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, 0.281, float("nan")])
def test_impossible_length_is_refused(refuses, length):
    with refuses(str(length)):
        averages.power(length)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decay_is_refused(refuses, decay):
    with refuses(str(decay)):
        averages.exponential(decay)


@pytest.mark.parametrize(
    ("tracked", "got"),
    [
        ([], "0"),
        ([(50, 0.1)], "1 ending with 50 of length 0.1"),
        ([(100, 0.1), (101, 0.1)], "2 ending with"),
        ([(0, 0.1), (100, 0.1)], "2 ending with"),
        ([(100, 0.1), (100, 0.1)], "2 ending with"),
        ([(100, 0.3)], "0.3"),
    ],
)
def test_snapshots_that_say_nothing_are_refused(refuses, tracked, got):
    with refuses(got):
        averages.solve(tracked, 100, 0.08)


@pytest.mark.parametrize(("count", "got"), [(0, "0"), (1, "1"), (3, "more")])
def test_other_than_one_tree_a_weight_is_refused(refuses, count, got):
    with refuses(got):
        averages.reconstruct([np.ones(1)] * count, [0.5, 0.5])


def small_net():
    return {"conv": {"kernel": jnp.arange(6.0).reshape(3, 2)}, "bias": jnp.array(0.1)}


def test_snapshot_comes_back_to_the_bit(tmp_path):
    file = averages.save(tmp_path / "new" / "a.safetensors", small_net(), 30, 0.05)
    assert averages.header(file) == (30, 0.05)
    loaded = averages.load(file, jax.eval_shape(small_net))
    jax.tree.map(np.testing.assert_array_equal, loaded, small_net())
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]
    assert set(safetensors.numpy.load_file(file)) == {"conv.kernel", "bias"}
    again = averages.save(tmp_path / "b.safetensors", small_net(), 30, 0.05)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("like", "got"),
    [
        ({"bias": jnp.ones(())}, "conv.kernel: float32[3,2] for nothing"),
        ({**small_net(), "b": jnp.ones(1)}, "b: nothing for float32[1]"),
        ({**small_net(), "bias": jnp.ones(2)}, "bias: float32[] for float32[2]"),
        (
            {**small_net(), "bias": jnp.ones((), jnp.bfloat16)},
            "bias: float32[] for bfloat16[]",
        ),
    ],
)
def test_snapshot_of_another_network_is_refused(tmp_path, refuses, like, got):
    file = averages.save(tmp_path / "a.safetensors", small_net(), 30, 0.05)
    with refuses(got):
        averages.load(file, like)


def test_damaged_snapshot_is_refused(tmp_path, refuses):
    file = averages.save(tmp_path / "a.safetensors", small_net(), 30, 0.05)
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-4], b"\xff" * 100):
        file.write_bytes(damaged)
        for read in (averages.header, lambda f: averages.load(f, small_net())):
            with refuses(""):
                read(file)


@pytest.mark.parametrize(
    "about",
    [
        None,
        "no JSON",
        "[]",
        '{"step": 3, "length": 0.05}',
        '{"version": 2, "step": 3, "length": 0.05}',
        '{"version": 1, "length": 0.05}',
        '{"version": 1, "step": 3, "length": []}',
    ],
)
def test_file_of_another_format_is_refused(tmp_path, refuses, about):
    metadata = {"by": "others"} | ({} if about is None else {averages.FORMAT: about})
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.ones(1, np.float32)}, file, metadata)
    with refuses(""):
        averages.header(file)


def test_snapshot_that_would_lose_digits_or_names_is_refused(tmp_path, refuses):
    with refuses("bfloat16 for w"):
        averages.save(tmp_path / "a", {"w": jnp.ones(1, jnp.bfloat16)}, 1, 0.05)
    with refuses("1 that are taken"):
        tree = {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
        averages.save(tmp_path / "a", tree, 1, 0.05)
    assert not list(tmp_path.iterdir())
