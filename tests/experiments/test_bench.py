"""The command that measures speed."""

import json

import jax
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.speed import arithmetic, measuring
from diffusion_jax.lab.wiring import build
from experiments import bench

SMALL = ["--net.channels", "8", "--net.multipliers", "1", "--net.blocks", "1"]
SMALL += ["--net.attention", "--net.groups", "4", "--sample.steps", "4"]
SMALL += ["--train.devices", "1", "--steps", "2", "--repeats", "3"]
SMALL += ["--train.input", "host"]


def test_a_row_for_each_batch_size(tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = [*SMALL, "--batch-sizes", "2", "--out", str(out)]
    assert bench.main(["digits", *flags]) == 0
    found = json.loads(out.read_text())
    options = bench.parse(["digits", *SMALL])
    params = build.init_params(options.config, jax.random.key(0))
    x, t = jax.numpy.zeros((1, 8, 8, 1)), jax.numpy.zeros(1)
    net = build.make_network(options.config)
    forward = arithmetic.count(net.apply, {"params": params["net"]}, x, t)
    ceiling = found["ceilings_tflops"]["float32"]
    rows = {(row["what"], row["batch"]): row for row in found["rows"]}
    assert list(rows) == [("train", 2), ("sample", 2)]
    for (what, batch), row in rows.items():
        low, high = row["ms_range"]
        assert 0 < low <= row["ms"] <= high
        seconds = row["ms"] / 1000
        # Images in training, evaluations of the network in a chain of four steps.
        items = batch * (4 if what == "sample" else 1)
        assert row["per_second"] == pytest.approx(items / seconds)
        flops = row["tflops"] * 1e12 * seconds / items
        assert flops == pytest.approx(forward * (3 if what == "train" else 1), rel=0.02)
        assert row["share"] == pytest.approx(row["tflops"] / ceiling)
        assert row["memory_gib"] > 0.05
        assert ("data_x" in row) == (what == "train")
        if what == "train":
            low, high = row["data_x_range"]
            assert 0 < low <= row["data_x"] <= high
            assert row["input"] == "host"
    shown = capsys.readouterr().out
    assert shown.count("  train") == shown.count("  sample") == 1
    assert shown.count("| training, as configured, float32 |") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cifar"], "must be one that .*got 'cifar'. Did you mean cifar10"),
        (["digits", "--batch-sizes", "0"], "batch_sizes must be one or more whole"),
        (["--table", "--scaling"], "what and scaling must be left out of a table"),
        (["--table", "--what", "train"], "must be left out.*got what train and"),
        (["--table", "--out", "table.md"], "out must be a file of JSON.*got table.md"),
        # The authors' arithmetic takes a batch in eight parts.
        (["--table", "--batch-sizes", "12"], "batch_size must be a multiple of 8; got"),
    ],
)
def test_bad_requests_are_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        bench.main(argv)


def test_a_file_that_cannot_be_written_is_named_before_anything_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(measuring, "timed", lambda *_: pytest.fail("something ran"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        bench.main(["digits", *SMALL, "--out", str(tmp_path / "file" / "x.json")])
