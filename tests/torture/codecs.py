"""Compressing and reading, killed at any moment: no file is half there."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from . import moments, trainings
from .cases import Outcome, check, outcome

ROUNDS, IMAGES, STEPS = 5, 100, 40


def cases(folder: Path, seed: int) -> Iterator[Outcome]:
    """Yields the outcomes."""
    rng, cache = random.Random(seed), folder / "cache"
    run, packed = folder / "digits", folder / "whole.ddpx"
    yield trainings.undisturbed(run, STEPS, cache=cache)

    def command(name: str, *words: object) -> trainings.Training:
        given = [name, *map(str, words)]
        log, module = folder / f"{name}.log", "experiments.codec"
        return trainings.start(run, log=log, cache=cache, module=module, given=given)

    def whole(name: str, *words: object) -> float:
        """Returns the seconds that a command takes."""
        began = time.monotonic()
        started = command(name, *words)
        code = trainings.ended(started)
        check(code == 0, f"exit code {code}, {trainings.last_words(started.log)}")
        return time.monotonic() - began

    data = ["--data", "--max-images", IMAGES, "--layout", "archive"]
    read = ["--run", run, "--out"]

    def killed(out: Path, seconds: float, *words: object) -> str:
        started = command(*words, out)
        at = rng.uniform(0.2, 1) * seconds
        moments.wait(started, moments.later(moments.started(started), at))
        trainings.kill(started)
        left = sorted(path.name for path in folder.glob(f"*{out.name}*"))
        check(set(left) <= {out.name} or not out.exists(), f"{left} are left")
        return f"after {at:.1f} s: {'all' if out.exists() else 'nothing'} is there"

    yield outcome("fit", lambda: f"{whole('fit', run):.0f} s")
    took = {}

    def undisturbed() -> str:
        took["compress"] = whole("compress", run, *data, "--out", packed)
        took["decompress"] = whole("decompress", packed, *read, folder / "whole.npz")
        return f"{took['compress']:.0f} and {took['decompress']:.0f} s"

    yield outcome(f"{IMAGES} images there and back", undisturbed)
    for number in range(ROUNDS):

        def compressing(out: Path = folder / f"{number}.ddpx") -> str:
            said = killed(out, took["compress"], "compress", run, *data, "--out")
            same = not out.exists() or out.read_bytes() == packed.read_bytes()
            check(same, "the file is another one")
            return said

        def reading(out: Path = folder / f"{number}.npz") -> str:
            said = killed(out, took["decompress"], "decompress", packed, *read)
            if out.exists():
                with np.load(out) as one, np.load(folder / "whole.npz") as other:
                    same = np.array_equal(one["images"], other["images"])
                check(same, "the images are others")
            return said

        def pictures(out: Path = folder / f"pictures{number}") -> str:
            said = killed(out, took["decompress"], "decompress", packed, *read)
            for path in out.glob("*.png"):
                with Image.open(path) as image:
                    image.load()
            return said

        for what, one in (
            ("compress", compressing),
            ("decompress", reading),
            ("decompress to pictures", pictures),
        ):
            yield outcome(f"kill -9 during {what} #{number + 1}", one)
