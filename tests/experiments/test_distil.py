"""Students of few steps: trained by the command, resumed, sampled, and refused."""

import dataclasses
import shlex
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_run import SMALL, digests, restored, train_small

from diffusion_jax import gaussian, lab, losses
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab import notebook
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import checks
from diffusion_jax.lab.schema.config import Train, replace
from diffusion_jax.lab.schema.few import DISTILLED, Few
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.schema.students import student
from diffusion_jax.lab.trained import weights
from diffusion_jax.lab.training import initial
from diffusion_jax.lab.wiring import build, few_steps, learning
from diffusion_jax.storage import trees
from diffusion_jax.training.state import TrainState
from experiments import compare_samplers, distil, sample, train
from experiments.configs import EXPERIMENTS, cifar10, digits

SHORT = shlex.split(
    "--train.steps 12 --train.log-every 4 --train.checkpoint-every 4 "
    "--sample.every 12 --sample.count 4 --optimizer.warmup 2 --train.devices 1"
)


@pytest.fixture
def teacher(trained, small_network):
    """Beside a classifier that is trained."""
    return train_small(trained.folder.parent, "teacher")


def distilled(teacher, folder, name, *flags):
    where = ["--output", str(folder), "--name", name]
    assert distil.main([str(teacher.folder), *flags, *SHORT, *where]) == 0
    return runs.Run(folder / name)


def params_of(run):
    return weights.load(runs.read_config(run), run, weights.Weights())[0]


def test_a_student_trains_resumes_to_the_bit_and_is_sampled(teacher, tmp_path):
    run = distilled(teacher, tmp_path, "whole")
    lines = runs.read_lines(run.metrics)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(0 < line["self_consistency"] < 2 for line in lines)
    told = runs.json_fields.load(run.folder / "teacher.json")
    params, where = params_of(teacher), str(teacher.folder)
    assert (told["sha256"], told["teacher"]) == (trees.digest(params), where)
    memory = restored(run).state.memory
    assert memory.step == 12
    jax.tree.map(np.testing.assert_array_equal, memory.teacher, params)
    # It needs its teacher no more.
    parts = distilled(teacher, tmp_path, "parts", "ect", "--train.stop-at", "4")
    moved = teacher.folder.rename(teacher.folder.with_name("away"))
    config = replace(runs.read_config(parts), "train", stop_at=None)
    assert lab.train(config).step == 12
    moved.rename(teacher.folder)
    assert digests(parts) == digests(run)

    net, key = lab.load(run.folder), jax.random.key(0)
    assert net.config.sample.sampler == "consistency"
    assert net.sample(key, 2, steps=1).shape == (2, 8, 8, 1)
    image, again = np.zeros((1, 8, 8, 1), np.uint8), [str(run.folder), *SHORT]
    for refused, words in (
        (lambda: net.sample(key, 1, sampler="ddim"), "consistency, since its x0"),
        (
            lambda: lab.load(teacher.folder).sample(key, 1, sampler="consistency"),
            "few.method ect or cons",
        ),
        (lambda: net.bits_per_dim(image), r"mean of the images.*few.method ect"),
        (lambda: distil.main(again), "not distilled; got one of few.method ect"),
    ):
        with pytest.raises(ConfigError, match=words):
            refused()
    out = ["--out", str(tmp_path / "table"), "--count", "80", "--evaluations", "1", "2"]
    both = [str(teacher.folder), "--rules", "ddim", "--beside", str(run.folder)]
    for _ in range(2):  # and again what is known
        assert compare_samplers.main([*both, *out]) == 0
        points = runs.json_fields.load(tmp_path / "table" / "samplers.json")["points"]
        found = [(p["rule"], p["evaluations"]) for p in points]
        rules = ("ddim", "whole consistency")
        assert found == [(rule, n) for rule in rules for n in (1, 2)]


