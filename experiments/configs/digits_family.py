"""Every objective on the digits: the small versions of Table 2 and of what followed.

Command   make train EXP=digits_table2_mean_vlb_learned
          make train EXP=digits_table2_mean_vlb
          make train EXP=digits_table2_mean_mse
          make train EXP=digits_table2_eps_vlb_learned
          make train EXP=digits_table2_eps_vlb
          make train EXP=digits_table2_eps_simple
          make train EXP=digits_cosine_hybrid
          make train EXP=digits_vdm
          make train EXP=digits_edm
          make train EXP=digits_vp_continuous
          make train EXP=digits_flow
          make train EXP=digits_conditional
          python -m experiments.ablation digits    all of them, under one budget
Hardware  2 CPU cores
Time      about 5 minutes each
Expected  the table of `python -m experiments.ablation digits`, in
          docs/objectives.md

The forward process and the objective of each experiment on CIFAR-10, with the network
and the optimiser of digits.
"""

from dataclasses import replace
from types import ModuleType

from diffusion_jax.lab.schema.config import Config, Net
from experiments.configs import (
    cifar10_conditional,
    cifar10_cosine_hybrid,
    cifar10_edm,
    cifar10_flow,
    cifar10_vdm,
    cifar10_vp_continuous,
    digits,
    table2,
)

MODULES: tuple[ModuleType, ...] = (
    cifar10_cosine_hybrid,
    cifar10_vdm,
    cifar10_edm,
    cifar10_vp_continuous,
    cifar10_flow,
    cifar10_conditional,
)


def small(name: str, full: Config, base: Config) -> Config:
    """Returns the forward process and objective of one experiment on another's data."""
    net: Net = replace(
        base.net,
        classes=full.net.classes,
        label_dropout=full.net.label_dropout,
        # The digits have 17 grey values, not 256: their finest detail is coarser.
        fourier=tuple(
            n - 4 if base.data.source == "digits" else n for n in full.net.fourier
        ),
    )
    optimizer = replace(
        base.optimizer,
        ema_lengths=full.optimizer.ema_lengths,
        ema_snapshots=base.train.steps // 16 if full.optimizer.ema_snapshots else 0,
    )
    steps = full.sample.steps
    if full.sample.sampler == "ddpm" and full.diffusion.variance != "learned":
        steps = steps or 250
    sample = replace(full.sample, every=base.sample.every, steps=steps)
    return replace(
        base,
        name=f"{base.name}_{name}",
        diffusion=replace(full.diffusion, num_steps=1000),
        net=net,
        optimizer=optimizer,
        sample=sample,
    )


def family(base: Config) -> dict[str, Config]:
    """Returns every objective on the data of an experiment, with its network."""
    full = (*table2.CONFIGS.values(), *(module.CONFIG for module in MODULES))
    made = [small(c.name.removeprefix("cifar10_"), c, base) for c in full]
    return {config.name: config for config in made}


CONFIGS: dict[str, Config] = family(digits.CONFIG)
