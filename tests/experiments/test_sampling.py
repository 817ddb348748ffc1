"""Sampling rules by configuration, and the command that compares them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import rules
import small_run
from PIL import Image

from diffusion_jax import samplers
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import metrics, pictures
from diffusion_jax.lab.measure import extractors, reference
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import sampling
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.sampling import Sample, Sampling, override, resolve
from diffusion_jax.lab.schema.students import student
from diffusion_jax.lab.trained import opening
from diffusion_jax.lab.trained.weights import Weights
from diffusion_jax.lab.wiring import build, chains
from diffusion_jax.training import parallel
from experiments import compare_samplers, sample
from experiments.configs import EXPERIMENTS, digits


def test_the_adaptive_flow_is_drawn_with_its_strip(trained, tmp_path, monkeypatch):
    """By a network that is soon compiled: a solver has it many times."""
    monkeypatch.setattr(chains, "make_denoiser", small_run.denoiser)
    flags = ["--sampler", "ode", "--tolerance", "0.1", "--count", "2", "--out"]
    assert sample.main([str(trained.folder), *flags, str(tmp_path / "x.png")]) == 0
    for name in ("x.png", "x_denoising.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image).std() > 10


def test_another_rule_comes_with_its_own_defaults():
    mine = Sample(sampler="ddpm", steps=250, variance="small", count=9)
    same = override(mine, Sampling(steps=20))
    assert (same.steps, same.variance, same.count) == (20, "small", 9)
    other = override(mine, Sampling(sampler="unipc", order="3"))
    assert (other.steps, other.variance, other.count) == (None, None, 9)
    found = resolve(other, 1000)
    assert (found["steps"], found["grid"], found["order"]) == (20, "uniform", "3")
    assert resolve(other, 10)["steps"] == 10
    assert resolve(Sample(), 1000)["steps"] == 1000
    assert "steps" not in resolve(Sample(sampler="ode"), 1000)
    assert "clip" in resolve(Sample(sampler="ode"), 1000)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Sampling("heun", eta=0.5), "sample.eta must be left out with .* heun"),
        (Sampling("ddim", order="2"), "it is for dpm_solver_pp and unipc; got 2"),
        (Sampling("unipc", order="2M"), "one of 1, 2, 3 with unipc; got 2M"),
        (Sampling("dpm_solver_pp", order="2"), "1, 2S, 2M, 3M, SDE with dpm_solver_pp"),
        (Sampling("ode", steps=5), "sample.steps must be left out with .* ode"),
        (Sampling("edm", churn=-1.0), "sample.churn must be at least 0; got -1.0"),
        (Sampling("langevin", step_size=3.0), "above 0 and at most 2; got 3.0"),
        (Sampling(threshold=1.5), "sample.threshold must be above 0 and at most 1"),
    ],
)
def test_options_that_do_not_fit_are_named(how, words):
    with pytest.raises(ConfigError, match=words):
        with_sampling(digits.CONFIG, how)


def test_the_flag_that_is_named_exists(trained):
    with pytest.raises(ConfigError, match=r"Change it with --step-size\.$"):
        sample.main([str(trained.folder), "--sampler", "langevin", "--step-size", "3"])


def compared(trained, out, *flags):
    args = [
        str(trained.folder),
        "--count",
        "70",
        "--batch-size",
        "40",
        "--out",
        str(out),
    ]
    assert compare_samplers.main([*args, *flags]) == 0
    return json.loads((out / "samplers.json").read_text())


def test_the_table_its_numbers_and_its_plot(trained, tmp_path, capsys, monkeypatch):
    flags = ["--rules", "ddpm", "heun", "--evaluations", "4", "8"]
    found = compared(trained, tmp_path, *flags)
    shown = capsys.readouterr().out
    assert [(p["rule"], p["evaluations"]) for p in found["points"]] == [
        ("ddpm", 4),
        ("ddpm", 8),
        ("heun", 3),
        ("heun", 7),
    ]
    for point in found["points"]:
        assert np.isfinite(point["distance"])
        assert f"{point['distance']:.2f}" in shown
    assert found["points"][1]["sampling"]["steps"] == 8
    assert Image.open(tmp_path / "samplers.png").size == (1080, 600)

    # Again, with one more rule: what is known is not drawn twice.
    drawn, make = [], chains.make_sampler

    def counted(config, drawable, **options):
        drawn.append(config.sample.sampler)
        return make(config, drawable, **options)

    monkeypatch.setattr(chains, "make_sampler", counted)
    flags = ["--rules", "ddpm", "heun", "unipc 2", "--evaluations", "4", "8"]
    again = compared(trained, tmp_path, *flags)
    assert again["points"][:4] == found["points"]
    assert set(drawn) == {"unipc"}
    other = compared(trained, tmp_path, *flags[:2], "--evaluations", "4", "--seed", "1")
    assert other["points"][0]["distance"] != found["points"][0]["distance"]


def test_a_point_is_what_eval_fid_would_say(trained, tmp_path):
    """The same samples, whether the grid is padded or not."""
    found = compared(trained, tmp_path, "--rules", "unipc 2", "--evaluations", "5", "9")
    config = with_sampling(
        runs.read_config(trained), Sampling("unipc", order="2", steps=5)
    )
    assert found["points"][0]["sampling"] == chains.describe_sampling(config)
    out = tmp_path / "x.npz"
    flags = ["--sampler", "unipc", "--steps", "5", "--count", "70", "--format", "npz"]
    sample.main([str(trained.folder), *flags, "--out", str(out)])
    config = runs.read_config(trained)
    dataset = build.load_data(config)
    judge = extractors.choose("classifier", config, dataset)
    real = reference.of(config, dataset.images, "train", judge, batch_size=40)
    with np.load(out) as file:
        seen, _ = extractors.extract(judge, file["images"], batch_size=40, label="")
    fitted = reference.gaussian_of(seen)
    truth = metrics.frechet_distance(*fitted, real.mean, real.covariance)
    np.testing.assert_allclose(found["points"][0]["distance"], truth, rtol=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rules", "unipc"], "each of rules must be one of ddpm.*; got 'unipc'"),
        (["--evaluations", "0"], "evaluations must be numbers of at least 1.*0"),
        (["--count", "20"], "count must be above 64"),
        (["--count", "0"], "count must be at least 1; got 0"),
    ],
)
def test_bad_input_is_refused(trained, flags, words):
    with pytest.raises(ValueError, match=words):
        compare_samplers.main([str(trained.folder), *flags])


TAKERS = {
    "consistency": student(digits.CONFIG, "ect", init_from="runs/digits"),
    "mean_flow": EXPERIMENTS["digits_meanflow"].config,
}
"""Networks of few steps, by the rules that no other takes."""


def test_every_rule_is_compared():
    rows = compare_samplers.rows()
    assert {how.sampler for how in rows.values()} | {"ode"} == set(sampling.RULES)
    for name, row in rows.items():
        how = dataclasses.replace(row, steps=compare_samplers.steps_within(20, name))
        config = with_sampling(TAKERS.get(name, digits.CONFIG), how)
        assert 18 < chains.count_evaluations(config, chains.Drawable(None)) <= 20


def test_a_new_rule_is_a_row_of_the_table(trained, tmp_path, monkeypatch):
    """What configures, draws, counts and compares it goes by that row."""

    def half(denoise, levels, *, eta, churn):
        assert (eta, churn) == (0.25, 3.0)
        return samplers.ddim(denoise, levels, eta=eta)

    rule = sampling.Rule(half, {"eta": 0.5, "churn": 3.0}, "quadratic", 4)
    monkeypatch.setitem(sampling.RULES, "half", rule)
    config = with_sampling(runs.read_config(trained), Sampling("half", eta=0.25))
    said = "4 steps of half (eta 0.25, churn 3.0, quadratic grid)"
    assert sampling.describe(chains.describe_sampling(config)) == said
    assert chains.count_evaluations(config, chains.Drawable(None)) == 4
    drawable, *_ = opening.load(config, trained, Weights())
    draw = chains.make_draw(config, 8, parallel.make_mesh())
    same = with_sampling(config, Sampling("ddim", 4, "quadratic", eta=0.25))
    usual = chains.make_draw(same, 8, parallel.make_mesh())
    key = jax.random.key(0)
    np.testing.assert_array_equal(draw(drawable, key), usual(drawable, key))
    with pytest.raises(ConfigError, match="it is for ddim and half"):
        with_sampling(config, Sampling("heun", eta=0.5))

    monkeypatch.setitem(rule.options, "eta", 0.25)
    found = compared(trained, tmp_path, "--rules", "half", "--evaluations", "5")
    assert [(p["rule"], p["evaluations"]) for p in found["points"]] == [("half", 5)]


def test_every_rule_by_name_is_held_to_what_all_rules_are():
    tested = {name.partition("-")[0] for name in rules.RULES}
    # Those of networks of few steps are held to such ones, in test_distillation.
    known = {"predictor_corrector", *TAKERS}
    assert tested - {"pc"} | known == set(sampling.RULES)


def test_curves_are_drawn_even_of_nothing():
    series = {"a": [(1.0, 2.0), (10.0, 1.0)], "b": [], "c": [(3.0, 3.0)]}
    picture = pictures.curves(series, title="t", xlabel="x", ylabel="y")
    assert picture.size == (1080, 600)
