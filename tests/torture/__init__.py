"""What a run must survive: `make torture`; ARGS are those of pytest, `-k kill` say.

One file a subject: kills, signals, disks, determinism, soak, partners (several hosts).
Each yields its cases: what is done, and the function that does it and says how it went.
What they share: trainings (commands and what they leave), moments (when to strike).
TORTURE_SEED is of all that is random: moments, bits.
"""

PRIVATE = "TORTURE_MOUNTS_ARE_PRIVATE"
"""Set in the environment where what is mounted is gone with the case."""
