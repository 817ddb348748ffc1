"""One small trained run of the digits and its classifier, for all who look at one.

What runs leave, in a form that can be compared. And programs that runs of one
configuration share: to trace one takes seconds.
"""

import fcntl
import functools
import hashlib
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian
from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.data import datasets
from diffusion_jax.lab.measure import judges
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import build, chains, learning
from diffusion_jax.nets import fresh
from diffusion_jax.training import parallel
from experiments import train

# Learning rate and dropout depend on the step, which a run that goes on must get right.
SMALL = shlex.split(  # flags as a person types them
    """--data.hold-out 0 --net.channels 8 --net.multipliers 1 --net.blocks 1
--net.attention --net.groups 4 --net.dropout 0.1 --train.batch-size 8
--optimizer.warmup 2 --diffusion.num-steps 20 --sample.steps 4 --sample.count 4
--train.steps 12 --train.log-every 5 --sample.every 12 --train.devices 1
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
            judges.train(config, datasets.load("digits"), steps=60)
            (made / "done").touch()
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return runs.Run(folder / "digits")


def train_small(folder: Path, name: str, *flags: str) -> runs.Run:
    """Trains the small network in a folder of runs."""
    where = ["--output", str(folder), "--name", name]
    assert train.main(["digits", *SMALL, *where, *flags]) == 0
    return runs.Run(folder / name)


def restored(run: runs.Run) -> checkpoint.Restored:
    """Returns the newest checkpoint of a run."""
    like = learning.state_shapes(runs.read_config(run))
    one = parallel.replicated(parallel.make_mesh(1))
    with checkpoint.open_folder(run.checkpoints, read_only=True) as folder:
        return checkpoint.restore(folder, like, one)


def state_digests(run: runs.Run) -> dict[str, str]:
    """Returns the sha256 of each part of the last state of a run."""
    state = restored(run).state
    state = state._replace(key=jax.random.key_data(state.key))
    parts = {
        name: b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(part))
        for name, part in state._asdict().items()
    }
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def digests(run: runs.Run) -> dict[str, str]:
    """Returns those of the state, and that of the log."""
    log = hashlib.sha256(run.metrics.read_bytes()).hexdigest()
    return {"log": log, **state_digests(run)}


def share_steps(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `learning.make_step` that makes each program once."""
    made: dict[Any, Any] = {}

    @functools.wraps(make)
    def step(chosen: Config, mesh: Any, stored: Any = None) -> Any:
        shapes = str(jax.tree.map(lambda x: (x.shape, x.dtype), stored))
        alike = _alike(chosen, sample=config.Sample())
        made_of = build.make_network, learning.make_loss, learning.make_optimizer
        key = alike, mesh, shapes, *made_of
        if key not in made:
            made[key] = make(chosen, mesh, stored)
        return replace(made[key], rest=() if stored is None else (stored,))

    return step


def share_draws(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `chains.make_draw` that makes each program once.

    A test that replaces what a program is made of takes `__wrapped__`.
    """
    made: dict[Any, Any] = {}

    @functools.wraps(make)
    def draw(chosen: Config, count: int, mesh: Any) -> Any:
        alike = _alike(chosen, train=config.Train(), optimizer=config.Optimizer())
        made_of = chains.make_sampler, chains.make_denoiser, build.make_network
        key = alike, count, mesh, *made_of
        if key not in made:
            made[key] = make(chosen, count, mesh)
        return made[key]

    return draw


def _alike(chosen: Config, **sections: Any) -> Config:
    """Returns the configuration without what no program depends on."""
    train = replace(
        chosen.train,
        stop_at=None,
        log_every=1,
        checkpoint_every=1,
        keep=1,
        max_skipped=1,
        measure_every=None,
        measure_count=1,
    )
    source = replace(chosen.data, source="digits", path=None)
    told = {"name": "", "output": "", "init_from": None, "data": source, "train": train}
    return replace(chosen, **(told | sections))


class Small(nn.Module):
    """In place of the U-Net where all around it is looked at: it is soon compiled."""

    wide: bool = False
    """Whether it tells a variance too."""
    num_classes: int = 0
    """It looks at no labels."""

    @nn.compact
    def __call__(self, x, t, label=None, train=False):
        """Returns as much as the U-Net."""
        h = nn.Conv(8, (3, 3), kernel_init=fresh.kernel())(x)
        h = nn.silu(h + jnp.sin(t / 100)[:, None, None, None])
        out = x.shape[-1] * (1 + self.wide)
        return nn.Conv(out, (3, 3), kernel_init=fresh.kernel())(h)


def make_small(chosen: Config) -> Small:
    """Returns it, as `build.make_network` returns a network."""
    return Small(chosen.diffusion.variance in ("learned", "range"))


def told(chosen: Config, drawable: Any, levels: Any, label: Any, *, clip: bool) -> Any:
    """A denoiser in place of `chains.given_labels`, which hears of labels."""
    tone = 1.0 if label is None else jnp.cos(label).reshape(-1, 1, 1, 1)
    return gaussian.denoiser(lambda x, t: tone * jnp.tanh(x), levels, "v")


def denoiser(chosen: Config, drawable: Any, **_: Any) -> Any:
    """One in place of `chains.make_denoiser`."""
    levels = chains.sampling_schedule(chosen, drawable.params)
    return told(chosen, drawable, levels, None, clip=True)


@jax.custom_vjp
def hurt(w, bad):
    """w itself; where bad, its gradient is NaN."""
    return w


hurt.defvjp(
    lambda w, bad: (w, bad),
    lambda bad, g: (jnp.where(bad, jnp.nan, g), np.zeros((), jax.dtypes.float0)),
)
