"""Data sets of images in their own formats, of a few images each."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def random_batches(seed: int = 0, num: int = 4) -> dict[str, tuple]:
    """Returns `{batch name: (images [num, 32, 32, 3], labels [num])}`."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.integers(0, 256, (num, 32, 32, 3), np.uint8),
            rng.integers(0, 10, num).astype(np.int32),
        )
        for name in BATCHES
    }


def binary(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Returns records as the CIFAR-10 page has them: label, then R, G and B planes."""
    planes = images.transpose(0, 3, 1, 2)
    return b"".join(
        bytes([label]) + plane.tobytes()
        for plane, label in zip(planes, labels.tolist(), strict=True)
    )


def binary_members() -> dict[str, bytes]:
    """Returns what the binary archive of CIFAR-10 has, by name."""
    batches = random_batches()
    return {f"cifar-10-batches-bin/{k}.bin": binary(*v) for k, v in batches.items()}


def archive(path: Path, members: dict[str, bytes]) -> Path:
    """Writes a packed archive; returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def idx(array: np.ndarray) -> bytes:
    """Returns an IDX file of bytes."""
    head = bytes([0, 0, 8, array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def png(array: np.ndarray) -> bytes:
    """Returns a PNG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def greys(images) -> list[int]:
    """Returns the first number of each image."""
    return images[np.arange(len(images))][:, 0, 0, 0].tolist()
