"""The table of speed: its rows, its minutes, and what is tried of the compiler."""

import copy
import json

import jax
import pytest
from test_bench import SMALL

from diffusion_jax.lab.schema import config
from diffusion_jax.lab.speed import measuring, tables
from experiments import bench
from experiments.configs import EXPERIMENTS

KNOWN = "xla_llvm_disable_expensive_passes=true"


def test_a_table_is_measured_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "table.json"
    flags = [*SMALL, "--table", "--batch-sizes", "8", "--out", str(out)]
    flags += ["--candidates", "none", "xla_wish=true", KNOWN, "--minutes", "60"]
    assert bench.main(["digits", *flags]) == 0
    found = json.loads(out.read_text())
    assert [(row["form"], row["what"], row["batch"]) for row in found["rows"][:3]] == [
        ("as configured", "train", 8),
        ("the authors' arithmetic", "train", 8),
        ("as configured", "sample", 8),
    ]
    train, authors, sample, none, wish, known = found["rows"]
    assert train["loss_after"] == 1 + 2 + 2 * 3  # as many steps as were made
    # From the same weights, with another average and another clipping.
    assert 0 < abs(authors["loss"] / train["loss"] - 1) < 0.01
    assert sample["evaluations_per_sample"] == 4
    assert none["loss"] == train["loss"]
    for row in (none, known):
        assert row["times_as_fast"] == pytest.approx(train["ms"] / row["ms"])
    assert (wish["form"], wish["error"]) == (
        "`xla_wish=true`",
        "not known to this jaxlib",
    )
    assert found["left_out"] == []
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.endswith(f"{text}written: {out}\n")
    ms = f"{sample['ms'] / 4:,.2f}"
    assert f"| an evaluation in sampling, as configured, float32 | 8 | {ms} |" in text
    wish = "| training, `xla_wish=true`, float32 | 8 | not known to this jaxlib | - |"
    assert wish in text


def test_rows_are_what_the_readme_shows():
    fast = config.replace(EXPERIMENTS["cifar10"].config, "net", dtype="bfloat16")
    one, two, authors, chains = tables.of_readme(fast, (128, 512))
    assert [work.batch for work in (one, two, authors, chains)] == [128, 512, 128, 512]
    assert one.config == two.config == fast
    assert authors.config == config.official(fast) != fast
    # A thousand evaluations of ddpm would take a quarter of an hour.
    assert (chains.config.sample.sampler, chains.config.sample.steps) == ("ddim", None)
    few = config.replace(fast, "sample", steps=9)
    assert tables.of_readme(few, (8,))[-1].config == few
    # What is the authors' already has no row twice.
    forms = [work.form for work in tables.of_readme(config.official(fast), (8,))]
    assert forms == ["the authors' arithmetic"] * 2


class Machine:
    """Takes minutes for its work by a clock of its own."""

    def __init__(self, monkeypatch, minutes, fails):
        self.now, self.minutes, self.fails, self.saved = 0.0, minutes, fails, []
        monkeypatch.setattr(tables.time, "perf_counter", lambda: 60 * self.now)
        monkeypatch.setattr(measuring, "ceiling", lambda *_: 1e12)
        monkeypatch.setattr(measuring, "row", self.row)
        monkeypatch.setattr(bench.peer, "check", lambda _: None)
        monkeypatch.setattr(bench.peer, "compare", self.peer)
        monkeypatch.setattr(bench.runs, "write_json", self.save)

    def takes(self, piece, **figures):
        self.now += self.minutes
        if piece in self.fails:
            raise self.fails[piece]
        return {"ms": 2.0, "loss": 0.5, "per_second": 1.0, **figures}

    def row(self, work, *_, fresh):
        assert not fresh
        more = {"tflops": 1.0, "devices": 8}
        return self.takes(work.option, **more)

    def peer(self, *_):
        return self.takes("peer", ratio=2.0)

    def save(self, path, report):
        self.saved.append(copy.deepcopy(report))

    def table(self, folder, *flags, minutes):
        out = ["--out", str(folder / "table.json"), "--minutes", minutes]
        assert bench.main(["digits", "--table", *out, *flags]) == 0
        return self.saved[-1]


def test_what_there_is_no_time_for_is_named(monkeypatch, capsys, tmp_path):
    machine = Machine(monkeypatch, minutes=1, fails={})
    options = ["--candidates", "none", "xla_a=1", "xla_b=2"]
    found = machine.table(tmp_path, *options, minutes="5.5")
    assert machine.now == 5  # another minute would not have fitted
    assert [row["form"] for row in found["rows"][4:]] == ["`none`"]
    assert found["left_out"] == [f"train 128, `xla_{name}`" for name in ("a=1", "b=2")]
    said = "Not tried, for want of time: train 128, `xla_a=1`; train 128, `xla_b=2`."
    assert said in capsys.readouterr().out
    # Before and after every piece all that there was had been written.
    assert [len(report["rows"]) for report in machine.saved[:6]] == [0, 1, 2, 3, 4, 5]


def test_what_fails_is_a_row(monkeypatch, capsys, tmp_path):
    fails = {
        "peer": RuntimeError("out of memory\nby far"),
        "xla_a=1": jax.errors.JaxRuntimeError("no such thing\nat all"),
    }
    machine = Machine(monkeypatch, minutes=0.1, fails=fails)
    candidates = ["--candidates", "xla_a=1", "xla_b=2"]
    found = machine.table(tmp_path, "--peer", *candidates, minutes="8")
    *rows, first, second = found["rows"]
    assert [row["peer"] for row in rows] == [{"error": "out of memory"}] * 4
    assert (first["form"], first["error"]) == ("`xla_a=1`", "no such thing")
    assert (second["times_as_fast"], second["loss"]) == (1.0, 0.5)
    row = "| training, `xla_b=2`, float32 | 128 | 2.00 | 1.0 | 1.000 | 100% | 0.5 |"
    assert row in capsys.readouterr().out


@pytest.mark.parametrize("candidate", tables.CANDIDATES)
def test_candidates_are_options_of_xla_or_of_another_version(candidate):
    options = tables.told(candidate)
    run = jax.jit(lambda x: x + 1, compiler_options=options)
    found = tables.attempt(lambda: {"run": run(1)})
    assert found in ({"run": 2}, {"error": "not known to this jaxlib"})
