"""The manifest as a part of what orbax writes, so that both are there or none."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from diffusion_jax.checkpoints import manifest


class _ManifestHandler(ocp.AsyncCheckpointHandler):
    """Writes the manifest in the background, as part of the checkpoint."""

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
    """What a manifest is made of, see `manifest.describe`."""

    leaves: dict[str, Any]
    held: dict[str, list[manifest.Part]]
    meta: dict[str, Any]
    score: float | None


@ocp.args.register_with_handler(_ManifestHandler, for_restore=True)
@dataclasses.dataclass
class _ManifestRestore(ocp.args.CheckpointArgs):
    """Orbax wants one of each handler."""
