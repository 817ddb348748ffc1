"""Table 2 of Ho et al. 2020: what the network predicts, and what it is trained on.

Command   make train EXP=table2_mean_vlb_learned
          make train EXP=table2_mean_vlb
          make train EXP=table2_mean_mse
          make train EXP=table2_eps_vlb_learned
          make train EXP=table2_eps_vlb
          make train EXP=table2_eps_simple
Hardware  one large GPU, or 8 TPU cores as in the paper, for each
Time      10.6 hours each on a TPU v3-8 by the paper; not measured here
Expected  the paper's Inception score and FID of 50,000 CIFAR-10 samples:

                            predicting the mean    predicting eps
          L, learned        7.28    23.69          (unstable)
          L, fixed          8.06    13.22          7.67    13.51
          squared error     (unstable)             9.46     3.17

          Steps without a finite loss are skipped; after 20 in a row the run is
          given up, with the last checkpoint left as it is

The paper left two cells blank: "unstable to train". All else is that of
cifar10_official: the authors' arithmetic, for the numbers of their table.
"""

from dataclasses import replace

from diffusion_jax.lab.schema.config import Config, Diffusion
from experiments.configs import cifar10_official

BASE = cifar10_official.CONFIG
CELLS = {
    "mean_vlb_learned": Diffusion(prediction="mean", loss="vlb", variance="learned"),
    "mean_vlb": Diffusion(prediction="mean", loss="vlb"),
    "mean_mse": Diffusion(prediction="mean", loss="mean"),
    "eps_vlb_learned": Diffusion(prediction="eps", loss="vlb", variance="learned"),
    "eps_vlb": Diffusion(prediction="eps", loss="vlb"),
    "eps_simple": Diffusion(prediction="eps", loss="eps"),
}
CONFIGS: dict[str, Config] = {
    f"table2_{cell}": replace(BASE, name=f"table2_{cell}", diffusion=diffusion)
    for cell, diffusion in CELLS.items()
}
