"""From the configuration of a teacher to that of a student of few steps."""

import dataclasses

from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.schema.few import SEES_NOISE, Few, Method
from diffusion_jax.lab.schema.sampling import Sample

RATES: dict[Method, float] = {
    "ect": 0.5,
    "consistency": 0.05,
    "consistency_training": 0.05,
    "progressive": 0.5,
}
"""Learning rate of a student, in that of its teacher: as measured on digits."""
LEARN_V = 0.25
"""`Few.learn_v` of the student of a teacher that predicts neither v nor the like."""


def student(teacher: Config, method: Method, *, init_from: str) -> Config:
    """Returns the configuration of a student, with the data and network of its teacher.

    It makes a third of its teacher's steps, at the share of its learning rate that is
    in `RATES`.

    Args:
      teacher: its configuration.
      method: how it is distilled.
      init_from: where its weights are.

    >>> made = student(Config(), "progressive", init_from="runs/digits")
    >>> made.name, made.sample.sampler, made.sample.steps, made.optimizer.decay
    ('digits_progressive', 'ddim', 1, 'constant')
    """
    few, old = Few(method), teacher.sample
    halved = method == "progressive"
    sample = Sample(
        sampler="ddim" if halved else "consistency",
        steps=few.last if halved else 2,
        every=old.every,
        count=old.count,
        clip=old.clip,
        label=old.label,
    )
    changed = dataclasses.replace(
        teacher,
        name=f"{teacher.name}_{method}",
        init_from=init_from,
        few=few,
        sample=sample,
        net=dataclasses.replace(teacher.net, dropout=0.0),
    )
    changed = replace(changed, "train", steps=max(1, teacher.train.steps // 3))
    return replace(
        turned(changed, teacher),
        "optimizer",
        preset="modern",
        learning_rate=RATES[method] * teacher.optimizer.learning_rate,
        warmup=min(200, teacher.optimizer.warmup),
        # At a rate that falls to 0, the last and hardest halving would learn nothing.
        decay="constant" if halved else "cosine",
        b2=0.99,
        ema_decay=(0.99,),
        ema_lengths=(),
        ema_snapshots=0,
    )


def turned(config: Config, teacher: Config) -> Config:
    """Returns a student with the diffusion of a teacher, as one that can be consistent.

    The weights of one that predicts eps or x0 learn v first (Sec. 4, Salimans and Ho
    2022): pure noise has no x0 by its eps, and x_t without noise no eps by its x0.

    >>> eps = replace(Config(), "diffusion", prediction="eps")
    >>> made = turned(Config(few=Few("ect")), eps)
    >>> made.diffusion.prediction, made.few.learn_v
    ('v', 0.25)
    """
    diffusion, learn_v = teacher.diffusion, teacher.few.learn_v
    if diffusion.prediction not in SEES_NOISE and diffusion.schedule != "ve":
        diffusion = dataclasses.replace(diffusion, prediction="v")
        learn_v = LEARN_V
    few = dataclasses.replace(config.few, learn_v=learn_v)
    return dataclasses.replace(config, diffusion=diffusion, few=few)
