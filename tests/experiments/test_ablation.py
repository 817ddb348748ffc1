"""The ablation command: every row under one budget, in parts if need be."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import continuous, gaussian, schedule
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.wiring import build, chains
from experiments import ablation

SMALL = shlex.split(
    "digits --rows table2_eps_simple edm --steps 16 --count 66 --bound-images 4"
)


NAME, JUDGES = "ablation_digits", ".classifiers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture
def tiny(monkeypatch):
    """Rows with a network as small as there is, a short chain, and few draws."""
    monkeypatch.setattr(ablation, "DRAWS", 1)
    planned = ablation.plan

    def small(made):
        made = config.replace(
            made, "net", channels=8, multipliers=(1,), blocks=1, attention=()
        )
        made = config.replace(made, "diffusion", num_steps=20)
        made = config.replace(made, "train", batch_size=8, devices=1)
        return config.replace(made, "sample", steps=4, count=4)

    def plan(options):
        return {row: small(made) for row, made in planned(options).items()}

    monkeypatch.setattr(ablation, "plan", plan)


def test_the_table_its_numbers_and_its_plot(folder, tiny, trained, capsys, monkeypatch):
    argv, out = [*SMALL, "--workers", "1", "--output", str(folder)], folder / NAME
    # The judge of all images, in place of one that has to be trained without a tenth.
    (out / JUDGES).mkdir(parents=True)
    judge = trained.folder.parent / JUDGES / "digits_8x8x1.safetensors"
    shutil.copy(judge, out / JUDGES / "digits_without_0.1_8x8x1.safetensors")
    known, measure = "table2_eps_simple", ablation.measure
    other = {"steps": 16, "skipped": 0, "diverged": None, "bound": 3.5}
    other |= {"bound_error": 0.1, "l_simple": 1.5, "distance": 9.0}

    def measured(chosen, options):
        return other if chosen.name == known else measure(chosen, options)

    monkeypatch.setattr(ablation, "measure", measured)
    assert ablation.main(argv) == 0
    result = json.loads((out / "ablation.json").read_text())
    assert list(result["rows"]) == [known, "edm"]
    assert result["distance"] == "fd_digits_classifier"
    assert result["rows"][known] == other
    row = result["rows"]["edm"]
    assert row["steps"] == 16
    assert row["bound"] > 0
    assert 0 < row["l_simple"] < 3
    assert row["distance"] > 0
    printed = capsys.readouterr().out
    table = (out / "ablation.txt").read_text()
    assert table.splitlines()[1] in printed
    with Image.open(out / "ablation.png") as image:
        assert image.size[0] > 800
    # Again, with what is known: nothing is trained or drawn.
    monkeypatch.setattr(ablation, "l_simple", None)
    assert ablation.main(argv) == 0
    assert json.loads((out / "ablation.json").read_text())["rows"] == result["rows"]


def test_l_simple_is_measured_at_the_noise_of_the_papers_schedule():
    share = np.linspace(0, 0.999, 200)
    paper = schedule.linear()(1 + (1000 * share).astype(int)).logsnr
    for chain in (
        schedule.linear(),
        schedule.cosine(),
        continuous.discretize(continuous.ve(sigma_min=0.002, sigma_max=80), clean=True),
    ):
        found = chain(ablation.paper_times(chain, share)).logsnr
        # To the nearest step of the chain, as far as it goes.
        there = np.maximum(paper, chain(1000).logsnr)
        np.testing.assert_allclose(found, there, atol=0.5)
        assert np.abs(found - there).mean() < 0.05


@pytest.mark.parametrize("row", ["edm", "table2_eps_simple"])
def test_a_network_that_says_nothing_errs_by_the_variance_of_the_noise(
    row, monkeypatch
):
    def silent(*args, **options):
        return lambda x_t, t: gaussian.Prediction(0 * x_t, 0 * x_t)

    monkeypatch.setattr(chains, "given_labels", silent)
    options = ablation.Options(rows=(row,), steps=16)
    made = ablation.plan(options)[row]
    drawable = chains.Drawable({})
    error = ablation.l_simple(made, drawable, build.load_data(made), options)
    np.testing.assert_allclose(error, 1, atol=0.01)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rows edn", "each of rows must be one of .*got 'edn'. Did you mean 'edm'"),
        ("--count 64 --rows edm", "count must be above 64"),
        ("--steps 0", "steps must be at least 1; got 0"),
    ],
)
def test_bad_options_are_named(folder, flags, words, monkeypatch):
    monkeypatch.setattr(ablation, "measured", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=words):
        ablation.main(["digits", "--output", str(folder), *flags.split()])
