"""All breakages: two or more of each module of the mathematics, one of each machine."""

from . import Breakage
from .codec import CODEC
from .commands import COMMANDS
from .mathematics import MATHEMATICS
from .networks import NETWORKS
from .playground import PLAYGROUND
from .training import TRAINING

BREAKAGES: list[Breakage] = [
    *MATHEMATICS,
    *NETWORKS,
    *TRAINING,
    *COMMANDS,
    *CODEC,
    *PLAYGROUND,
]
