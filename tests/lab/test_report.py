"""What is known of runs, whole and damaged: lists, comparisons and pages."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.report import reading, tables
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import replace, to_dict
from experiments import runs as listing
from experiments.configs import EXPERIMENTS

DIGITS = EXPERIMENTS["digits"].config
NASTY = "<script>alert(1)</script>"
FID = {
    "numbers": {
        "fd_digits_classifier vs train": {"mean": 1.5, "of_each": [1.5], "std": 0.1},
        "class_shares": [0.5, 0.5],
    },
    "extractor": "digits_classifier",
    "count": 500,
    "seeds": [0, 1],
    "weights": "averaged",
    "training_step": 100,
    "data": "digits",
    "reference": {"train": "1,617 train images"},
    "sampler": "ddim",
    "steps": 20,
    "grid": "uniform",
    "eta": 0.0,
}
NLL = {
    "bits_per_dim": 3.5,
    "standard_error": 0.01,
    "prior": 0.25,
    "terms": [1.0, 0.5, 0.25],
    "mse": [0.01, 0.04, 0.25],
    "weights": "averaged",
    "training_step": 100,
    "split": "train",
    "images": 16,
}


def write(folder, name, config=DIGITS, loss=0.5):
    """Writes what training and evaluation leave, without either."""
    run = runs.Run(folder / name)
    (run.checkpoints / "100").mkdir(parents=True)
    run.samples.mkdir()
    (run.folder / "eval").mkdir()
    runs.write_json(run.config, to_dict(dataclasses.replace(config, name=name)))
    for step in range(50, 101, 50):
        quarters = [0.1, 0.2, 0.3, None]
        line = {"step": step, "loss": loss * 100 / step, "loss_by_time": quarters}
        runs.append_line(run.metrics, {**line, "skipped": 0, "grad_norm": 1.0})
        speed = {"images_per_second": 100.0, "time": 1e9 + 36 * step}
        runs.append_line(run.speed, {"step": step, **speed})
        grid = np.random.default_rng(step).integers(0, 256, [90, 90, 3], np.uint8)
        Image.fromarray(grid).save(run.samples / f"step_{step:08d}.png")
    result = {"weights_sha256": "0", **FID}
    runs.write_json(run.folder / "eval" / "fid.json", result)
    runs.append_line(run.folder / "eval" / "results.jsonl", {"name": "fid", **result})
    runs.write_json(run.folder / "eval" / "nll_train.json", NLL)
    Image.new("RGB", [80, 30]).save(run.folder / "eval" / "neighbours.png")
    return run


@pytest.fixture
def two(tmp_path):
    """Two runs, of which the second is better."""
    other = replace(DIGITS, "net", channels=32)
    return write(tmp_path, "first"), write(tmp_path, "second", other, loss=0.25)


def shown(capsys, *words):
    assert listing.main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_list_has_a_line_a_run(two, tmp_path, capsys):
    head, *lines = shown(capsys, tmp_path).splitlines()
    assert tuple(head.split()) == (*" ".join(listing.HEAD).split(),)
    first, second = sorted(lines)
    assert "first   digits      100/5,000  0.5000  1.5 fd_digits_classifier" in first
    assert "second  digits +1   100/5,000  0.2500" in second
    assert first.endswith(" s")
    assert shown(capsys, "list", tmp_path / "first").count("\n") == 2


def test_two_runs_are_compared_configurations_first(two, tmp_path, capsys):
    said = shown(capsys, "compare", *(run.folder for run in two))
    differ, figures = said.partition("\n\nFigures\n")[::2]
    assert [line.split() for line in differ.splitlines()[1:]] == [
        ["first", "second"],
        ["net.channels", "16", "32"],
    ]
    assert "  loss (mean of the last tenth)" in figures
    assert "1.5 ± 0.1" in figures
    assert "20 steps of ddim (eta 0.0, uniform grid)" in figures
    with pytest.raises(ConfigError, match=r"two runs or more; got 1\."):
        listing.main(["compare", "first"])
    with pytest.raises(ConfigError, match="must hold runs; got none"):
        listing.main([str(tmp_path / "nowhere")])


def test_the_best_is_the_lowest_of_what_was_measured_last(two):
    path = two[0].folder / "eval" / "results.jsonl"
    for name, mean, more in (
        ("FID vs train", 9.0, {"training_step": 50}),
        ("FID vs train", 2.0, {}),
        ("FID vs train", 8.0, {"training_step": 40}),
        ("FID vs train", 0.5, {"weights": "untrained"}),
        ("FID vs test", 0.2, {}),
    ):
        result = {**FID, "numbers": {name: {"mean": mean}}, **more}
        runs.append_line(path, {"name": "fid", **result})
    assert reading.best(reading.story(two[0])) == ("FID vs train", 2.0, 100)


def damages():
    """Ways to damage a run, by what is said of it."""

    def line(path, text):
        return lambda run: (run.folder / path).write_text(text)

    def pipe(run):
        run.metrics.unlink()
        os.mkfifo(run.metrics)

    def aside(run):
        (run.checkpoints / "50.damaged").mkdir()

    def gone(run):
        shutil.rmtree(run.checkpoints)

    return {
        "config.json: Expecting property name": line("config.json", "{"),
        "config.json is not there": lambda run: run.config.unlink(),
        "metrics.jsonl: something else in line 1": line("metrics.jsonl", "[]\n[]\n"),
        "metrics.jsonl is no regular file": pipe,
        "metrics.jsonl ends at step 0": line("metrics.jsonl", ""),
        "speed.jsonl: something else in line 1": line("speed.jsonl", "\0\n\n"),
        "fid.json holds no object": line("eval/fid.json", "[]"),
        "nll_train.json: brackets": line("eval/nll_train.json", "[" * 100_000),
        "1 of its checkpoints set aside": aside,
        "it has no checkpoint": gone,
    }


@pytest.mark.parametrize("said", damages())
def test_a_damaged_run_is_listed_with_what_is_wrong(said, two, tmp_path, capsys):
    damages()[said](two[1])
    text = shown(capsys, tmp_path)
    assert f"note: second: {said}" in text
    assert text.count("note: ") == 1
    assert "second: " in shown(capsys, "compare", *(run.folder for run in two))


def test_what_a_file_says_does_nothing_to_a_terminal(tmp_path, capsys):
    run = write(tmp_path, "run\x1b[2J")
    run.config.write_text(json.dumps({"\x1b[31m": 1}))
    assert "\x1b" not in shown(capsys, tmp_path)


def test_a_cell_is_marked_where_one_is_best(two):
    table = tables.figures([reading.story(run) for run in two])
    names = [row[0] for row in table.rows]
    assert (names.index("loss (mean of the last tenth)"), 2) in table.marked
    assert all(names[row] != "step" for row, _ in table.marked)
    values = tables.configuration(reading.story(two[1])).rows
    assert ("net.channels", "32") in values
