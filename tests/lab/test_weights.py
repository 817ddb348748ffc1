"""Which weights a command gets, from a run of a few numbers in place of a network."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
PATH = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 20)), axis=0)
PATH = PATH.astype(np.float32)


class State(NamedTuple):
    step: jax.Array
    params: Any
    averages: tuple[Any, ...]


def config_of(lengths=LENGTHS, every=EVERY):
    optimizer = SimpleNamespace(
        ema_decay=DECAYS, ema_lengths=lengths, ema_snapshots=every
    )
    return SimpleNamespace(optimizer=optimizer, train=SimpleNamespace(fsdp=1))


def tree_of(params):
    params = jnp.asarray(params, jnp.float32)
    return {"a": {"w": params[:-1]}, "b": params[-1]}


def flat(tree):
    return np.append(tree["a"]["w"], tree["b"])


def of_decay(decay, step):
    kept = decay ** np.arange(step - 1, -1, -1.0)
    kept[1:] *= 1 - decay
    return kept @ PATH[:step]


def of_length(length, step):
    ends = (np.arange(step + 1) / step) ** (averages.gamma(length) + 1)
    return np.diff(ends) @ PATH[:step]


def state_at(step, config):
    own = config.optimizer
    kept = [of_decay(decay, step) for decay in own.ema_decay]
    kept += [of_length(length, step) for length in own.ema_lengths]
    return State(jnp.int32(step), tree_of(PATH[step - 1]), tuple(map(tree_of, kept)))


def train(run, config, steps=STEPS, *, begin=0, saves=()):
    """Writes what a run does; begin: after which to write anything, as after a stop."""
    with checkpoint.open_folder(run.checkpoints, keep=9) as manager:
        for step in range(begin + 1, steps + 1):
            if weights.due(config, step):
                weights.save_snapshots(run, config, state_at(step, config))
            if step in saves:
                checkpoint.save(manager, step, state_at(step, config), {})


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def shapes(config):
        return jax.eval_shape(lambda: state_at(1, config))

    monkeypatch.setattr(learning, "state_shapes", shapes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 80, 115 and 160, snapshots each 10."""
    run = runs.Run(tmp_path_factory.mktemp("run"))
    train(run, config_of(), saves=(80, 115, STEPS))
    return run


@pytest.mark.parametrize(
    ("which", "step", "said", "expected"),
    [
        (Weights(), STEPS, "averaged", of_decay(0.9, STEPS)),
        (Weights(raw=True, step=80), 80, "last", PATH[79]),
        (Weights(average=0.99), STEPS, "averaged (decay 0.99)", of_decay(0.99, STEPS)),
        (Weights(average=0.1), STEPS, "averaged (length 0.1)", of_length(0.1, STEPS)),
    ],
)
def test_weights_of_a_checkpoint_are_taken_as_they_are(
    trained, which, step, said, expected
):
    params, at, words = weights.load(config_of(), trained, which)
    assert (at, words) == (step, said)
    np.testing.assert_array_equal(flat(params), expected.astype(np.float32))


def near(run, config, length, step):
    """How far a reconstruction is off, of what sets the average apart."""
    which = Weights(average=length, step=step)
    params, at, words = weights.load(config, run, which)
    assert (at, words) == (step, f"averaged (length {length})")
    assert isinstance(params["b"], jax.Array)
    assert params["b"].dtype == jnp.float32
    truth = of_length(length, step)
    apart = np.linalg.norm(truth - PATH[step - 1])
    return np.linalg.norm(flat(params) - truth) / apart


@pytest.mark.parametrize(("length", "step"), [(0.04, 80), (0.15, 115), (0.08, 160)])
def test_other_lengths_are_made_of_snapshots(trained, length, step):
    # At step 115 there is no snapshot but the averages in the checkpoint.
    assert near(trained, config_of(), length, step) < 0.03


def test_resumed_run_writes_the_same_snapshots(trained, tmp_path):
    run = runs.Run(tmp_path / "again")
    train(run, config_of())
    folder = run.folder / "averages"
    assert len(list(folder.iterdir())) == 2 * STEPS // EVERY
    weights.cut_snapshots(run, 85)
    weights.cut_snapshots(run, 80)  # which belongs to the checkpoint of its step
    left = sorted(file.name for file in folder.iterdir())
    assert len(left) == 2 * 8
    assert left[0] == "00000010_0.safetensors"
    assert left[-1] == "00000080_1.safetensors"
    train(run, config_of(), begin=85)
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


def test_too_few_snapshots_and_damaged_ones_are_refused(refuses, tmp_path):
    config, run = config_of(every=0), runs.Run(tmp_path / "few")
    train(run, config, 20, saves=(20,))
    with refuses("32% with 0 before step 20. Use 0.05 or 0.1,"):
        weights.load(config, run, Weights(average=0.2))
    config, run = config_of(), runs.Run(tmp_path / "damaged")
    train(run, config, 20, saves=(20,))
    file = run.folder / "averages" / "00000010_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with refuses("Delete it"):
        weights.load(config, run, Weights(average=0.08))
    file.unlink()
    assert near(run, config, 0.08, 20) < 0.05
