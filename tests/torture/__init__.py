"""What a run must survive: `make torture`; ARGS are those of pytest, `-k kill` say.

One file a subject: kills, signals, disks, determinism, soak, partners (several hosts).
What they share: cases (outcomes), trainings (commands and what they leave), moments
(when to strike). TORTURE_SEED is of all that is random: moments, bits.
"""
