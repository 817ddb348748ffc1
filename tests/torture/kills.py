"""Killed at any moment, and started again by a loop: the run ends as if nothing was."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import moments, trainings
from .cases import Outcome, check, outcome
from .trainings import Training

STEPS, FEW = 3000, 400
"""Of the run that is killed again and again, and of one of another kind."""
SEEN_WITHIN = 4.0
"""Seconds of training, once all is compiled, in which a moment has to come."""
Aim = Callable[[Training, random.Random], moments.Moment]


class Kill(NamedTuple):
    """One of them."""

    seconds: float
    """After the start of the process."""
    hit: list[str]
    """What it was doing."""
    reached: int
    """The last step in metrics.jsonl."""
    resumed: int
    """The step at which the next process went on."""


def at_start(training: Training, rng: random.Random) -> moments.Moment:
    seen = moments.restoring(training)
    return moments.later(seen, rng.choice([0.0, rng.uniform(0, 0.3)]))


def at_compilation(training: Training, rng: random.Random) -> moments.Moment:
    return moments.later(moments.said(training, " step "), rng.uniform(0.1, 4))


def at_any_time(training: Training, rng: random.Random) -> moments.Moment:
    return moments.later(moments.stepping(training), rng.uniform(0, 2))


def at_save(training: Training, rng: random.Random) -> moments.Moment:
    stepping, saving = moments.stepping(training), moments.saving(training)
    return moments.later(moments.then(stepping, saving), rng.uniform(0, 0.12))


def at_commit(training: Training, rng: random.Random) -> moments.Moment:
    return moments.later(moments.committed(training), rng.uniform(0, 0.004))


def at_deletion(training: Training, rng: random.Random) -> moments.Moment:
    return moments.then(moments.stepping(training), moments.deleting(training))


def at_grid(training: Training, rng: random.Random) -> moments.Moment:
    stepping, drawing = moments.stepping(training), moments.drawing(training)
    return moments.later(moments.then(stepping, drawing), rng.uniform(0, 0.02))


def at_grid_file(training: Training, rng: random.Random) -> moments.Moment:
    stepping, writing = moments.stepping(training), moments.writing_grid(training)
    return moments.then(stepping, writing)


AIMS: list[Aim] = [
    *[at_compilation] * 3,
    *[at_start] * 5,
    *[at_any_time] * 6,
    *[at_save] * 5,
    *[at_commit] * 3,
    *[at_deletion] * 4,
    *[at_grid] * 3,
    *[at_grid_file] * 2,
]
"""The aims of the kills, those of the first start first."""


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes: one a kill, and those of the run that came of it."""
    rng = random.Random(seed)
    first = [aim for aim in AIMS if aim is at_compilation]
    others = [aim for aim in AIMS if aim is not at_compilation]
    rng.shuffle(others)
    kills: list[Kill] = []
    yield from survived(folder, "digits", STEPS, [*first, *others], rng, kills)
    yield outcome(f"{len(kills)} kills hit all kinds of moments", lambda: kinds(kills))


def of_latents(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes for an autoencoder with a discriminator, and its latents."""
    rng = random.Random(seed)
    aims = [at_compilation, at_start, at_any_time, at_save, at_commit]
    for name in ("digits_autoencoder", "digits_latent"):
        yield from survived(folder, name, FEW, aims, rng, [])


def survived(
    folder: Path,
    name: str,
    steps: int,
    aims: Sequence[Aim],
    rng: random.Random,
    kills: list[Kill],
) -> Iterator[Outcome]:
    """Yields the outcomes of a run that is killed, and notes the kills."""
    whole, run = (folder / which / name for which in ("whole", "killed"))
    yield trainings.undisturbed(whole, steps)
    loop = disturbed(run, ["--train.steps", steps], aims, rng, folder / f"{name}.logs")
    for number, killed in enumerate(loop, 1):
        kills.append(killed)
        result = outcome(
            f"kill -9 #{number} at {killed.seconds:.1f} s during "
            f"{' and '.join(killed.hit)}, step {killed.reached}",
            lambda kill=killed: lost_little(kill),
        )
        yield result._replace(seconds=killed.seconds)
    said = f"killed run of {name}"
    yield outcome(said, lambda: trainings.same_end(run, whole, steps))
    yield outcome(f"{said}: nothing left over", lambda: nothing_left(run))


def disturbed(
    run: Path,
    flags: Sequence[object],
    aims: Sequence[Aim],
    rng: random.Random,
    logs: Path,
    **options: object,
) -> Iterator[Kill]:
    """Trains to the end, killed at each of some moments; yields the kills.

    Nothing but starting the same command again is done in between.

    Raises:
      FailedError: a process ended by itself with an error.
    """
    waiting: list[Kill] = []
    for number in range(len(aims) + 1):
        log, before = logs / f"{number}.log", moments.partial(run)
        training = trainings.start(run, *flags, log=log, **options)
        if number < len(aims):
            # What is rarely seen is not waited for until the run is over.
            longest = moments.later(moments.drawn(training), SEEN_WITHIN)
            aim = aims[number](training, rng)
            moments.wait(training, moments.either(aim, longest))
            seconds = time.monotonic() - training.began
            alive = training.process.poll() is None
            trainings.kill(training)
        else:
            alive, seconds = False, 0.0
            trainings.ended(training)
        begun = trainings.begun_at(log)
        if begun is not None and waiting:
            # Kills before a process said where it goes on cost nothing of their own.
            yield waiting[0]._replace(resumed=begun)
            yield from waiting[1:]
            waiting = []
        if not alive:
            code = training.process.returncode
            check(code == 0, f"exit code {code}, {trainings.last_words(log)}")
            return
        reached = max(trainings.logged(run), default=0)
        waiting.append(Kill(seconds, moments.hit(training, before), reached, reached))


def lost_little(killed: Kill) -> str:
    """Checks that no more work was lost than that since the last checkpoint."""
    lost = max(0, killed.reached - killed.resumed)
    # A save that was not finished by then counts for nothing: the one before does.
    limit = trainings.EVERY * (2 if "a save" in killed.hit else 1)
    check(lost <= limit, f"{lost} steps lost, with a checkpoint each {trainings.EVERY}")
    return f"{lost} steps lost"


def kinds(kills: Sequence[Kill]) -> str:
    """Checks that there were kills of every kind; counts them."""
    names = [name for kill in kills for name in kill.hit]
    wanted = ("a step", "a save", "a grid", "a deletion", "the start")
    missing = [name for name in wanted if name not in names]
    said = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    check(len(kills) >= 20, f"only {len(kills)}: {said}")
    check(not missing, f"none during {' and '.join(missing)}; {said}")
    return said


def nothing_left(run: Path) -> None:
    """Checks that no temporary file is left of what was interrupted."""
    found = trainings.left_over(run)
    check(not found, f"{len(found)} left: {', '.join(found[:3])}")
