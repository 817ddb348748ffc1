"""Breaks the code, one mistake at a time: a test has to notice each.

Works on a copy of the repository. Prints one line a breakage; the exit code is 1 where
one survived or came to nothing, and 2 where the tests fail without any.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import BREAKAGES

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600
"""Seconds for the tests of one breakage, far more than any takes."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest; others say that the tests could not be run."""


def main(argv):
    """Breaks and tests; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.mutations", description=__doc__)
    which = "which breakages; all if not given"
    parser.add_argument("names", nargs="*", metavar="NAME", help=which)
    parser.add_argument("--list", action="store_true", help="show what there are")
    options = parser.parse_args(argv)
    for name in {*options.names} - {breakage.name for breakage in BREAKAGES}:
        parser.error(f"NAME must be one of the breakages; got {name}. See --list.")
    chosen = [b for b in BREAKAGES if not options.names or b.name in options.names]
    if options.list:
        print(*(f"{b.name:<38} {b.file}" for b in chosen), sep="\n")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations.") as folder:
        tree = Path(folder).resolve()
        copy(ROOT, tree)
        print(f"{len(chosen)} breakages in {tree}; first the tests without", flush=True)
        code, output = pytest(tree, whole(chosen), "-rfE")
        if code != PASSED:
            failed = [s for s in output.splitlines() if s.startswith(("FAILED", "ERR"))]
            print(*failed or [output], "they must pass without", sep="\n")
            return 2
        print(f"all pass, after {time.monotonic() - began:.0f} s", flush=True)
        verdicts = [broken(tree, breakage) for breakage in chosen]
    counts = [verdicts.count(name) for name in ("caught", "SURVIVED", "error")]
    caught, survived, errors = counts
    minutes = (time.monotonic() - began) / 60
    print(f"{caught} caught, {survived} survived, {errors} errors: {minutes:.1f} min")
    return int(caught < len(verdicts))


def copy(root, tree):
    """Copies what git tracks, and what it would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    for name in listed.decode().split("\0"):
        if name and (root / name).is_file():  # it may have been deleted
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)


def whole(breakages):
    """Returns the tests of all, each once."""
    named = sorted({test for b in breakages for test in b.tests.split()})
    return [t for t in named if "::" not in t or t.partition("::")[0] not in named]


def pytest(tree, tests, *options):
    """Runs tests of a tree on its own modules; returns the exit code and the output."""
    module = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*module, "-o", "addopts=", *options, *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT if options == ("-x",) else None,
    )
    return done.returncode, done.stdout


def broken(tree, breakage):
    """Runs the tests of a breakage in a tree that has it; prints and returns how."""
    began, path, output = time.monotonic(), tree / breakage.file, ""
    right = path.read_text()
    write(path, right.replace(breakage.old, breakage.new))
    try:
        code, output = pytest(tree, breakage.tests.split(), "-x")
        verdict = {FAILED: "caught", PASSED: "SURVIVED"}.get(code, "error")
        if right.count(breakage.old) != 1:
            verdict, output = "error", "what it replaces must be there once"
    except subprocess.TimeoutExpired:
        verdict, output = "error", f"the tests did not end in {LIMIT} s"
    finally:
        write(path, right)
    took = time.monotonic() - began
    print(f"{breakage.name:<38} {verdict:<8} {took:6.1f} s", flush=True)
    if verdict == "error":
        print(output[-2000:], flush=True)
    return verdict


def write(path, text):
    """Replaces a module, without what Python made of it: it may be as old and long."""
    path.write_text(text)
    for made in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        made.unlink()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may have seen enough
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
