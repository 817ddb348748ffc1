"""Malformed input in numbers: the property tests, with many examples."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .cases import Outcome, check, outcome
from .trainings import ROOT

LONGEST = 900
"""Seconds that a file of tests may take."""


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes, one a file of tests."""
    files = sorted((ROOT / "tests" / "experiments").glob("test_nonsense*.py"))
    yield outcome("tests of malformed input", lambda: found(files))
    for file in files:
        yield outcome(
            f"malformed input, {file.name}",
            lambda file=file: passes(file, folder, seed),
        )


def found(files: list[Path]) -> str:
    """Checks that there are such tests."""
    check(files, "no tests/experiments/test_nonsense*.py")
    return ", ".join(file.stem for file in files)


def passes(file: Path, folder: Path, seed: int) -> str:
    """Checks that the tests of a file pass, with the profile of many examples."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-n0", f"--hypothesis-seed={seed}", f"--basetemp={folder / file.stem}"]
    done = subprocess.run(
        [*command, str(file)],
        cwd=ROOT,
        env={**os.environ, "HYPOTHESIS_PROFILE": "torture"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    (folder / f"{file.stem}.log").write_text(done.stdout)
    lines = [
        line for line in done.stdout.splitlines() if re.search(r"\d+ \w+ in ", line)
    ]
    said = lines[-1].strip(" =") if lines else f"exit code {done.returncode}"
    check(done.returncode == 0, f"{said}, see {folder / f'{file.stem}.log'}")
    return said
