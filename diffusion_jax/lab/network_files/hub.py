"""Fetches networks of the Hugging Face hub, into the cache of its own tools."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.errors import DataError, needs
from diffusion_jax.storage.download import check_address, within

PATIENCE = 8.0
"""Seconds until the hub has said what it has, or is taken for out of reach."""

# A network alone, or the pipeline that it is the U-Net of.
_CONFIGS = (
    *("README.md", "model_index.json", "config.json", "scheduler_config.json"),
    *("unet/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"),
)
_WEIGHTS = tuple(f"{at}diffusion_pytorch_model" for at in ("", "unet/", "vqvae/"))
# The second is a pickle, read with care: only where there is nothing better.
_ENDINGS = (".safetensors", ".bin")


def fetch(name: str, *, cache: Path | None = None, endpoint: str | None = None) -> Path:
    """Downloads a network of diffusers from the hub; returns its folder.

    Only its configuration and weights are fetched, and only what is not here yet. What
    is here whole is used where the hub cannot be reached.

    Args:
      name: of the repository, "owner/name".
      cache: the folder to keep it in; when not given, the hub's own (HF_HUB_CACHE).
      endpoint: address of the hub; when not given, its own, or HF_ENDPOINT.

    Raises:
      DataError: not such a name, no such repository, one that is not open to the user
        or holds no network of diffusers; an address without encryption, no network, a
        refusal, or huggingface_hub is not installed.
    """
    if not re.fullmatch(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise DataError(
            f"the name of a network on the hub must be owner/name; got {name!r}. Copy "
            "it from its page, such as google/ddpm-cifar10-32."
        )
    needs("huggingface_hub", "fetch a network by its name", "hub")
    import huggingface_hub as hub
    import huggingface_hub.constants
    import huggingface_hub.utils

    where = endpoint or hub.constants.ENDPOINT
    check_address(where)
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()  # which are shown without a terminal too
    api = hub.HfApi(endpoint=endpoint)
    try:
        # By itself the package tries again and again, for minutes.
        about = within(PATIENCE, lambda: api.model_info(name, timeout=PATIENCE))
        wanted = _wanted([file.rfilename for file in about.siblings or ()], name)
        folder = hub.snapshot_download(
            name, allow_patterns=wanted, cache_dir=cache, endpoint=endpoint
        )
        return Path(folder)
    except DataError:
        raise
    except Exception as error:  # of the hub, of its client and of the system
        _refuse_known(hub, error, name, where)
        found = _cached(hub, name, cache)
        if found is None:
            said = " ".join(str(error).split())[:200].rstrip(".")
            raise DataError(
                f"{where} must be within reach to fetch {name}; got "
                f"{type(error).__name__}: {said}. Check the network and the disk; or "
                f"fetch it by hand, hf download {name} --local-dir DIR, and give DIR."
            ) from error
        return found


def _wanted(files: Sequence[str], name: str) -> list[str]:
    """Returns what to fetch of the files that a repository has.

    >>> _wanted(["config.json", "diffusion_pytorch_model.bin", "logs/events"], "a/b")
    ['config.json', 'diffusion_pytorch_model.bin']
    """
    for ending in _ENDINGS:
        weights = [f"{stem}{ending}" for stem in _WEIGHTS if f"{stem}{ending}" in files]
        if weights:
            return [name for name in _CONFIGS if name in files] + weights
    raise DataError(
        f"{name} must hold {_WEIGHTS[0]}{_ENDINGS[0]}, by itself or in unet/; got "
        f"{', '.join(sorted(files)[:8]) or 'an empty repository'}. Name a repository "
        "of a network that diffusers saved."
    )


def _cached(hub: Any, name: str, cache: Path | None) -> Path | None:
    """Returns the folder of a network that was fetched before, and whole."""
    for weights in (f"{stem}{ending}" for ending in _ENDINGS for stem in _WEIGHTS):
        found = hub.try_to_load_from_cache(name, weights, cache_dir=cache)
        if isinstance(found, str) and Path(found).with_name("config.json").is_file():
            return Path(found.removesuffix(weights))
    return None


def _refuse_known(hub: Any, error: Exception, name: str, where: str) -> None:
    """Raises the error that says what to do, where the hub has said what is wrong."""
    if isinstance(error, hub.utils.GatedRepoError):
        raise DataError(
            f"{name} must be open to you; got a refusal, for its owner asks for "
            f"consent first. Give it at {where}/{name}, log in (hf auth login), and "
            "try again."
        ) from error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 404):  # the first where nobody is logged in
        raise DataError(
            f"{name} must be a repository of {where}; got status {status}: there is "
            "none of this name, or it is private. Check the name, or log in (hf auth "
            "login)."
        ) from error
