"""Two processes of one run, one killed: the other ends, and both go on to the same."""

import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import trainings
from .cases import Outcome, check, outcome

sys.path.insert(0, str(trainings.ROOT / "tests" / "helpers"))
import processes

STEPS = 200
WITHIN = 60.0
"""Seconds in which the other process must have ended."""
FLAGS = shlex.split(
    "--train.checkpoint-every 40 --train.log-every 5 --sample.every 200"
)


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes: a host killed, or as dead as one without a network."""
    # A machine that is cut off closes no connection: only its silence tells.
    strikes = [(v, kind) for kind in (signal.SIGKILL, signal.SIGSTOP) for v in (0, 1)]
    yield from struck(folder, "digits", strikes, seed)


def of_latents(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes for an autoencoder with a discriminator, and its latents."""
    strikes, known = [(seed % 2, signal.SIGKILL)], folder / "whole/digits_autoencoder"
    yield from struck(folder, "digits_autoencoder", strikes, seed)
    yield from struck(folder, "digits_latent", strikes, seed, "--data.latent", known)


def struck(
    folder: Path,
    name: str,
    strikes: Sequence[tuple[int, signal.Signals]],
    seed: int,
    *more: object,
) -> Iterator[Outcome]:
    """Yields the outcomes of runs of two hosts, to one of which something happens."""
    flags = [*FLAGS, "--train.seed", seed, "--train.steps", STEPS, "--train.devices", 2]
    flags += more
    whole = folder / "whole" / name

    def undisturbed() -> None:
        both_finish(whole, *flags)

    def loses(victim: int, kind: signal.Signals) -> str:
        run = folder / f"{kind.name}{victim}" / name
        given = ["-m", "experiments.train", *trainings.arguments(run, *flags)]
        with processes.started(given) as both:
            until = time.monotonic() + 240
            while len(lines_of(run)) < 12:
                codes = [process.poll() for process in both]
                check(codes == [None, None], f"ended by themselves, {codes}")
                check(time.monotonic() < until, "no steps within 240 s")
                time.sleep(0.02)
            both[victim].send_signal(kind)
            began = time.monotonic()
            other = both[1 - victim]
            while other.poll() is None and time.monotonic() - began < 2 * WITHIN:
                time.sleep(0.1)
            seconds, code = time.monotonic() - began, other.poll()
        check(code is not None, f"host {1 - victim} still there after {seconds:.0f} s")
        check(code != 0, f"host {1 - victim} ended with exit code 0")
        check(seconds < WITHIN, f"host {1 - victim} ended only after {seconds:.0f} s")
        both_finish(run, *flags)
        trainings.same_state(run, whole)
        trainings.same_files(run, whole)
        check(lines_of(run) == lines_of(whole), "other lines in metrics.jsonl")
        return f"host {1 - victim} ended after {seconds:.1f} s, exit code {code}"

    yield outcome(f"{name} on two hosts undisturbed, {STEPS} steps", undisturbed)
    words = {signal.SIGKILL: "killed by -9", signal.SIGSTOP: "silent"}
    for victim, kind in strikes:
        yield outcome(
            f"host {victim} {words[kind]}, both started again to an equal end",
            lambda victim=victim, kind=kind: loses(victim, kind),
        )


def both_finish(run: Path, *flags: object) -> None:
    """Trains to the end on two hosts."""
    given = ["-m", "experiments.train", *trainings.arguments(run, *flags)]
    for host, (code, _, errors) in enumerate(processes.run(given)):
        check(code == 0, f"host {host}: exit code {code}, {errors.strip()[-300:]!r}")


def lines_of(run: Path) -> list[dict[str, float]]:
    """Returns the whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