def test_halving_ends_in_one_step_taught_by_the_student_of_two(teacher, tmp_path):
    own = {"name": "halved", "output": str(tmp_path), "few": Few(first=4)}
    plan = Train(12, batch_size=8, log_every=4, checkpoint_every=4, devices=1)
    found = lab.distil(teacher.folder, "progressive", train=plan, **own)
    run = found.run
    # What few= leaves out is the student's.
    assert found.config.few == Few("progressive", first=4)
    memory = restored(run).state.memory
    ends = np.asarray(jax.tree.leaves(memory.teacher)[0])
    assert np.any(ends != np.asarray(jax.tree.leaves(params_of(teacher))[0]))
    config = runs.read_config(run)
    # Stages of 4, 2 and 1 steps on the 20 of the chain.
    for step, ends in ((0, (10, 8, 5)), (5, (10, 5, 0)), (9, (20, 10, 0))):
        times = few_steps._halved(config, jnp.asarray(step), jnp.asarray([7.0]))
        assert [float(t[0]) for t in times] == list(ends)
    assert sample.main([str(run.folder), "--count", "1"]) == 0
    with pytest.raises(ConfigError, match=r"sample.steps must be 1, without eta"):
        checks.with_sampling(config, Sampling("ddim", steps=2))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_consistency_is_taught_at_even_angles_between_the_whole_times(name):
    made = student(digits.CONFIG, "consistency", init_from="x")
    made = replace(made, "diffusion", schedule=name)
    key, levels = jax.random.key(0), build.make_schedule(made)
    t, _ = learning.draw_times(made, key, jnp.arange(1000), levels, None)
    level = few_steps.real_schedule(made)(t)
    angles = np.sort(np.arctan2(level.sigma, level.alpha)) / (np.pi / 2)
    wanted = np.minimum(np.linspace(0, 1.05, 1000), 1)
    np.testing.assert_allclose(angles, wanted, atol=0.05)
    assert (t > 999.9).mean() == pytest.approx(0.05, abs=0.02)
    assert np.mean(t % 1 > 0) > 0.9


def test_mean_flow_trains_from_scratch_and_jumps(tmp_path):
    flags = ["--train.log-every", "4", "--output", str(tmp_path), "--sample.steps", "2"]
    assert train.main(["digits_meanflow", *SMALL, *flags]) == 0
    net = lab.load(tmp_path / "digits_meanflow")
    one, other = (
        net.sample(jax.random.key(0), 2, sampler=rule, steps=1)
        for rule in ("mean_flow", "ddim")
    )
    assert np.any(one != other)  # it is told how far it jumps
    lines = runs.read_lines(net.run.metrics)
    assert [0 < line["self_consistency"] < 5 for line in lines] == [True] * 3


def test_networks_of_jumps_are_told_times_without_fast_waves(monkeypatch):
    def apply(variables, x, t, label, span):
        return t, span

    monkeypatch.setattr(build, "make_network", lambda _: SimpleNamespace(apply=apply))
    made, one = EXPERIMENTS["digits_meanflow"].config, jnp.ones(1)
    told = build.make_apply(made, {"net": {}}, few_steps.real_schedule(made))
    assert told(jnp.ones([1, 8, 8, 1]), one, None, one / 2) == (10, 5)


