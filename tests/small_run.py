"""One small trained run of the digits and its classifier, for all who look at one."""

import fcntl
import shlex
import shutil
from pathlib import Path

from diffusion_jax.training import data
from experiments import runs, train, train_classifier

# Flags as a person types them.
NET = """--net.channels 8 --net.multipliers 1 --net.blocks 1 --net.attention
--net.groups 4 --train.batch-size 8 --optimizer.warmup 2 --diffusion.num-steps 20
--sample.steps 4 --sample.count 4 """
SMALL = shlex.split(
    NET
    + """--train.steps 12 --train.log-every 4 --sample.every 12 --train.devices 1
--optimizer.ema-snapshots 0"""
)


def copied(made: Path, folder: Path) -> runs.Run:
    """Returns a run in `folder` of its own, trained at its first use.

    Args:
      made: where the first is, the same for all processes of the tests.
      folder: of runs; the classifier goes beside the copy.
    """
    made.mkdir(exist_ok=True)
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "done").exists():
            assert train.main(["digits", *SMALL, "--output", str(made)]) == 0
            config = runs.read_config(runs.Run(made / "digits"))
            train_classifier.train(config, data.load("digits"), steps=300)
            (made / "done").touch()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return runs.Run(folder / "digits")
