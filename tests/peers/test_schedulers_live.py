"""diffusers' schedulers, where that is installed, still walk as the golden file says.

See make_scheduler_golden.py, which also says which versions that was made with.
"""

import make_scheduler_golden as golden
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

# Steps next to the data, where float32 leaves least of 1 - alpha_bar.
NEAR = [name for name in golden.CASES if "tail" in name]


@pytest.fixture(scope="module")
def paths():
    with np.load(golden.GOLDEN) as file:
        return {name: file[name] for name in golden.CASES}


@pytest.mark.parametrize("kind", golden.KINDS)
@pytest.mark.parametrize("name", golden.CASES)
def test_file_is_what_diffusers_does(name, kind, paths):
    path = golden.walk(golden.CASES[name], kind, exact=True)
    assert np.abs(path - paths[name]).max() < 2e-6


@pytest.mark.parametrize("name", golden.CASES)
def test_its_own_tables_change_little(name, paths):
    """They are float32. Of v, which is not divided by the alpha of pure noise."""
    off = np.abs(golden.walk(golden.CASES[name], "v") - paths[name]).max()
    print(f"{name}: {off:.1e} off as released")
    assert off < (3e-4 if name in NEAR else 1e-4)
