"""The breakages of `make mutations` are where they say: nothing is broken here."""

from collections import Counter
from pathlib import Path

import pytest
from mutations.breakages import BREAKAGES

ROOT = Path(__file__).resolve().parents[1]
MATHEMATICS = [
    path.stem
    for path in (ROOT / "diffusion_jax").glob("*.py")
    if not path.stem.startswith("_") and path.stem != "errors"
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_what_is_replaced_is_there_once(breakage):
    text = (ROOT / breakage.file).read_text()
    assert text.count(breakage.old) == 1
    compile(text.replace(breakage.old, breakage.new), breakage.file, "exec")
    assert breakage.old != breakage.new


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_the_tests_that_must_notice_are_there(breakage):
    for test in breakage.tests.split():
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert f"def {name.partition('[')[0]}" in text


def test_each_has_a_name_of_its_own():
    names = Counter(breakage.name for breakage in BREAKAGES)
    assert names.most_common(1)[0][1] == 1


@pytest.mark.parametrize("module", MATHEMATICS)
def test_each_module_of_the_mathematics_has_two(module):
    files = [breakage.file for breakage in BREAKAGES]
    assert files.count(f"diffusion_jax/{module}.py") >= 2
