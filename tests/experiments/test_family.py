"""Every experiment builds; those on the digits train, sample, and know their objective.

As a person runs them, with a network as small as there is.
"""

import dataclasses
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import SMALL, restored

from diffusion_jax import continuous, learned, schedule, timesteps
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.config import Diffusion, replace
from diffusion_jax.lab.schema.few import takes
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.wiring import build, chains, learning
from experiments import compare_samplers, train
from experiments.configs import EXPERIMENTS, digits_family, table2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("family")


# All but those of `digits` with and without labels, which other tests train, and those
# that put together what others have apart.
MIXED = "eps_simple", "mean_vlb", "eps_vlb", "eps_vlb_learned", "vp_continuous"
MIXED += ("conditional",)
TRAINED = [
    name
    for name in digits_family.CONFIGS
    if name.removeprefix("digits_").removeprefix("table2_") not in MIXED
]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.usefixtures("small_network")
def test_every_objective_trains_and_samples(folder, name):
    # A learned variance is that of single steps.
    whole = ["--sample.steps", "20"] if name.endswith("learned") else []
    assert train.main([name, *SMALL, *whole, "--output", str(folder)]) == 0
    run = runs.Run(folder / name)
    lines = runs.read_lines(run.metrics)
    assert [line["step"] for line in lines] == [5, 10]
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    assert sum(line["skipped"] for line in lines) == 0
    with Image.open(run.samples / "step_00000012.png") as image:
        assert np.asarray(image).std() > 10
    config = runs.read_config(run)
    params, step, _ = weights.load(config, run, weights.Weights())
    first = learning.init_state(config).params
    assert step == 12
    for before, after in zip(*map(jax.tree.leaves, (first, params)), strict=True):
        assert np.any(before != after)


# The sizes of a model of latents are known with its autoencoder: test_latent has them.
LARGE = {n: m.config for n, m in EXPERIMENTS.items() if not m.config.data.latent}
LITTLE = {"channels": 4, "multipliers": (1,), "blocks": 1, "attention": (), "groups": 1}
SIZES = {n: [getattr(made.net, field) for field in LITTLE] for n, made in LARGE.items()}


@pytest.mark.parametrize("name", LARGE)
def test_every_large_experiment_builds(name):
    """Shapes only: what is traced is what would compile. Each large size once.

    With one block a level: `test_unet` counts the others.
    """
    config = LARGE[name]
    first = name == next(n for n, size in SIZES.items() if size == SIZES[name])
    little = dataclasses.replace(config.net, **({"blocks": 1} if first else LITTLE))
    config = dataclasses.replace(config, net=little)
    state = learning.state_shapes(config)
    assert len(state.averages) == len(learning.make_averages(config))
    count = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((count, *config.data.shape), jnp.uint8),
        "position": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    if config.net.classes:
        batch["label"] = batch["position"]
    loss = learning.make_loss(config)
    out, seen = jax.eval_shape(loss, state.params, batch, state.key, state.memory)
    assert {leaf.shape for leaf in jax.tree.leaves(seen)} == {(count,)}
    assert (out.shape, out.dtype) == ((), jnp.float32)


def random_objective(seed):
    """Values of the fields of an objective that fit together."""
    rng, hints = np.random.default_rng(seed), get_type_hints(Diffusion)
    names = ("schedule", "prediction", "loss", "variance", "spread", "density")
    while True:
        drawn = {n: str(rng.choice(get_args(hints[n]))) for n in (*names, "weighting")}
        if drawn["loss"] != "eps":
            drawn["weighting"] = "simple"
        chosen = Diffusion(num_steps=20, **drawn)
        if not list(checks.objective(chosen)):
            return chosen


def stand_in(config, *_, **__):
    """As wide as the network, and not one."""
    width = 1 + (config.diffusion.variance in ("learned", "range"))
    return lambda x, t, **_: jnp.concatenate([jnp.tanh(x)] * width, axis=-1)


