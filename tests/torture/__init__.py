"""What a run must survive: `make torture`, or `python -m tests.torture --help`.

One file a subject: kills, signals, disks, damage, determinism, soak, partners (several
hosts), nonsense (input), locks and codecs. What they share: cases (outcomes), trainings
(commands and what they leave), moments (when to strike).
"""

from typing import NamedTuple


class Case(NamedTuple):
    """A subject, or a part of one that can run beside the others."""

    where: str
    """The function: from a folder and a seed to outcomes."""
    about: str
    limit: int = 1200
    """Seconds that it may take."""
    wrap: tuple[str, ...] = ()
    """The command that runs it: with mounts of its own, say."""


PRIVATE = "TORTURE_MOUNTS_ARE_PRIVATE"
"""Set in the environment where what is mounted is gone with the case."""
CASES = {
    "soak-steps": Case("soak:steps", "20,000 steps, and 500 pictures: memory", 3000),
    "kill": Case("kills:cases", "kill -9 at 30 moments, training and evaluation"),
    "signal": Case("signals:cases", "SIGTERM and SIGINT at any moment, and twice"),
    "disk": Case(
        "disks:cases",
        "full, read-only, missing, and room again",
        wrap=("unshare", "--map-root-user", "--mount"),
    ),
    "damage": Case("damage:cases", "bits flipped, files cut and removed"),
    "determinism": Case("determinism:cases", "same bytes twice; 8, 4, 1, 8 devices"),
    "codec": Case("codecs:cases", "kill -9 while files are compressed and read"),
    "hosts": Case("partners:cases", "two processes, one killed"),
    "lock": Case("locks:cases", "two processes on one folder"),
    "soak": Case("soak:cycles", "1,000 saves and restores: memory, files"),
    "input": Case("nonsense:cases", "malformed files and configurations, in numbers"),
}
"""By name; long ones first."""
