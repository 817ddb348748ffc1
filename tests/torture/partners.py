"""Two processes of one run, one killed: the other ends, and both go on to the same."""

import signal
import time
from functools import partial

import processes

from . import trainings

STEPS = 200
WITHIN = 60.0
"""Seconds in which the other process must have ended."""
WORDS = {signal.SIGKILL: "killed by -9", signal.SIGSTOP: "silent"}


def cases(folder, seed):
    """A host killed, or as dead as one without a network."""
    # A machine that is cut off closes no connection: only its silence tells.
    strikes = [(victim, kind) for kind in WORDS for victim in (0, 1)]
    yield from struck(folder, "digits", strikes, seed)


def of_latents(folder, seed):
    """The same for an autoencoder with a discriminator, and for its latents."""
    strikes, known = [(seed % 2, signal.SIGKILL)], folder / "whole/digits_autoencoder"
    yield from struck(folder, "digits_autoencoder", strikes, seed)
    yield from struck(folder, "digits_latent", strikes, seed, "--data.latent", known)


def struck(folder, name, strikes, seed, *more):
    flags = ["--train.checkpoint-every", 40, "--train.log-every", 5]
    flags += ["--sample.every", 200, "--train.devices", 2]
    flags += ["--train.seed", seed, "--train.steps", STEPS, *more]
    whole = folder / "whole" / name
    undisturbed = f"{name} on two hosts undisturbed, {STEPS} steps"
    yield undisturbed, partial(both_finish, command(whole, flags))
    for victim, kind in strikes:
        what = f"host {victim} {WORDS[kind]}, both started again to an equal end"
        run = folder / f"{kind.name}{victim}" / name
        yield what, partial(loses, command(run, flags), run, whole, victim, kind)


def loses(given, run, whole, victim, kind):
    host = f"host {1 - victim}"
    with processes.started(given) as both:
        processes.wait_for(lambda: len(trainings.lines(run)) >= 12, *both)
        both[victim].send_signal(kind)
        began, other = time.monotonic(), both[1 - victim]
        while other.poll() is None and time.monotonic() - began < 2 * WITHIN:
            time.sleep(0.1)
        seconds, code = time.monotonic() - began, other.poll()
    assert code is not None, f"{host} still there after {seconds:.0f} s"
    assert code != 0, f"{host} ended with exit code 0"
    assert seconds < WITHIN, f"{host} ended only after {seconds:.0f} s"
    both_finish(given)
    trainings.same_state(run, whole)
    trainings.same_files(run, whole)
    assert trainings.lines(run) == trainings.lines(whole), "other lines"
    return f"{host} ended after {seconds:.1f} s, exit code {code}"


def command(run, flags):
    return ["-m", "experiments.train", *trainings.arguments(run, *flags)]


def both_finish(given):
    for host, (code, _, errors) in enumerate(processes.run(given)):
        assert code == 0, f"host {host}: exit code {code}, {errors.strip()[-300:]!r}"