@pytest.mark.parametrize("method", DISTILLED)
def test_every_method_has_a_loss_of_its_own_and_guided(method):
    made = student(digits.CONFIG, method, init_from="x")
    made = replace(made, "net", classes=10, label_dropout=0.1)
    made = dataclasses.replace(made, few=Few(method, guidance=2.0))
    checks.validate(made)
    state = learning.state_shapes(made)
    number = jax.ShapeDtypeStruct((4,), jnp.int32)
    batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.uint8)}
    batch |= {"position": number, "label": number}
    loss = learning.make_loss(made)
    _, seen = jax.eval_shape(loss, state.params, batch, state.key, state.memory)
    assert seen["loss"].shape == (4,)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["magic"], "METHOD must be one of ect.*got 'magic'"),
        (["ect", "--few.guidance", "2"], "few.guidance must be left out where no"),
        (["progressive", "--few.first", "6"], r"few.first must be few.last = 1 times"),
        (["progressive", "--few.first", "16"], "at most 10, for the 20 diffusion"),
        (["--sample.sampler", "ddpm"], "sample.sampler must be consistency, since"),
        (["--sample.steps", "21"], "sample.steps must be at most"),
        (["--few.method", "none"], "sample.sampler must be another than consistency"),
        (["--few.method", "mean_flow"], "diffusion.schedule must be flow"),
    ],
)
def test_what_does_not_fit_is_refused(trained, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        distil.main([str(trained.folder), *flags, "--output", str(tmp_path)])


def of_gaussian_data(params, made, n, key):
    """The loss of `few_steps` on data N(0, 0.5^2), by networks x -> c(t) x."""
    keys, levels = jax.random.split(key, 3), few_steps.real_schedule(made)
    t = few_steps.times(made, jax.random.uniform(keys[0], [256]))
    x0, eps = (jax.random.normal(key, [256, 1]) for key in keys[1:])
    x0, level = x0 / 2, levels(t)
    if made.few.method == "none":
        pred = seen(made, params, levels)(gaussian.q_sample(x0, eps, level), t)
        return losses.simple(pred, x0, eps, level).mean()
    memory = few_steps.Memory(params, n)
    return few_steps.loss(made, params, memory, x0, eps, (t, t, t), None).mean()


def seen(made, params, levels, *_, **__):
    def denoise(x, t):
        out = tiny.through(params, t[:, None] / 1000) * x
        return gaussian.predict(made.diffusion.prediction, out, x, levels(t))

    return denoise


def test_a_student_of_a_network_of_eps_learns_its_mean_and_then_the_truth(monkeypatch):
    teacher = replace(digits.CONFIG, "diffusion", schedule="linear", prediction="eps")
    made = replace(student(teacher, "ect", init_from="x"), "train", steps=4000)
    checks.validate(made)
    monkeypatch.setattr(few_steps, "seen", seen)
    t, levels = jnp.array([50.0, 300.0, 600.0, 1000.0]), few_steps.real_schedule(made)
    variance = levels(t).alpha ** 2 / 4 + levels(t).sigma ** 2
    mean, end = levels(t).alpha / 4 / variance, 0.5 / jnp.sqrt(variance)

    def learned(params, config, first, steps):
        def loss(params, key, n):
            return of_gaussian_data(params, config, first + n, key)

        params = tiny.trained(loss, params, steps, 3e-3)
        return params, seen(config, params, levels)(jnp.ones([4, 1]), t).x0[:, 0]

    params, _ = learned(tiny.fresh(jax.random.key(0), 1, 1), teacher, 0, 500)
    params, found = learned(params, made, 0, 1000)
    np.testing.assert_allclose(found, mean, atol=2e-2)
    params, found = learned(params, made, 1000, 3000)
    np.testing.assert_allclose(found, end, atol=1e-2)


def test_what_learns_v_is_its_own_teacher():
    eps = replace(digits.CONFIG, "diffusion", prediction="eps")
    made = student(eps, "consistency", init_from="x")
    one, two = {"w": jnp.ones(1)}, {"w": jnp.full(1, 2.0)}
    for step, teacher in ((416, two), (417, one)):
        memory = few_steps.Memory(one, step - 1)
        state = TrainState(jnp.asarray(step), two, (two,), (), memory, None)
        assert few_steps.remembered(made, state).memory.teacher == teacher
    base = EXPERIMENTS["digits_consistency"].config
    begun = initial.like(base, eps)
    assert (begun.diffusion.prediction, begun.few.learn_v) == ("v", 0.25)
    assert initial.like(base, begun).few == begun.few  # resumed


def test_fields_in_place_of_the_students_leave_it_a_student(monkeypatch):
    eps = replace(digits.CONFIG, "diffusion", prediction="eps")
    run = SimpleNamespace(network=None, folder="there")
    teacher = SimpleNamespace(config=eps, run=run)
    monkeypatch.setattr(notebook, "load", lambda where: teacher)
    monkeypatch.setattr(notebook, "train", lambda config: config)
    made = lab.distil("there", "consistency", few=Few(tangent_warmup=0.5))
    assert made.few == Few("consistency", tangent_warmup=0.5, learn_v=0.25)
    assert lab.distil("there", few=Few(learn_v=0.1)).few == Few("ect", learn_v=0.1)


def test_teachers_that_cannot_be_are_refused(tmp_path):
    eps = replace(digits.CONFIG, "diffusion", prediction="eps", schedule="ve")
    with pytest.raises(ConfigError, match=r"one of v, edm, velocity.*eps tells no"):
        checks.validate(student(eps, "ect", init_from="x"))
    with pytest.raises(ConfigError, match="RUN must be a folder"):
        distil.main([str(tmp_path / "nothing")])
    made = EXPERIMENTS["digits_consistency"].config
    with pytest.raises(ConfigError, match=r"given with few.method ect"):
        checks.of_training(dataclasses.replace(made, init_from=None))


def test_experiments_of_few_steps_fit_their_teachers():
    for name, made in EXPERIMENTS.items():
        few = made.config.few
        if few.method in ("none", "mean_flow"):
            continue
        teacher = EXPERIMENTS[made.config.init_from.removeprefix("runs/")].config
        assert teacher.few.method == "none", name
        assert teacher.diffusion == made.config.diffusion
    large = EXPERIMENTS["cifar10_meanflow"].config
    assert large.net.channels == cifar10.CONFIG.net.channels
