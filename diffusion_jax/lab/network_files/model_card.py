"""Writes the model card: the README.md of a network that is published."""

import shlex

from diffusion_jax.lab.network_files.records import About, public_source
from diffusion_jax.lab.schema import latents
from diffusion_jax.lab.schema.config import UNKNOWN, Config


def write(config: Config, about: About, name: str, digest: str, count: int) -> str:
    """Returns the text of the card, with the YAML head that the hub reads.

    The name is that of the folder, the digest (SHA-256) that of the file of its `count`
    weights.
    """
    net, rows = config.net, _rows(config, about, digest, count)
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    tag = "unconditional-image-generation"
    head = "" if net.classes else f"pipeline_tag: {tag}\n"
    return f"""---
library_name: diffusers
{head}tags:
- diffusers
- ddpm
- diffusion_jax
---

# {name}

A denoising diffusion probabilistic model (Ho, Jain, Abbeel 2020;
[arXiv:2006.11239](https://arxiv.org/abs/2006.11239)) in the form of diffusers.

| | |
|---|---|
{table}

## Use

{_use(config, name)}

## Scores

{_scores(about.scores)}

## Limits

It draws images like those it was trained on, with what is wrong or one-sided in them.
`diffusion_jax.json` holds the whole configuration, from which diffusion_jax reads the
folder back as it was.
"""


def write_autoencoder(
    config: Config, about: About, name: str, digest: str, count: int
) -> str:
    """Returns the card of an autoencoder; the arguments are those of `write`."""
    own, data = config.autoencoder, config.data
    step = "" if about.step is None else f" of step {about.step:,}"
    known = data.source != UNKNOWN
    rows = {
        "images": f"{data.shape[0]}x{data.shape[1]}, {data.channels} channels",
        "data": public_source(data.source) if known else "not stated",
        "latents": f"f{2 ** (len(own.multipliers) - 1)}, {own.latent} channels; "
        "scaling_factor is 1, not fitted",
        "weights": f"{about.weights}{step}, {count:,}, float32",
        "origin": about.origin,
        "SHA-256": f"`{digest}`",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return f"""---
library_name: diffusers
tags:
- diffusers
- diffusion_jax
---

# {name}

An autoencoder with KL regularisation, of latent diffusion (Rombach et al. 2022;
[arXiv:2112.10752](https://arxiv.org/abs/2112.10752)), in the form of diffusers.

| | |
|---|---|
{table}

```python
from diffusers import AutoencoderKL

net = AutoencoderKL.from_pretrained({name!r})
```

```
python -m experiments.eval_autoencoder {shlex.quote(name)}     # with diffusion_jax
```
"""


def _rows(config: Config, about: About, digest: str, count: int) -> dict[str, str]:
    """Returns the first table of the card: what the network is, and how it came."""
    data, d, net = config.data, config.diffusion, config.net
    step = "" if about.step is None else f" of step {about.step:,}"
    colours = {1: "grey", 3: "RGB"}[data.channels]
    has_ends = d.schedule in ("linear", "quad", "warmup10", "warmup50")
    ends = f" from {d.beta_start:g} to {d.beta_end:g}" if has_ends else ""
    unknown = "not stated by whoever trained it"
    rows = {
        "images": f"{data.shape[0]}x{data.shape[1]}, {colours}",
        "data": unknown if data.source == UNKNOWN else public_source(data.source),
        **_latents(config),
        "weights": f"{about.weights}{step}, float32",
        "origin": about.origin,
        "SHA-256": f"`{digest}`",
        "network": _network(config, count),
        "diffusion": f"T = {d.num_steps:,}, {d.schedule} schedule{ends}",
        "predicts": {"eps": "the noise", "x0": "the image"}.get(d.prediction, "v"),
        "reverse variance": config.sample.variance or d.variance,
        "x0 clipped": "yes" if config.sample.clip else "no",
    }
    if net.classes:
        none = ", and a last row for none" if net.label_dropout else ""
        rows["classes"] = f"{net.classes}{none}"
    if about.recipe:
        rows["training"] = _training(config)
    if about.changes:
        rows["changed under way"] = "; ".join(about.changes)
    return rows


def _latents(config: Config) -> dict[str, str]:
    if not latents.is_latent(config):
        return {}
    height, width, channels = latents.seen(config)
    said = f"{height}x{width}, {channels} channels, of the autoencoder in vqvae/"
    return {"latents": f"{said}; their scale is in its weights"}


def _network(config: Config, count: int) -> str:
    net = config.net
    widths = ", ".join(str(net.channels * m) for m in net.multipliers)
    height, width, _ = latents.seen(config)
    factors = [min(height, width) // side for side in net.attention]
    seen = " and ".join(f"{height // n}x{width // n}" for n in factors)
    where = f" at {seen} and" if seen else ""
    return (
        f"U-Net of {count:,} weights; widths {widths}; {net.blocks} blocks a level; "
        f"attention{where} in the middle; {net.variant} constants"
    )


def _training(config: Config) -> str:
    t, o, d = config.train, config.optimizer, config.diffusion
    data = config.data
    moved = (
        ", mirrored at random" * data.flip
        + f", cut at random from {data.random_crop} pixels more"
        * (data.random_crop > 0)
        + f", turned by up to {data.rotate:g} degrees" * (data.rotate > 0)
    )
    return (
        f"loss {d.loss}, batch {t.batch_size}{moved}, Adam at {o.learning_rate:g}, "
        f"dropout {config.net.dropout:g}, average decay {o.ema_decay[0]:g}, "
        f"seed {t.seed}"
    )


def _use(config: Config, name: str) -> str:
    if config.net.classes:
        first = f"""from diffusers import UNet2DModel

net = UNet2DModel.from_pretrained({name!r}, subfolder="unet")
# net(x, t, class_labels=...): a pipeline knows no labels"""
    else:
        few = ", num_inference_steps=2" if config.few.method != "none" else ""
        opener = "LDMPipeline" if latents.is_latent(config) else "DDPMPipeline"
        first = f"""from diffusers import {opener}

images = {opener}.from_pretrained({name!r})(batch_size=4{few}).images"""
    return f"""```python
{first}
```

```
python -m experiments.sample {shlex.quote(name)}     # with diffusion_jax
```"""


def _scores(scores: dict[str, dict[str, str]]) -> str:
    if not scores:
        return "None are recorded here."
    rows = (
        f"| {_cell(name)} | {_cell(s['value'])} | {_cell(s['of'])} |"
        for name, s in scores.items()
    )
    return "\n".join(["| | | of |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    """Returns text with what would end a cell of a table escaped."""
    return text.replace("|", "\\|").replace("\n", " ")
