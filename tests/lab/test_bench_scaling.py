"""Scaling: which devices are measured, and what the rows say of them."""

import pytest

from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.speed import tables


def test_rows_are_in_units_of_one_device():
    works = tables.scaling(Config(), (32,), 4)
    assert [(work.devices, work.batch) for work in works] == [
        (1, 32),
        (2, 32),
        (2, 64),
        (4, 32),
        (4, 128),
    ]
    rows = []
    for work in works:
        # A device does 100 images a second, and several waste a tenth each.
        rate = 100.0 * work.devices * (1 if work.devices == 1 else 0.9)
        found = {"devices": work.devices, "per_second": rate, "tflops": 2 * rate}
        rows.append(tables.row(work, found, rows, 400.0))
    assert [r.get("efficiency") for r in rows] == [None, *[pytest.approx(0.9)] * 4]
    times = [row["times_as_fast"] for row in rows[1:]]
    assert times == pytest.approx([1.8, 1.8, 3.6, 3.6])
    assert [row["share"] for row in rows] == pytest.approx([0.5] + [0.45] * 4)
    assert rows[2]["form"] == "weak scaling of 32 on 2 devices"


def test_batches_that_some_count_cannot_share_are_refused(refuses):
    tables.check_scaling(24, 6)  # on 1, 2, 4 and 6 devices
    with refuses("8"):
        tables.check_scaling(8, 6)
