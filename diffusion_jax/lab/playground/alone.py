"""Writes a page that draws without a server: the network in JavaScript, in one file.

The page has the weights, the noise levels and what turns the output of the network into
x0, which is linear in the output and in x_t for each kind of prediction that it takes.
Its noise is that of JAX: a seed draws the same images as `samplers.ddim`, within
rounding.
"""

import base64
import json
from importlib import resources
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax import gaussian
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.playground.subject import Subject
from diffusion_jax.lab.wiring import build
from diffusion_jax.storage import trees

MOST = 4 * 2**20
"""Weights that a page may have: each takes 5.3 bytes of it."""
LINEAR = ("eps", "x0", "v", "score", "velocity")


def page(subject: Subject) -> str:
    """Returns the page of a network.

    Raises:
      ConfigError: it is of a kind that the page does not know.
    """
    config = subject.config
    weights = trees.by_path(subject.drawable.params["net"], ".")
    count = sum(int(np.size(x)) for x in weights.values())
    d, net = config.diffusion, config.net
    for wrong, what, got in (
        (net.classes, "without classes", f"{net.classes} classes"),
        (any(name.startswith("span") for name in weights), "of single steps", "jumps"),
        (net.fourier, "without Fourier features", "some"),
        (net.variant != "official", "of the variant official", net.variant),
        (d.prediction not in LINEAR, f"of {', '.join(LINEAR)}", d.prediction),
        (d.variance in ("learned", "range"), "without a learned variance", d.variance),
        (build.is_continuous(config), "of a discrete schedule", d.schedule),
        (count > MOST, f"of at most {MOST:,} weights", f"{count:,}"),
    ):
        if wrong:
            raise ConfigError(
                f"a network in a page must be one {what}; got {got}. Open it by the "
                "server instead, without --page."
            )
    total, t = d.num_steps, jnp.arange(1, d.num_steps + 1)
    levels = build.chain_schedule(config)
    level, one = levels(t), jnp.ones([total, 1])
    of_x, of_output = (
        gaussian.predict(d.prediction, output, x, level).x0[:, 0]
        for x, output in ((one, 0 * one), (0 * one, one))
    )
    every = levels(jnp.arange(total + 1))
    index, parts, at = {}, [], 0
    for name, leaf in weights.items():
        index[name] = at
        parts.append(np.asarray(leaf, "<f4").ravel())
        at += parts[-1].size
    about: dict[str, Any] = {
        "name": config.name,
        "told": subject.told,
        "weights": count,
        "shape": list(config.data.shape),
        "T": total,
        "channels": net.channels,
        "levels": len(net.multipliers),
        "blocks": net.blocks,
        "groups": net.groups,
        "clip": config.sample.clip,
        "index": index,
        "alpha": _packed(every.alpha),
        "sigma": _packed(every.sigma),
        "of_x": _packed(of_x),
        "of_output": _packed(of_output),
        "data": _packed(np.concatenate(parts)),
    }
    text = resources.files(__package__).joinpath("alone.html").read_text("utf-8")
    return text.replace("__DATA__", json.dumps(about).replace("<", "\\u003c"))


def _packed(values: Any) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
