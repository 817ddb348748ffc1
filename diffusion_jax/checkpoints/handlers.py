"""Additions to orbax: the manifest as an item of a checkpoint, and a leak mended.

Orbax renames a checkpoint when all items are written: there is no manifest without
arrays, nor arrays without a manifest.
"""

import dataclasses
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import future

from diffusion_jax.checkpoints import manifest


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes the manifest in the background, as an item of the checkpoint."""

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        async def write() -> None:
            text = manifest.describe(args.leaves, args.held, args.meta, args.score)
            name = f"process_{jax.process_index()}.json"
            (Path(directory) / name).write_text(text)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

    def save(self, directory: Any, args: Any) -> None:
        raise NotImplementedError("written in the background only")

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise NotImplementedError("read by manifest.read")


@ocp.args.register_with_handler(_ManifestHandler, for_save=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """The content of a manifest, see `manifest.describe`."""

    leaves: dict[str, Any]
    held: dict[str, list[manifest.Part]]
    meta: dict[str, Any]
    score: float | None


@ocp.args.register_with_handler(_ManifestHandler, for_restore=True)
@dataclasses.dataclass
class _ManifestRestore(ocp.args.CheckpointArgs):
    """Required by orbax of every handler, and not used."""


class _Spec:
    """Stands in for tensorstore's specification, and keeps its JSON as it is."""

    def __init__(self, json: dict[str, Any]) -> None:
        self.json = json

    def to_json(self) -> dict[str, Any]:
        return self.json


def stop_leaks() -> None:
    """Keeps orbax from asking tensorstore for JSON, which is never freed.

    Every string and object in it has a reference too many (tensorstore 0.1.67 to
    0.1.86). Orbax (0.12) asks for a specification that it has just made itself, once a
    leaf, and for counters that it only logs: 40 KB a save of 60 leaves.
    """
    with suppress(ImportError):  # of another version, where the leak stays
        from orbax.checkpoint._src.serialization import tensorstore_utils

        tensorstore_utils.ts = SimpleNamespace(
            Context=tensorstore.Context,
            KvStore=SimpleNamespace(
                Spec=_Spec,
                open=lambda spec, **how: tensorstore.KvStore.open(spec.json, **how),
            ),
            experimental_collect_matching_metrics=lambda _: [],
        )
