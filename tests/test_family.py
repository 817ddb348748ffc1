"""Every experiment builds; those on the digits train, sample, and know their objective.

As a person runs them, with a network as small as there is.
"""

import dataclasses
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import continuous, schedule
from experiments import build, chains, learning, runs, train, weights
from experiments.configs import EXPERIMENTS, digits_family, table2

SMALL = shlex.split(
    """--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.attention
--net.groups 4 --train.batch-size 8 --train.steps 20 --optimizer.warmup 2
--diffusion.num-steps 20 --sample.steps 4 --sample.count 4 --train.log-every 5
--sample.every 20 --train.devices 1 --optimizer.ema-snapshots 0"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("family")


@pytest.mark.parametrize("name", digits_family.CONFIGS)
def test_every_objective_trains_and_samples(folder, name):
    assert train.main([name, *SMALL, "--output", str(folder)]) == 0
    run = runs.Run(folder / name)
    lines = runs.read_lines(run.metrics)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    assert sum(line["skipped"] for line in lines) == 0
    with Image.open(run.samples / "step_00000020.png") as image:
        assert np.asarray(image).std() > 10
    config = runs.read_config(run)
    params, step, _ = weights.load(config, run, weights.Weights())
    first = learning.init_state(config).params
    assert step == 20
    for before, after in zip(
        jax.tree.leaves(first), jax.tree.leaves(params), strict=True
    ):
        # The rows of labels that were not drawn, alone, may stay as they were.
        assert np.any(before != after) or before.ndim == 2


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if "digits" not in n])
def test_every_large_experiment_builds(name):
    """Shapes only: what is traced is what would compile."""
    config = EXPERIMENTS[name].config
    state = jax.eval_shape(lambda: learning.init_state(config))
    assert len(state.averages) == len(learning.make_averages(config))
    size, count = config.data.image_size, config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8),
        "position": jax.ShapeDtypeStruct((count,), jnp.int32),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    if config.data.channels == 1:
        batch["image"] = jax.ShapeDtypeStruct((count, size, size, 1), jnp.uint8)
    if not config.net.classes:
        del batch["label"]
    loss = learning.make_loss(config)
    out = jax.eval_shape(loss, state.params, batch, state.key)
    assert out.shape == ()
    assert out.dtype == jnp.float32


def test_table_2_has_all_cells():
    """Rows of the paper's table, and its two columns."""
    cells = {
        (d.prediction, d.loss, d.variance)
        for d in (config.diffusion for config in table2.CONFIGS.values())
    }
    assert cells == {
        (kind, loss, variance)
        for kind in ("mean", "eps")
        for loss, variance in (("vlb", "learned"), ("vlb", "large"), (kind, "large"))
    }
    for config in table2.CONFIGS.values():
        # All else is that of the main experiment.
        same = dataclasses.replace(
            table2.BASE.diffusion,
            **{
                name: getattr(config.diffusion, name)
                for name in ("prediction", "loss", "variance")
            },
        )
        assert config.diffusion == same


def test_small_versions_have_the_objective_of_the_large_ones():
    for name, small in digits_family.CONFIGS.items():
        large = (
            EXPERIMENTS.get(name.removeprefix("digits_"))
            or EXPERIMENTS[name.replace("digits_", "cifar10_")]
        )
        expected = dataclasses.replace(large.config.diffusion, num_steps=1000)
        assert small.diffusion == expected
        assert small.net.classes == large.config.net.classes


def test_chains_of_continuous_experiments_end_in_clean_data():
    for name, config in digits_family.CONFIGS.items():
        if not build.is_continuous(config):
            continue
        params = learning.init_state(config).params
        chain = build.chain_schedule(config, params)
        assert schedule.num_steps(chain) == 1000, name
        assert float(chain(0).sigma) == 0
        assert float(chain(0).alpha) == 1
        inner = build.make_schedule(config, params)
        np.testing.assert_allclose(
            chain(500).logsnr, inner(0.5).logsnr, rtol=1e-4, atol=1e-4
        )


def test_exploding_chains_start_from_their_own_noise():
    edm = digits_family.CONFIGS["digits_edm"]
    assert chains.start_std(edm) == pytest.approx(80, rel=1e-4)
    assert chains.start_std(digits_family.CONFIGS["digits_flow"]) == 1


def test_a_learned_schedule_learns(folder):
    name = "digits_vdm"
    run = runs.Run(folder / name)
    if not runs.has_checkpoint(run):
        train.main([name, *SMALL, "--output", str(folder)])
    config = runs.read_config(run)
    first = learning.init_state(config).params["schedule"]
    last = weights.load(config, run, weights.Weights(raw=True))[0]["schedule"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, last)
    # The ends and all that is between.
    assert min(jax.tree.leaves(moved)) > 1e-4
    made = build.make_schedule(config, {"schedule": last})
    t = np.linspace(0, 1, 101)
    assert np.all(np.diff(made(t).logsnr) < 0)
    assert not np.allclose(made(t).logsnr, continuous.cosine()(t).logsnr)


def test_importance_keeps_its_memory_in_the_checkpoint(folder):
    """A run that is stopped and continued is the one that was not."""
    flags = [
        *("digits_table2_eps_vlb", *SMALL, "--output", str(folder)),
        *("--diffusion.density", "importance", "--diffusion.num-steps", "4"),
        *("--train.log-every", "1"),
    ]
    assert train.main([*flags, "--name", "whole"]) == 0
    assert train.main([*flags, "--name", "parts", "--train.stop-at", "11"]) == 0
    assert train.main([*flags, "--name", "parts"]) == 0
    whole, parts = runs.Run(folder / "whole"), runs.Run(folder / "parts")
    assert whole.metrics.read_bytes() == parts.metrics.read_bytes()
    config = runs.read_config(whole)
    like = jax.eval_shape(lambda: learning.init_state(config))
    from diffusion_jax.training import checkpoint, parallel

    sharding = parallel.replicated(parallel.make_mesh(1))
    with checkpoint.open_folder(whole.checkpoints, read_only=True) as manager:
        state, _ = checkpoint.restore(manager, like, sharding)
    # 20 batches of 8 have been recorded, of all four times.
    assert int(state.memory.counts.sum()) == 160
    assert int(state.memory.counts.min()) > 10
    assert json.loads(whole.config.read_text())["diffusion"]["density"] == "importance"