def test_whatever_is_not_refused_has_a_finite_loss(monkeypatch):
    monkeypatch.setattr(build, "make_apply", stand_in)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    batch = {"image": images, "position": np.arange(4, dtype=np.int32)}
    chosen = [random_objective(seed) for seed in range(16)]
    digits = EXPERIMENTS["digits"].config
    made = [
        learning.make_loss(dataclasses.replace(digits, diffusion=c)) for c in chosen
    ]

    @jax.jit
    def all_losses(key):
        params = {"schedule": learned.init(key)}
        memory = timesteps.history(20)
        return [loss(params, batch, key, memory)[0] for loss in made]

    for objective, loss in zip(chosen, all_losses(jax.random.key(0)), strict=True):
        assert np.isfinite(loss), objective


def seen_by_the_loss(config, **batch):
    """What the loss makes of a batch: the key of dropout, x0, and labels."""
    seen = {}

    def look(config, denoise, levels, x0, eps, t):
        denoise(x0, t)
        seen["x0"] = x0
        return x0.mean(axis=(1, 2, 3))

    def network(*_, rngs, **__):
        def apply(x, t, label=None, span=None):
            seen["label"] = label
            return x

        seen["key"] = jax.random.key_data(rngs["dropout"]).tolist()
        return apply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "_loss_at", look)
        patch.setattr(build, "make_apply", network)
        learning.make_loss(config)({}, batch, jax.random.key(0))
    return seen


@pytest.mark.parametrize("flip", [False, True])
def test_the_loss_sees_pictures_from_minus_one_to_one_mirrored_at_random(flip):
    config = replace(EXPERIMENTS["digits"].config, "data", flip=flip)
    images = np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1)
    x0 = seen_by_the_loss(config, image=images, position=np.arange(16))["x0"]
    straight = images / 127.5 - 1
    mirrored = np.flip(straight, axis=2)  # left and right
    near = [
        np.abs(x0 - expected).max(axis=(1, 2, 3)) < 1e-6
        for expected in (straight, mirrored)
    ]
    assert np.all(near[0] ^ near[1])
    assert (0 < near[1].sum() < 16) if flip else near[0].all()


def test_parts_of_a_batch_drop_by_keys_of_their_own():
    """By the position of their first example: devices have parts of a batch."""
    config, images = EXPERIMENTS["digits"].config, np.zeros((4, 8, 8, 1), np.uint8)
    keys = [
        seen_by_the_loss(config, image=images, position=first + np.arange(4))["key"]
        for first in (0, 4, 0)
    ]
    assert keys[0] == keys[2] != keys[1]


def test_labels_are_dropped_at_their_rate():
    config = EXPERIMENTS["digits_conditional"].config
    config = replace(config, "net", label_dropout=0.2)
    count, classes = 2000, config.net.classes
    label = np.arange(count, dtype=np.int32) % classes
    images = np.zeros((count, 2, 2, 1), np.uint8)
    batch = {"image": images, "label": label, "position": np.arange(count)}
    told = seen_by_the_loss(config, **batch)["label"]
    kept = np.asarray(told) == label
    assert np.all(kept | (told == classes))
    assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / count)


REAL = [
    name
    for name, config in digits_family.CONFIGS.items()
    if build.is_continuous(config) and config.diffusion.schedule != "learned"
]


@pytest.mark.parametrize("name", ["digits", *REAL])
def test_a_network_is_told_the_same_time_in_training_and_in_chains(name, monkeypatch):
    config, told = EXPERIMENTS[name].config, []

    class Network:
        def apply(self, variables, x, t, label, **options):
            told.append(np.asarray(t))
            return 0 * x

    monkeypatch.setattr(build, "make_network", lambda *_, **__: Network())
    steps = np.array([1, 7, config.diffusion.num_steps])
    x = jnp.zeros((3, 2, 2, 1))
    for levels, t in (
        (build.make_schedule(config), steps / steps[-1]),
        (build.chain_schedule(config), steps),
    ):
        if name == "digits":  # which counts from 0
            t = steps
        apply = build.make_apply(config, {"net": {}}, levels)
        build.make_denoiser(config, apply, levels)(x, jnp.asarray(t))
    np.testing.assert_allclose(told[0], told[1], rtol=1e-4)
    if name == "digits":
        np.testing.assert_array_equal(told[0], steps - 1)


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


