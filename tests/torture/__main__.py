"""Does to runs what machines do: kills them, fills their disks, corrupts their files.

Prints one line a case and a summary; the exit code is 1 where something failed. What a
failed case left is kept, and its folder is named. Takes up to 40 minutes on two cores.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import CASES, PRIVATE
from .cases import Outcome, shown, summary

ROOT = Path(__file__).resolve().parents[2]
SLOWER = 3
"""Times as long as planned that a case may take on a busy machine."""


def main(argv: Sequence[str]) -> int:
    """Runs cases; returns the exit code."""
    options = parse(argv)
    # As Ctrl-C: the cases are in sessions of their own, and have to be ended. Ctrl-C
    # itself is ignored in the background of a script, and would be by what we start.
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.default_int_handler)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture."))
    folder = folder.resolve()
    print(f"{len(options.only)} cases in {folder}, seed {options.seed}", flush=True)
    running: set[subprocess.Popen] = set()
    began = time.monotonic()
    pool = ThreadPoolExecutor(options.jobs)
    futures = [
        pool.submit(run, name, folder / name, options.seed, running)
        for name in options.only
    ]
    try:
        results = [result for future in futures for result in future.result()]
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        for process in [*running]:
            end(process)
        pool.shutdown()
        print(f"interrupted; what is left is in {folder}", file=sys.stderr)
        return 130
    with_failure = [path for path in folder.iterdir() if path.is_dir()]
    if not with_failure and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(with_failure):
        print(f"kept: {path}")
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"{summary(results)} in {minutes} min {seconds} s")
    return int(any(result.verdict == "failed" for result in results))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    width = max(map(len, CASES))
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases:\n"
        + "\n".join(f"  {name:<{width}}  {case.about}" for name, case in CASES.items()),
    )
    parser.add_argument(
        "--only",
        metavar="CASE,CASE",
        type=names,
        default=list(CASES),
        help="which cases to run; all of them when not given",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is random: moments, bits"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(2, len(os.sched_getaffinity(0)))),
        help="cases to run at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the cases work (default: a new one among the temporary files)",
    )
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}. Say 1 or 2.")
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(
            f"--folder must be empty or not be there; got {options.folder}. Name "
            "another."
        )
    return options


def names(text: str) -> list[str]:
    """Returns the names of cases in a list with commas."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"a case must be one of {', '.join(CASES)}; got {unknown[0]!r}. Say, for "
            "instance: --only kill,disk"
        )
    return [name for name in CASES if name in chosen]


def run(
    name: str, folder: Path, seed: int, running: set[subprocess.Popen]
) -> list[Outcome]:
    """Runs a case in a process of its own; prints and returns its outcomes.

    Its folder is removed, unless something failed.
    """
    case, began = CASES[name], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    module = [sys.executable, "-m", "tests.torture.one"]
    results: list[Outcome] = []
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*wrapped(case.wrap), *module, name, str(folder), str(seed)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    running.add(process)
    limit = threading.Timer(SLOWER * case.limit, end, [process])
    limit.daemon = True
    limit.start()
    assert process.stdout is not None
    for line in process.stdout:
        try:
            results.append(Outcome(*json.loads(line)))
        except ValueError:  # a line that the time limit cut off
            continue
        print(shown(results[-1]), flush=True)
    code = process.wait()
    limit.cancel()
    running.discard(process)
    end(process)  # what it may have left running
    if code:
        seconds = time.monotonic() - began
        results.append(
            Outcome("failed", f"{name} ended with exit code {code}, see {log}", seconds)
        )
        print(shown(results[-1]), flush=True)
    if not any(result.verdict == "failed" for result in results):
        shutil.rmtree(folder, ignore_errors=True)
    return results


def wrapped(command: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the command to run another one by, where this machine permits it.

    Of `unshare` its mark is left in the environment: `disks.mount` looks for it.
    """
    if not command or shutil.which(command[0]) is None:
        return ()
    for tried in (command, tuple(word for word in command if "user" not in word)):
        done = subprocess.run([*tried, "true"], capture_output=True, check=False)
        if done.returncode == 0:
            return (*tried, "env", f"{PRIVATE}=1")
    return ()


def end(process: subprocess.Popen) -> None:
    """Kills a case, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
