"""A case in a process of its own: `python -m tests.torture.one NAME FOLDER SEED`.

Prints an outcome a line, as JSON.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from . import CASES
from .cases import outcome


def main(name: str, folder: str, seed: str) -> int:
    """Runs a case; returns the exit code."""
    # The report goes where it is read, and all that libraries print to the log.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    module, _, function = CASES[name].where.partition(":")
    cases = getattr(importlib.import_module(f".{module}", __package__), function)
    Path(folder).mkdir(parents=True, exist_ok=True)
    results = cases(Path(folder), int(seed))

    def advance() -> None:
        for result in results:
            print(json.dumps(result), file=report, flush=True)

    # What ends the case itself is an outcome too.
    ended = outcome(f"{name} came to its end", advance)
    if ended.verdict != "passed":
        print(json.dumps(ended), file=report, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
