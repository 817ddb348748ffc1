"""The breakages of `make mutations` are where they say: nothing is broken here."""

from pathlib import Path

from mutations import BREAKAGES

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_replaced_is_there_once_and_who_must_notice_too():
    assert len({breakage.name for breakage in BREAKAGES}) == len(BREAKAGES) > 200
    for name, file, tests, old, new in BREAKAGES:
        text = (ROOT / file).read_text()
        assert text.count(old) == 1, name
        compile(text.replace(old, new), file, "exec")
        assert old != new, name
        for test in tests.split():
            place, _, function = test.partition("::")
            called = f"def {function.partition('[')[0]}"
            assert called in (ROOT / place).read_text(), name


def test_each_module_of_the_mathematics_has_two():
    files = [breakage.file for breakage in BREAKAGES]
    for path in (ROOT / "diffusion_jax").glob("[!_]*.py"):
        count = files.count(f"diffusion_jax/{path.name}")
        assert count >= 2 or path.stem == "errors", path
