"""The table of the README: its rows, its minutes, and what is tried of the compiler."""

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
    assert [(row["form"], row["what"], row["batch"]) for row in found["rows"]] == [
        ("as configured", "train", 8),
        ("the authors' arithmetic", "train", 8),
        ("as configured", "sample", 8),
    ]
    train, authors, sample = found["rows"]
    assert train["loss_after"] == 1 + 2 + 2 * 3  # as many steps as were made
    # From the same weights, with another average and another clipping.
    assert 0 < abs(authors["loss"] / train["loss"] - 1) < 0.01
    assert sample["evaluations_per_sample"] == 4
    none, wish, known = found["options"]
    assert none["loss"] == train["loss"]
    assert none["loss_change"] == 0
    for row in (none, known):
        assert row["times_as_fast"] == pytest.approx(train["ms"] / row["ms"])
    assert wish == {"option": "xla_wish=true", "error": "not known to this jaxlib"}
    assert found["left_out"] == []
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.endswith(f"{text}written: {out}\n")
    ms = f"{sample['ms'] / 4:,.2f}"
    assert f"| an evaluation in sampling, as configured, float32 | 8 | {ms} |" in text
    assert "| `xla_wish=true` | not known to this jaxlib | - | - |" in text


def test_rows_are_what_the_readme_shows():
    fast = config.replace(EXPERIMENTS["cifar10"].config, "net", dtype="bfloat16")
    one, two, authors, chains = tables.works(fast, (128, 512))
    assert [work.batch for work in (one, two, authors, chains)] == [128, 512, 128, 512]
    assert one.config == two.config == fast
    assert authors.config == config.official(fast) != fast
    # A thousand evaluations of ddpm would take a quarter of an hour.
    assert (chains.config.sample.sampler, chains.config.sample.steps) == ("ddim", None)
    few = config.replace(fast, "sample", steps=9)
    assert tables.works(few, (8,))[-1].config == few
    # What is the authors' already has no row twice.
    forms = [work.form for work in tables.works(config.official(fast), (8,))]
    assert forms == ["the authors' arithmetic"] * 2


class Machine:
    """Takes minutes for its work by a clock of its own."""

    def __init__(self, monkeypatch, minutes, fails):
        self.now, self.minutes, self.fails, self.saved = 0.0, minutes, fails, []
        monkeypatch.setattr(tables.time, "perf_counter", lambda: 60 * self.now)
        monkeypatch.setattr(measuring, "ceiling", lambda *_: 1e12)
        monkeypatch.setattr(measuring, "row", self.row)
        monkeypatch.setattr(measuring, "train", self.train)
        monkeypatch.setattr(bench.peer, "check", lambda _: None)
        monkeypatch.setattr(bench.peer, "compare", self.peer)
        monkeypatch.setattr(bench.runs, "write_json", self.save)

    def takes(self, piece, **figures):
        self.now += self.minutes
        if piece in self.fails:
            raise self.fails[piece]
        return {"ms": 2.0, "loss": 0.5, "per_second": 1.0, **figures}

    def row(self, work, *_, fresh):
        about = {"form": work.form, "what": work.what, "batch": work.batch}
        more = {"tflops": 1.0, "compile_s": 1.0, "memory_gib": 1.0, "ms_range": [2, 2]}
        return self.takes("row", dtype="float32", **about, **more)

    def train(self, *_, told):
        return self.takes(str(told), ms=1.0)

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
    assert [row["option"] for row in found["options"]] == ["none"]
    assert found["left_out"] == ["xla_a=1", "xla_b=2"]
    said = "Not tried, for want of time: xla_a=1; xla_b=2."
    assert said in capsys.readouterr().out
    # Before and after every piece all that there was had been written.
    assert [len(report["rows"]) for report in machine.saved[:6]] == [0, 1, 2, 3, 4, 4]
    assert machine.saved[5]["options"]


def test_what_fails_is_a_row(monkeypatch, capsys, tmp_path):
    fails = {
        "peer": RuntimeError("out of memory\nby far"),
        "{'xla_a': '1'}": jax.errors.JaxRuntimeError("no such thing\nat all"),
    }
    machine = Machine(monkeypatch, minutes=0.1, fails=fails)
    candidates = ["--candidates", "xla_a=1", "xla_b=2"]
    found = machine.table(tmp_path, "--peer", *candidates, minutes="8")
    assert [row["peer"] for row in found["rows"]] == [{"error": "out of memory"}] * 4
    first, second = found["options"]
    assert first == {"option": "xla_a=1", "error": "no such thing"}
    assert (second["times_as_fast"], second["loss_change"]) == (2.0, 0.0)
    assert "| `xla_b=2` | 1.00 | 2.000 | the same |" in capsys.readouterr().out


@pytest.mark.parametrize("candidate", tables.CANDIDATES)
def test_candidates_are_options_of_xla_or_of_another_version(candidate):
    options = tables.told(candidate)
    run = jax.jit(lambda x: x + 1, compiler_options=options)
    found = tables.attempt(lambda: {"run": run(1)})
    assert found in ({"run": 2}, {"error": "not known to this jaxlib"})
