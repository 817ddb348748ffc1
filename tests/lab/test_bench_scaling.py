"""Scaling: which devices are measured, and what the rows say of them."""

import pytest

from diffusion_jax.lab.speed import scaling


def test_rows_are_in_units_of_one_device(capsys):
    # A device does 100 images a second, and n of them waste a tenth of each other.
    asked = []

    def rate(devices, batch):
        asked.append((devices, batch))
        return 100.0 * devices * (1 if devices == 1 else 0.9)

    rows = scaling.measure(rate, 32, 4)
    assert asked == [(1, 32), (2, 32), (2, 64), (4, 32), (4, 128)]
    assert [(r["scaling"], r["devices"], r["batch"]) for r in rows] == [
        ("strong", 1, 32),
        ("weak", 1, 32),
        ("strong", 2, 32),
        ("weak", 2, 64),
        ("strong", 4, 32),
        ("weak", 4, 128),
    ]
    assert [r["efficiency"] for r in rows] == pytest.approx([1, 1] + [0.9] * 4)
    assert [r["times_one"] for r in rows] == pytest.approx([1, 1, 1.8, 1.8, 3.6, 3.6])
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_batches_that_some_count_cannot_share_are_refused(refuses):
    scaling.check(24, 6)  # on 1, 2, 4 and 6 devices
    with refuses("8"):
        scaling.check(8, 6)
