"""Networks that draw in one or two steps: distilled, consistent, and mean flow.

Command   make train EXP=digits_distilled
          make train EXP=digits_consistency
          make train EXP=digits_meanflow
          make train EXP=fashion_mnist_distilled
          make train EXP=fashion_mnist_consistency
          make train EXP=fashion_mnist_meanflow
          make train EXP=cifar10_distilled
          make train EXP=cifar10_consistency
          make train EXP=cifar10_meanflow
Hardware  2 CPU cores for the digits, one GPU for the others
Time      docs/few_steps.md has what was measured
Expected  for CIFAR-10 the papers' FID in one step and two: 9.12 and 4.51 distilled
          (Salimans and Ho 2022), 3.60 and 2.11 consistent (ECT, Geng et al. 2024),
          2.92 in one step of mean flow (Geng et al. 2025)

All but mean flow begin from a teacher, the run of digits, fashion_mnist or cifar10_edm,
which is trained before. From any other: python -m experiments.distil RUN.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Config, Diffusion
from diffusion_jax.lab.schema.few import Few
from diffusion_jax.lab.schema.sampling import Sample
from diffusion_jax.lab.schema.students import student
from experiments.configs import cifar10, cifar10_edm, digits, fashion_mnist


def family(name: str, teacher: Config, base: Config) -> list[Config]:
    """Returns a student of each kind, and mean flow on the same data.

    Args:
      name: of the data.
      teacher: of the students.
      base: the network and the data of mean flow.
    """
    source = f"runs/{teacher.name}"
    halved = student(teacher, "progressive", init_from=source)
    consistent = student(teacher, "ect", init_from=source)
    flow = replace(
        base,
        name=f"{name}_meanflow",
        diffusion=Diffusion(
            schedule="flow",
            prediction="velocity",
            loss="velocity",
            variance="small",
            density="logit_normal",
        ),
        few=Few("mean_flow"),
        net=replace(base.net, dropout=0.0),
        sample=Sample("mean_flow", 2, every=base.sample.every, count=base.sample.count),
    )
    return [
        replace(halved, name=f"{name}_distilled"),
        replace(consistent, name=f"{name}_consistency"),
        flow,
    ]


_ALL = (
    *family("digits", digits.CONFIG, digits.CONFIG),
    *family("fashion_mnist", fashion_mnist.CONFIG, fashion_mnist.CONFIG),
    *family("cifar10", cifar10_edm.CONFIG, cifar10.CONFIG),
)
CONFIGS: dict[str, Config] = {config.name: config for config in _ALL}
