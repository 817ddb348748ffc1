"""From the configuration of a teacher to that of a student of few steps."""

import dataclasses

from diffusion_jax.lab.schema.config import Config, replace
from diffusion_jax.lab.schema.few import Few, Method
from diffusion_jax.lab.schema.sampling import Sample

RATES: dict[Method, float] = {
    "ect": 0.5,
    "consistency": 0.05,
    "consistency_training": 0.05,
    "progressive": 0.5,
}
"""Learning rate of a student, in that of its teacher: as measured on digits."""


def student(teacher: Config, method: Method, *, init_from: str) -> Config:
    """Returns the configuration of a student, with the data and network of its teacher.

    It makes a third of its teacher's steps, at the share of its learning rate that is
    in `RATES`.

    Args:
      teacher: its configuration.
      method: how it is distilled.
      init_from: where its weights are.

    >>> made = student(Config(), "progressive", init_from="runs/digits")
    >>> made.name, made.sample.sampler, made.sample.steps
    ('digits_progressive', 'ddim', 1)
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
        changed,
        "optimizer",
        preset="modern",
        learning_rate=RATES[method] * teacher.optimizer.learning_rate,
        warmup=min(200, teacher.optimizer.warmup),
        decay="cosine",
        b2=0.99,
        ema_decay=(0.99,),
        ema_lengths=(),
        ema_snapshots=0,
    )
