"""The table of speed: its rows, and what fails."""

import json

import jax
from test_bench import SMALL

from diffusion_jax.lab.schema import config
from diffusion_jax.lab.speed import measuring, tables
from experiments import bench
from experiments.configs import EXPERIMENTS


def test_a_table_is_measured_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "table.json"
    flags = [*SMALL, "--table", "--batch-sizes", "8", "--out", str(out)]
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
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.endswith(f"{text}written: {out}\n")
    ms = f"{sample['ms'] / 4:,.2f}"
    assert f"| an evaluation in sampling, as configured, float32 | 8 | {ms} |" in text


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


def test_what_fails_is_a_row_and_all_before_it_is_written(
    monkeypatch, capsys, tmp_path
):
    saved = []

    def row(work, *_, fresh):
        if work.what == "sample":
            raise jax.errors.JaxRuntimeError("out of memory\nby far")
        return {"ms": 2.0, "loss": 0.5, "per_second": 1.0, "tflops": 1.0, "devices": 8}

    monkeypatch.setattr(measuring, "ceiling", lambda *_: 1e12)
    monkeypatch.setattr(measuring, "row", row)
    monkeypatch.setattr(bench.peer, "check", lambda _: None)
    monkeypatch.setattr(
        bench.peer, "compare", lambda *_: {"per_second": 1.0, "ms": 2.0, "ratio": 2.0}
    )
    monkeypatch.setattr(
        bench.runs, "write_json", lambda path, report: saved.append(str(report["rows"]))
    )
    flags = ["--table", "--peer", "--out", str(tmp_path / "table.json")]
    assert bench.main(["digits", *flags]) == 0
    assert len(set(saved)) == 1 + 4 + 3  # no peer of what failed
    said = capsys.readouterr().out
    row = "| training, as configured, float32 | 128 | 2.00 | 1.0 | 0.5 | 1 | 100.0% |"
    assert row in said
    assert "| an evaluation in sampling, as configured, float32 | 512 | out of " in said
