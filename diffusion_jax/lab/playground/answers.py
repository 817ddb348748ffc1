"""Makes what the page is answered with: a line of JSON a step, or what a run logged."""

import base64
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.codec import container, progressive
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.coding import coder
from diffusion_jax.lab.measure import formats_compared
from diffusion_jax.lab.playground import walk
from diffusion_jax.lab.playground.plans import Route
from diffusion_jax.lab.playground.subject import Subject
from diffusion_jax.lab.playground.walk import Walk
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.wiring import chains

CUTS = 64
"""Most places at which a compressed file is looked at."""
MOST_BYTES, POINTS = 16 * 2**20, 2000
"""Most bytes of a picture that is read, and most lines of a curve."""

Line = dict[str, Any]


class Drawing:
    """A route that is walked: whoever stopped it may go on."""

    def __init__(self, route: Route, counts: dict[Config, float]) -> None:
        """Stands at the beginning of the route; `counts` keeps what was counted."""
        self.route, self.walk, self.counts = route, Walk(route.first), counts
        self.upward = route.then is not None
        """Whether a second chain follows."""

    def lines(self) -> Iterator[Line]:
        """Yields a line for each step from here on, and a last one with the command."""
        route, plan = self.route, self.walk.plan
        steps = len(plan.grid) - 1
        yield {"shape": list(plan.start.shape), "steps": steps}
        levels = walk.logsnr(plan.config, plan.drawable, plan.grid)
        for frame in walk.frames(self.walk):
            yield {
                "step": frame.step,
                "t": frame.t,
                "logsnr": levels[frame.step],
                "x0": _packed(frame.x0),
                "xt": _packed(frame.x_t),
            }
        if self.upward and route.then is not None:
            seconds, self.upward = self.walk.seconds, False
            self.walk = Walk(route.then(self.walk.x), seconds=seconds)
            yield from self.lines()
            return
        yield {
            "done": True,
            "ms": round(1000 * self.walk.seconds, 1),
            "evaluations": self._evaluations() if route.counted else None,
            "command": route.command,
        }

    def _evaluations(self) -> float:
        """Returns the network evaluations (NFE) of an image."""
        config = self.route.config
        if config not in self.counts:
            found = chains.count_evaluations(config, self.route.first.drawable)
            self.counts[config] = found
        return self.counts[config]


class Bytes:
    """A compressed image, byte by byte."""

    def __init__(self, subject: Subject, image: np.ndarray, *, nearest: bool) -> None:
        """Holds an image, uint8 [H, W, C], and whether it is to be rounded."""
        self.subject, self.image, self.nearest = subject, image, nearest
        self.data = b""

    def lines(self, found: coder.Coder) -> Iterator[Line]:
        """Yields what the file is, then what a reader sees of so many of its bytes."""
        began = time.perf_counter()
        if self.nearest:
            values = found.profile.alphabet.astype(int)
            apart = np.abs(self.image[..., None].astype(int) - values)
            self.image = values[apart.argmin(-1)].astype(np.uint8)
        image = self.image[None]
        data = progressive.encode(found.profile, found.denoise, image)
        self.data, file = data, container.opened(data, found.profile)
        known = formats_compared.LOSSLESS.items()
        alone = {
            name: len(formats_compared.saved(self.image, **how))
            for name, how in known
            if how["format"] != "JXL" or not formats_compared.missing()
        }
        sizes = {"plain pixels": image.size, "this network": len(data), **alone}
        yield {
            "bytes": len(data),
            "header": len(data) - len(file.payload),
            "layout": file.layout,
            "original": _packed(image),
            "sizes": sizes,
        }
        length = len(file.payload)
        count = min(length, CUTS)
        cuts = np.unique(np.linspace(0, length, count + 1).astype(int)).tolist()
        for cut in cuts if file.layout == "progressive" else [length]:
            bits = None if cut == length else 8 * cut
            seen = progressive.decode(found.profile, found.denoise, data, bits=bits)
            yield {
                "cut": cut,
                "image": _packed(seen.images),
                "exact": seen.exact,
                "whole": seen.whole,
            }
        seconds = time.perf_counter() - began
        words = f"compress {self.subject.typed} IMAGE.png --out IMAGE.ddpx"
        yield {
            "done": True,
            "ms": round(1000 * seconds, 1),
            "command": f"python -m experiments.codec {words}",
        }


def _packed(images: np.ndarray) -> str:
    return base64.b64encode(images.tobytes()).decode()


def metrics(run: runs.Run, digest: str, since: int) -> dict[str, Any]:
    """Returns what a run has logged after a step, and the steps of its pictures.

    The run may be training now. `since` is the step of the last line that is known, -1
    for none; the digest is that of the weights whose evaluations are wanted.

    Raises:
      ConfigError: a file is damaged.
    """
    lines = [x for x in runs.read_lines(run.metrics) if x["step"] > since]
    speed = [x for x in runs.read_lines(run.speed) if x["step"] > since]
    return {
        "metrics": _thinned(lines),
        "speed": _thinned(speed),
        "samples": sorted(_samples(run)),
        "results": _results(run, digest),
    }


def sample(run: runs.Run, step: int) -> bytes:
    """Returns the picture that a run drew after a step.

    Raises:
      ConfigError: there is none.
    """
    found = _samples(run)
    if step not in found:
        raise ConfigError(
            f"the step must be one with a picture; got {step}. /api/metrics has them."
        )
    return found[step].read_bytes()


def _samples(run: runs.Run) -> dict[int, Path]:
    """Returns the pictures of a run by their steps."""
    found = {}
    for path in run.samples.glob("step_*.png"):
        at = re.fullmatch(r"step_(\d+)", path.stem)
        if at and path.is_file() and path.stat().st_size <= MOST_BYTES:
            found[int(at[1])] = path
    return found


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns at most so many lines, the last one among them."""
    every = max(1, math.ceil(len(lines) / POINTS))
    return lines[::-every][::-1]


def _results(run: runs.Run, digest: str) -> list[dict[str, Any]]:
    """Returns what was measured of these weights: the newest of each kind."""
    newest = dict(results.read(run, digest))
    return [{"name": name, "values": _plain(each)} for name, each in newest.items()]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns what fits a table: the numbers, then how they were measured."""
    numbers = values.get("numbers", {})
    each = numbers.items() if isinstance(numbers, dict) else ()
    found = {name: x.get("mean") if isinstance(x, dict) else x for name, x in each}
    found |= {name: x for name, x in values.items() if name != "weights_sha256"}
    return {k: x for k, x in found.items() if isinstance(x, str | int | float)}
