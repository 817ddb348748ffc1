"""Which weights a command gets, from a run of a few numbers in place of a network."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import averages

STEPS, EVERY = 160, 10
DECAYS, LENGTHS = (0.9, 0.99), (0.05, 0.10)


class State(NamedTuple):
    step: jax.Array
    params: Any
    averages: tuple[Any, ...]


def config_of(decays=DECAYS, lengths=LENGTHS, every=EVERY):
    optimizer = SimpleNamespace(
        ema_decay=decays, ema_lengths=lengths, ema_snapshots=every
    )
    return SimpleNamespace(optimizer=optimizer, train=SimpleNamespace(fsdp=1))


def tree_of(params):
    return {"a": {"w": jnp.asarray(params[:-1])}, "b": jnp.asarray(params[-1])}


def init_state(config):
    optimizer = config.optimizer
    count = len(optimizer.ema_decay) + len(optimizer.ema_lengths)
    fresh = tree_of(jnp.zeros(20))
    return State(jnp.zeros((), jnp.int32), fresh, (fresh,) * count)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(
        learning,
        "state_shapes",
        lambda config: jax.eval_shape(lambda: init_state(config)),
    )


@pytest.fixture(scope="module")
def path():
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(size=(STEPS, 20)), axis=0).astype(np.float32)


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    """A run with checkpoints of steps 80, 115 and 160, snapshots each 10."""
    run, config = runs.Run(tmp_path_factory.mktemp("run")), config_of()
    train(run, config, path, saves=(80, 115, STEPS))
    return run


def train(run, config, path, *, begin=0, saves=()):
    """Makes all updates; begin: after which to write anything, as after a stop."""
    optimizer = config.optimizer
    profiles = [averages.exponential(decay) for decay in optimizer.ema_decay]
    profiles += [averages.power(length) for length in optimizer.ema_lengths]

    @jax.jit
    def update(state, params):
        kept = tuple(
            optax.incremental_update(params, average, 1 - profile(state.step))
            for profile, average in zip(profiles, state.averages, strict=True)
        )
        return State(state.step + 1, params, kept)

    state = init_state(config)
    with checkpoint.open_folder(run.checkpoints, keep=9) as manager:
        for step, params in enumerate(path, start=1):
            state = update(state, tree_of(params))
            if step <= begin:
                continue
            if weights.due(config, step):
                weights.save_snapshots(run, config, state)
            if step in saves:
                checkpoint.save(manager, step, state, {})
        checkpoint.wait(manager)


def flat(tree):
    return np.append(tree["a"]["w"], tree["b"])


def power_average(path, length, step):
    ends = (np.arange(step + 1) / step) ** (averages.gamma(length) + 1)
    return np.diff(ends) @ path[:step].astype(np.float64)


def test_default_is_the_first_average_of_the_latest_checkpoint(trained, path):
    params, step, words = weights.load(config_of(), trained, Weights())
    kept = 0.9 ** np.arange(STEPS - 1, -1, -1.0)
    kept[1:] *= 0.1
    assert (step, words) == (STEPS, "averaged")
    np.testing.assert_allclose(flat(params), kept @ path, rtol=1e-4)


def test_last_weights_of_an_earlier_checkpoint(trained, path):
    which = Weights(raw=True, step=80)
    params, step, words = weights.load(config_of(), trained, which)
    assert (step, words) == (80, "last")
    np.testing.assert_array_equal(flat(params), path[79])


def test_tracked_averages_are_taken_as_they_are(trained, path):
    decay, _, words = weights.load(config_of(), trained, Weights(average=0.99))
    assert words == "averaged (decay 0.99)"
    kept = 0.99 ** np.arange(STEPS - 1, -1, -1.0)
    kept[1:] *= 0.01
    np.testing.assert_allclose(flat(decay), kept @ path, rtol=1e-4)
    length, _, words = weights.load(config_of(), trained, Weights(average=0.1))
    assert words == "averaged (length 0.1)"
    expected = power_average(path, 0.1, STEPS)
    np.testing.assert_allclose(flat(length), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "step"), [(0.04, 80), (0.15, 115), (0.08, 160)])
def test_other_lengths_are_made_of_snapshots(trained, path, length, step):
    # At step 115 there is no snapshot but the averages in the checkpoint.
    which = Weights(average=length, step=step)
    params, at, words = weights.load(config_of(), trained, which)
    assert (at, words) == (step, f"averaged (length {length})")
    assert isinstance(params["b"], jax.Array)
    assert params["b"].dtype == jnp.float32
    truth = power_average(path, length, step)
    far = np.linalg.norm(flat(params) - truth)
    assert far < 0.03 * np.linalg.norm(truth - path[step - 1])


def test_resumed_run_writes_the_same_snapshots(trained, path, tmp_path):
    run = runs.Run(tmp_path / "again")
    train(run, config_of(), path)
    folder = run.folder / "averages"
    assert len(list(folder.iterdir())) == 2 * STEPS // EVERY
    weights.cut_snapshots(run, 85)
    weights.cut_snapshots(run, 80)  # which belongs to the checkpoint of its step
    left = sorted(file.name for file in folder.iterdir())
    assert len(left) == 2 * 8
    assert left[0] == "00000010_0.safetensors"
    assert left[-1] == "00000080_1.safetensors"
    train(run, config_of(), path, begin=85)
    for file in folder.iterdir():
        there = trained.folder / "averages" / file.name
        assert file.read_bytes() == there.read_bytes()


def test_snapshots_are_due_where_asked_for():
    assert [s for s in range(1, 31) if weights.due(config_of(), s)] == [10, 20, 30]
    assert not weights.due(config_of(every=0), 10)
    assert not weights.due(config_of(lengths=()), 10)


def test_average_that_is_not_there_is_refused(trained, refuses):
    with pytest.raises(ConfigError, match=r"0\.9, 0\.99, a length of at most 0\.28;"):
        weights.load(config_of(), trained, Weights(average=0.5))
    for which, lengths, got in (
        (Weights(average=0.0), LENGTHS, "0. Choose one of these."),
        (Weights(average=0.08), (), "0.08. Choose one of these, or train with --opt"),
        (Weights(average=0.99, raw=True), LENGTHS, "--average 0.99 as well"),
    ):
        with refuses(got):
            weights.load(config_of(lengths=lengths), trained, which)


def test_too_few_snapshots_are_refused(refuses, path, tmp_path):
    config, run = config_of(every=0), runs.Run(tmp_path)
    train(run, config, path[:20], saves=(20,))
    with refuses("32% with 0 before step 20. Use 0.05 or 0.1,"):
        weights.load(config, run, Weights(average=0.2))
    near, _, _ = weights.load(config, run, Weights(average=0.08))
    truth = power_average(path, 0.08, 20)
    assert np.linalg.norm(flat(near) - truth) < 0.05 * np.linalg.norm(truth)


def test_damaged_snapshot_is_refused(refuses, path, tmp_path):
    config, run = config_of(), runs.Run(tmp_path)
    train(run, config, path[:20], saves=(20,))
    file = run.folder / "averages" / "00000010_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with refuses("Delete it"):
        weights.load(config, run, Weights(average=0.08))
    file.unlink()
    weights.load(config, run, Weights(average=0.08))
