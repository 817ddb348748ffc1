"""The same seed, the same bytes."""

import functools
import hashlib

from . import trainings

STEPS = 120
FAKE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
EIGHT = ("--train.devices", "8")
KINDS = {
    "1 device": (),
    "8 devices": EIGHT,
    "8 devices that share the parameters": (*EIGHT, "--train.fsdp", "4"),
}


def cases(folder, seed):
    for kind, more in KINDS.items():
        given = (folder / kind.replace(" ", "_"), seed, more)
        yield f"two fresh processes, {kind}", functools.partial(twice, *given)


def twice(folder, seed, more):
    flags = ["--train.seed", seed, "--train.steps", STEPS, *more]
    pair = [folder / name / "digits" for name in ("one", "other")]
    for run in pair:
        extra = FAKE if more else {}
        trainings.finish(run, *flags, log=run.with_suffix(".log"), extra=extra)
    trainings.same_end(*pair, STEPS)
    text = repr(sorted(trainings.state_of(run).items())).encode()
    text += (run / "metrics.jsonl").read_bytes()
    return f"sha256 {hashlib.sha256(text).hexdigest()[:16]}"
