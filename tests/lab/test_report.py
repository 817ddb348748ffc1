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
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.config import replace, to_dict
from experiments import report
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
    one = str(two[0].folder)
    for names in ([one], [one, f"{one}/../first"]):
        with pytest.raises(ConfigError, match=r"two runs or more; got 1\."):
            listing.main(["compare", *names])
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
    (net,) = (
        t for t in tables.configuration(reading.story(two[1])) if t.title == "net"
    )
    assert net.rows[0] == ("channels", "32")
    assert (0, 1) in net.marked
    assert ("attention", "4") in net.rows


class Parser(HTMLParser):
    """Collects tags, their attributes and the text of a page."""

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
    words = [*(str(run.folder) for run in found), "--out", str(out), *more]
    assert report.main(words) == 0
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
        "20 steps of ddim (eta 0.0, uniform grid)",
        "averaged weights of step 100",
        "Nearest neighbours",
        "Error by rate, training images",
        "label_dropout",
    ):
        assert said in page.text, said
    assert "What is damaged" not in page.text
    assert [tag for tag, _ in page.tags].count(
        "img"
    ) == 4  # the last grid is shown twice
    # Rate and distortion as the closed form has them, the first step at the left.
    code = [d["d"] for tag, d in page.tags if tag == "path"][-1]
    assert re.fullmatch(r"M[^L]+(L[^L]+){2}", code)


def test_several_runs_stand_side_by_side_what_differs_first(two, tmp_path):
    page = reported(tmp_path, *two)
    heads = re.findall("<h2>(.*?)</h2>", (tmp_path / "out.html").read_text())
    assert heads == ORDER
    assert re.search(r"net\.channels\s*16\s*32", page.text)
    assert reported(tmp_path, *two, two[0]).text == page.text
    many = [tmp_path / "many" / str(i) for i in range(9)]
    for folder in many:
        (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="at most 8 runs; got 9"):
        report.main(list(map(str, many)))


ORDER = [
    "What differs in their configurations",
    "Figures",
    "Samples over steps",
    "Curves",
    "Evaluation",
    "Nearest neighbours",
    "Rate and distortion",
]


def foreign(page):
    """What a page would run or fetch."""
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
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags} - {"ul"} | {
        "ul"
    }
    (policy,) = (d for t, d in page.tags if d.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none';")


@pytest.mark.parametrize("said", damages())
def test_a_damaged_run_has_a_report_that_says_so(said, two, tmp_path):
    damages()[said](two[1])
    assert f"second: {said}" in reported(tmp_path, *two).text


def test_large_pictures_and_long_logs_stay_below_two_megabytes(tmp_path):
    run = write(tmp_path, "large")
    noise = np.random.default_rng(0).integers(0, 256, [400, 400, 3], np.uint8)
    for step in range(1, 9):
        Image.fromarray(noise).save(run.samples / f"step_{step:08d}.png")
    (run.samples / "step_00000009.png").write_bytes(b"no picture")
    lines = ({"step": s, "loss": 1 / s, "grad_norm": s % 7} for s in range(1, 3000))
    runs.write_lines(run.metrics, lines)
    page = reported(tmp_path, run)
    assert {d["src"][:15] for t, d in page.tags if t == "img"} >= {"data:image/webp"}


def test_a_report_replaces_only_a_report(two, tmp_path):
    reported(tmp_path, two[0])
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
        runs.write_json(run.folder / "eval" / "fid.json", result)
        runs.append_line(run.folder / "eval" / "results.jsonl", {**FID, **result})
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
