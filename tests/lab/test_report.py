"""What is known of runs, whole and damaged: lists, comparisons and pages."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.report import elements, page, reading, tables
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema.config import replace, to_dict
from experiments import report
from experiments import runs as listing
from experiments.configs import EXPERIMENTS

DIGITS = EXPERIMENTS["digits"].config
NASTY = "<script>alert(1)</script>"
RULE = {"sampler": "ddim", "steps": 20, "grid": "uniform", "eta": 0.0}
STEPS = "20 steps of ddim (eta 0.0, uniform grid)"
OF = {"weights": "averaged", "training_step": 100}
MEASURED = {"mean": 1.5, "of_each": [1.5], "std": 0.1}
NUMBERS = {"fd_digits_classifier vs train": MEASURED, "class_shares": [0.5, 0.5]}
MADE = {"extractor": "digits_classifier", "count": 500, "seeds": [0, 1]}
AGAINST = {"data": "digits", "reference": {"train": "1,617 train images"}}
FID = {"numbers": NUMBERS, **MADE, **AGAINST, **OF, **RULE}
BOUND = {"bits_per_dim": 3.5, "standard_error": 0.01, "split": "train", "images": 16}
CODE = {"prior": 0.25, "terms": [1.0, 0.5, 0.25], "mse": [0.01, 0.04, 0.25]}
NLL = {**OF, **BOUND, **CODE}


def write(folder, name, config=DIGITS, loss=0.5):
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
    results.write(run, "fid", {"weights_sha256": "0", **FID})
    runs.write_json(run.folder / "eval" / "nll_train.json", NLL)
    Image.new("RGB", [80, 30]).save(run.folder / "eval" / "neighbours.png")
    return run


@pytest.fixture
def two(tmp_path):
    other = replace(DIGITS, "net", channels=32)
    return write(tmp_path, "first"), write(tmp_path, "second", other, loss=0.25)


def shown(capsys, *words):
    assert listing.main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_list_has_a_line_a_run(two, tmp_path, capsys):
    head, *lines = shown(capsys, tmp_path).splitlines()
    assert head.split() == " ".join(listing.HEAD).split()
    first, second = sorted(lines)
    assert "first   digits      100/5,000  0.5000  1.5 fd_digits_classifier" in first
    assert first.endswith(" s")
    assert "second  digits +1   100/5,000  0.2500" in second
    assert shown(capsys, "list", tmp_path / "first").count("\n") == 2
    with pytest.raises(ConfigError, match="must hold runs; got none"):
        listing.main([str(tmp_path / "nowhere")])
    # What a file says does nothing to a terminal.
    run = write(tmp_path, "run\x1b[2J")
    run.config.write_text(json.dumps({"\x1b[31m": 1}))
    assert "\x1b" not in shown(capsys, tmp_path)


def test_two_runs_are_compared_configurations_first(two, capsys):
    said = shown(capsys, "compare", *(run.folder for run in two))
    differ, figures = said.split("\n\nFigures\n")
    assert [line.split() for line in differ.splitlines()[1:]] == [
        ["first", "second"],
        ["net.channels", "16", "32"],
    ]
    for words in ("loss (mean of the last tenth)", "1.5 ± 0.1", STEPS):
        assert f"  {words}" in figures
    one = str(two[0].folder)
    for names in ([one], [one, f"{one}/../first"]):
        with pytest.raises(ConfigError, match=r"two runs or more; got 1\."):
            listing.main(["compare", *names])


def test_the_best_is_the_lowest_of_what_was_measured_last(two):
    for name, mean, more in (
        ("FID vs train", 9.0, {"training_step": 50}),
        ("FID vs train", 2.0, {}),
        ("FID vs train", 8.0, {"training_step": 40}),
        ("FID vs train", 0.5, {"weights": "untrained"}),
        ("FID vs test", 0.2, {}),
    ):
        numbers = {"numbers": {name: {"mean": mean}}}
        results.write(two[0], "fid", {**FID, **numbers, **more})
    story = reading.story(two[0])
    assert reading.best(story) == ("FID vs train", 2.0, 100)
    # What is the best is marked, and what is no default.
    table = tables.figures([story, reading.story(two[1])])
    marked = [(table.rows[row][0], column) for row, column in table.marked]
    assert ("loss (mean of the last tenth)", 2) in marked
    assert "step" not in dict(marked)
    parts = {part.title: part for part in tables.configuration(reading.story(two[1]))}
    assert parts["net"].rows[0] == ("channels", "32")
    assert (0, 1) in parts["net"].marked


def line(path, text):
    return lambda run: (run.folder / path).write_text(text)


def pipe(run):
    run.metrics.unlink()
    os.mkfifo(run.metrics)


# Ways to damage a run, by what is said of it.
DAMAGES = {
    "config.json: Expecting property name": line("config.json", "{"),
    "config.json is not there": lambda run: run.config.unlink(),
    "metrics.jsonl: something else in line 1": line("metrics.jsonl", "[]\n[]\n"),
    "metrics.jsonl is no regular file": pipe,
    "metrics.jsonl ends at step 0": line("metrics.jsonl", ""),
    "speed.jsonl: something else in line 1": line("speed.jsonl", "\0\n\n"),
    "fid.json holds no object": line("eval/fid.json", "[]"),
    "nll_train.json: brackets": line("eval/nll_train.json", "[" * 100_000),
    "1 of its checkpoints set aside": lambda run: (
        run.checkpoints / "50.damaged"
    ).mkdir(),
    "it has no checkpoint": lambda run: shutil.rmtree(run.checkpoints),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_run_is_shown_with_what_is_wrong(said, two, tmp_path, capsys):
    DAMAGES[said](two[1])
    text = shown(capsys, tmp_path)
    assert f"note: second: {said}" in text
    assert text.count("note: ") == 1
    assert "second: " in shown(capsys, "compare", *(run.folder for run in two))
    assert f"second: {said}" in reported(tmp_path, *two).text


class Parser(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def reported(tmp_path, *found, more=()):
    out = tmp_path / "out.html"
    folders = (str(run.folder) for run in found)
    assert report.main([*folders, "--out", str(out), *more]) == 0
    assert out.stat().st_size < 2_000_000
    return Parser(out.read_text())


def test_a_report_of_a_run_has_all_that_is_known_of_it(two, tmp_path):
    page = reported(tmp_path, two[0])
    for said in (
        "digits as 8x8x1; v predicted under the cosine schedule, T = 1,000",
        "252,545 weights",
        "100 of 5,000",
        "Loss by time",
        "images a second",
        "step 50",
        "1.5 ± 0.1",
        STEPS,
        "averaged weights of step 100",
        "Nearest neighbours",
        "Error by rate, training images",
        "label_dropout",
    ):
        assert said in page.text, said
    assert "What is damaged" not in page.text
    # The last grid is shown twice.
    assert [tag for tag, _ in page.tags].count("img") == 4
    # Rate and distortion as the closed form has them, the first step at the left.
    code = [d["d"] for tag, d in page.tags if tag == "path"][-1]
    assert re.fullmatch(r"M[^L]+(L[^L]+){2}", code)


def test_several_runs_stand_side_by_side_what_differs_first(two, tmp_path):
    page = reported(tmp_path, *two)
    heads = re.findall("<h2>(.*?)</h2>", (tmp_path / "out.html").read_text())
    assert heads[:2] == ["What differs in their configurations", "Figures"]
    assert len(heads) == 7
    assert re.search(r"net\.channels\s*16\s*32", page.text)
    again = reported(tmp_path, *two, two[0]).text
    assert again.partition("Made ")[0] == page.text.partition("Made ")[0]
    many = [shutil.copytree(two[0].folder, tmp_path / str(i)) for i in range(9)]
    with pytest.raises(ConfigError, match="at most 8 runs; got 9"):
        report.main([*map(str, many)])


def foreign(page):
    for tag, attributes in page.tags:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form", "a"):
            yield tag
        for name, value in attributes.items():
            inside = name == "src" and value.startswith("data:image/")
            if name.startswith("on") or (name in ("src", "href") and not inside):
                yield tag, name, value


def spoiled(values, text):
    """Puts a text wherever one may stand, and where none may."""
    if isinstance(values, dict):
        return {f"{k}{text}": spoiled(v, text) for k, v in values.items()} | values
    if isinstance(values, list):
        return [*(spoiled(v, text) for v in values), text]
    return text if isinstance(values, str) else values


def test_nothing_of_a_file_becomes_a_part_of_the_page(tmp_path):
    run = write(tmp_path, f"run{NASTY.replace('/', '')}")
    source = f'npz:"><img src=x onerror=alert(1)>{NASTY}'
    config = replace(DIGITS, "data", source=source, hold_out=0.0)
    runs.write_json(run.config, to_dict(config))
    kinds = {"fid": FID, "nll_train": NLL, f"x{NASTY.replace('/', '')}": FID}
    for name, values in kinds.items():
        changed = spoiled(values, NASTY) | {"sampler": "ddim"}
        runs.write_json(run.folder / "eval" / f"{name}.json", changed)
    clean = reported(tmp_path, write(tmp_path, "clean"))
    page = reported(tmp_path, run)
    assert NASTY in page.text  # it is text
    assert not [*foreign(page)]
    assert {tag for tag, _ in page.tags} <= {"ul", *(tag for tag, _ in clean.tags)}
    (policy,) = (d for t, d in page.tags if d.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none';")


def test_large_pictures_and_long_logs_stay_below_two_megabytes(tmp_path):
    run = write(tmp_path, "large")
    noise = np.random.default_rng(0).integers(0, 256, [400, 400, 3], np.uint8)
    for step in range(1, 9):
        Image.fromarray(noise).save(run.samples / f"step_{step:08d}.png")
    (run.samples / "step_00000009.png").write_bytes(b"no picture")
    lines = ({"step": s, "loss": 1 / s, "grad_norm": s % 7} for s in range(1, 3000))
    runs.write_lines(run.metrics, lines)
    pictures = [d["src"] for t, d in reported(tmp_path, run).tags if t == "img"]
    assert any(source.startswith("data:image/webp") for source in pictures)


def test_a_report_replaces_only_a_report(two, tmp_path):
    for _ in range(2):
        reported(tmp_path, two[0])
    (tmp_path / "out.html").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        reported(tmp_path, two[0])
    reported(tmp_path, two[0], more=["--overwrite"])
    assert report.main([str(two[0].folder)]) == 0
    assert (two[0].folder / "report.html").is_file()


KEYS = [*FID, *NLL, "points", "bytes_each", "mean", "std", "loss_by_time", "certainty"]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


@settings(max_examples=20, deadline=None)
@given(result=st.dictionaries(st.sampled_from(KEYS), ANY), line=ANY)
def test_whatever_is_in_the_files_there_is_a_page(result, line):
    with tempfile.TemporaryDirectory() as folder:
        run = write(Path(folder), "run")
        run.metrics.write_text(json.dumps({"step": 1, "loss_by_time": line}) + "\n")
        results.write(run, "fid", {**FID, **result})
        runs.write_json(run.folder / "eval" / "fid.json", result)
        story = reading.story(run)
        assert not [*foreign(Parser(page.page([story, story], "made", 0.0)))]
        listing.row(story)


def test_a_line_is_where_its_numbers_are():
    axis = elements.Axis(0, 10, 100, 200)
    assert [axis(x) for x in (0, 5, 10)] == [100, 150, 200]
    logs = elements.Axis(0.01, 1, 0, 100, logarithmic=True)
    assert logs(0.1) == pytest.approx(50)
    points = [(float(x), 2.0 * x) for x in range(1000)]
    few = elements.thinned(points)
    assert len(few) <= elements.MOST_POINTS
    assert all(y == pytest.approx(2 * x) for x, y in few)
    assert elements.smoothed(points)[500] == pytest.approx(points[500])
