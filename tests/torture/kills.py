"""Killed at any moment, and started again by a loop: the run ends as if nothing was."""

import random
import time
from collections import namedtuple
from functools import partial

from . import moments, trainings

STEPS, FEW = 3000, 400
"""Of the run that is killed again and again, and of one of another kind."""
SEEN_WITHIN = 4.0
"""Seconds of training, once all is compiled, in which a moment has to come."""
# When, in seconds of the process; what it was doing; the last step in metrics.jsonl,
# and that at which the next process went on.
Kill = namedtuple("Kill", "seconds hit reached resumed")


def at_start(training, rng):
    delay = rng.choice([0.0, rng.uniform(0, 0.3)])
    return moments.later(moments.restoring(training), delay)


def at_compilation(training, rng):
    return moments.later(moments.beginning(training), rng.uniform(0.1, 4))


def at_any_time(training, rng):
    return moments.later(moments.stepping(training), rng.uniform(0, 2))


def at_save(training, rng):
    return moments.later(moments.saving(training), rng.uniform(0, 0.12))


def at_commit(training, rng):
    return moments.later(moments.committed(training), rng.uniform(0, 0.004))


def at_deletion(training, rng):
    return moments.deleting(training)


def at_grid(training, rng):
    return moments.later(moments.drawing(training), rng.uniform(0, 0.02))


def at_grid_file(training, rng):
    return moments.writing_grid(training)


def cases(folder, seed):
    """One a kill, and those of the run that came of it."""
    rng, kills = random.Random(seed), []
    aims = [at_start, at_any_time, at_save, at_commit, at_deletion, at_grid]
    aims = rng.sample([*aims, at_grid_file], counts=[5, 6, 5, 3, 4, 3, 2], k=28)
    aims = [*[at_compilation] * 3, *aims]
    yield from survived(folder, "digits", STEPS, aims, rng, kills)
    yield f"{len(kills)} kills hit all kinds of moments", partial(kinds, kills)


def of_latents(folder, seed):
    """The same for an autoencoder with a discriminator, and for its latents."""
    aims = [at_compilation, at_start, at_any_time, at_save, at_commit]
    for name in ("digits_autoencoder", "digits_latent"):
        yield from survived(folder, name, FEW, aims, random.Random(seed), [])


def survived(folder, name, steps, aims, rng, kills):
    """The cases of a run that is killed; notes the kills."""
    whole, run = (folder / which / name for which in ("whole", "killed"))
    yield trainings.undisturbed(whole, steps)
    loop = disturbed(run, ["--train.steps", steps], aims, rng, folder / f"{name}.logs")
    for number, kill in enumerate(loop, 1):
        kills.append(kill)
        when = f"at {kill.seconds:.1f} s during {' and '.join(kill.hit)}"
        what = f"kill -9 #{number} {when}, step {kill.reached}"
        yield what, partial(lost_little, kill)
    said = f"killed run of {name}"
    yield said, partial(trainings.same_end, run, whole, steps)
    yield f"{said}: nothing left over", partial(nothing_left, run)


def disturbed(run, flags, aims, rng, logs, **options):
    """Trains to the end, killed at each of some moments; yields the kills.

    Nothing but starting the same command again is done in between.
    """
    waiting = []
    for number, aim in enumerate([*aims, None]):
        log, before = logs / f"{number}.log", moments.partial(run)
        training = trainings.start(run, *flags, log=log, **options)
        alive = False
        if aim:
            # What is rarely seen is not waited for until the run is over.
            longest = moments.later(moments.drawn(training), SEEN_WITHIN)
            moments.wait(training, moments.either(aim(training, rng), longest))
            seconds = time.monotonic() - training.began
            alive = training.process.poll() is None
            trainings.kill(training)
        else:
            trainings.ended(training)
        begun = trainings.begun_at(log)
        if begun is not None and waiting:
            # Kills before a process said where it goes on cost nothing of their own.
            yield waiting[0]._replace(resumed=begun)
            yield from waiting[1:]
            waiting = []
        if not alive:
            trainings.succeeded(training)
            return
        reached = max(trainings.logged(run), default=0)
        waiting.append(Kill(seconds, moments.hit(training, before), reached, reached))


def lost_little(kill):
    """Checks that no more work was lost than that since the last checkpoint."""
    lost = max(0, kill.reached - kill.resumed)
    # A save that was not finished by then counts for nothing: the one before does.
    limit = trainings.EVERY * (2 if "a save" in kill.hit else 1)
    assert lost <= limit, f"{lost} steps, with a checkpoint each {trainings.EVERY}"
    return f"{lost} steps lost"


def kinds(kills):
    """Checks that there were kills of every kind; counts them."""
    names = [name for kill in kills for name in kill.hit]
    missing = {"a step", "a save", "a grid", "a deletion", "the start"} - {*names}
    said = ", ".join(f"{names.count(name)} {name}" for name in sorted({*names}))
    assert len(kills) >= 20, f"only {len(kills)}: {said}"
    assert not missing, f"none during {' and '.join(missing)}; {said}"
    return said


def nothing_left(run):
    """Checks that no temporary file is left of what was interrupted."""
    found = [str(path.relative_to(run)) for path in run.rglob("*")]
    left = [f for f in found if f.endswith(".tmp") or "orbax-checkpoint-tmp" in f]
    left = [f for f in left if ".cache/" not in f]
    assert not left, f"{len(left)} left: {', '.join(left[:3])}"
