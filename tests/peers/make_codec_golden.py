"""Writes tests/golden/codec.*: files of the first version. Run once, and never again.

PYTHONPATH=. python tests/peers/make_codec_golden.py
"""

from pathlib import Path

import numpy as np

from diffusion_jax import schedule
from diffusion_jax.codec import archive, fitting, progressive
from diffusion_jax.codec import profile as profiles

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (3, 4, 1)


def main() -> None:
    """Writes a profile, and a file of each layout with the images that are in it."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    matrix = basis @ np.diag(np.linspace(0.1, 0.9, 12)) @ basis.T

    def denoise(x: np.ndarray, t: float) -> np.ndarray:
        return (x.reshape(len(x), -1) @ matrix / (1 + t / 50)).reshape(x.shape)

    x0 = rng.normal(size=(300, 12)) @ basis * np.linspace(0.05, 0.6, 12)
    values = np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8) & 0xF0
    images = values.reshape(-1, *SHAPE)
    profile = fitting.fit(
        denoise, schedule.cosine(100), images, about={"name": "golden"}, batch_size=300
    )
    profiles.save(profile, GOLDEN / "codec.safetensors")
    few = images[:20].copy()
    few[3, 1, 1] = 77  # outside the alphabet
    files = {
        "archive": archive.encode(profile, denoise, few),
        "progressive": progressive.encode(profile, denoise, few),
    }
    stored = {name: np.frombuffer(data, np.uint8) for name, data in files.items()}
    np.savez_compressed(GOLDEN / "codec.npz", matrix=matrix, images=few, **stored)
    print({name: len(data) for name, data in files.items()}, len(profile.alphabet))


if __name__ == "__main__":
    main()