def test_chains_of_continuous_experiments_end_in_clean_data():
    for name, config in digits_family.CONFIGS.items():
        if not build.is_continuous(config):
            continue
        params = None
        if config.diffusion.schedule == "learned":
            params = {"schedule": learned.init(jax.random.key(0))}
        chain = build.chain_schedule(config, params)
        assert schedule.num_steps(chain) == 1000, name
        assert float(chain(0).sigma) == 0
        assert float(chain(0).alpha) == 1
        inner = build.make_schedule(config, params)
        np.testing.assert_allclose(
            chain(500).logsnr, inner(0.5).logsnr, rtol=1e-4, atol=1e-4
        )


def test_exploding_chains_start_from_their_own_noise():
    """Karras's grid begins at 200 times the signal, wherever the schedule ends."""
    edm = digits_family.CONFIGS["digits_edm"]
    assert chains.start_std(edm) == pytest.approx(80, rel=1e-4)
    assert chains.start_std(digits_family.CONFIGS["digits_flow"]) == 1
    wide = replace(edm, "diffusion", sigma_max=1000.0)
    assert chains.start_std(wide) == pytest.approx(200, rel=0.02)
    whole = with_sampling(wide, Sampling("ddim", steps=10, grid="uniform"))
    assert chains.start_std(whole) == pytest.approx(1000, rel=1e-4)


@pytest.mark.usefixtures("small_network")
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


@pytest.mark.usefixtures("small_network")
def test_importance_keeps_its_memory_in_the_checkpoint(folder):
    """A run that is stopped and continued is the one that was not."""
    flags = [
        *("digits_table2_eps_vlb", *SMALL, "--output", str(folder)),
        *("--diffusion.density", "importance", "--diffusion.num-steps", "4"),
        *("--train.log-every", "1"),
    ]
    assert train.main([*flags, "--name", "whole"]) == 0
    assert train.main([*flags, "--name", "parts", "--train.stop-at", "7"]) == 0
    assert train.main([*flags, "--name", "parts"]) == 0
    whole, parts = runs.Run(folder / "whole"), runs.Run(folder / "parts")
    assert whole.metrics.read_bytes() == parts.metrics.read_bytes()
    state = restored(whole).state
    # 12 batches of 8 have been recorded, of all four times.
    assert int(state.memory.counts.sum()) == 96
    assert int(state.memory.counts.min()) > 10


@pytest.mark.parametrize("variance", ["range", "analytic"])
def test_evaluations_are_counted_whatever_the_variance(variance):
    config = digits_family.CONFIGS["digits_cosine_hybrid"]
    config = with_sampling(config, Sampling(steps=5, variance=variance))
    assert chains.count_evaluations(config, chains.Drawable(None)) == 5


@pytest.mark.parametrize("name", digits_family.CONFIGS)
def test_every_objective_can_be_drawn_by_every_rule_compared(name):
    """What does not fit is left out of the table, instead of ending it."""
    config, options = digits_family.CONFIGS[name], compare_samplers.Options()
    rows = {
        rule: compare_samplers.ways(rule, config, options)
        for rule in (*compare_samplers.rows(), "ode")
        if takes(config.few.method, rule.split()[0])
    }
    assert len(rows["unipc 2"]) == 7
    assert len(rows["ode"]) == (0 if config.net.classes else 3)
    assert len(rows["ddpm"]) == (1 if name.endswith("learned") else 8)
