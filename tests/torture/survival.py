"""Does to runs what machines do: kills them, fills their disks, lets them run long.

Each subject works in a folder of its own, which stays where something failed.
"""

import os
import time
import traceback

import pytest

from . import determinism, disks, kills, partners, signals, soak

# Long ones first.
SUBJECTS = {
    "soak": soak.cases,  # 20,000 steps, and 500 pictures: memory
    "kill": kills.cases,  # -9 at 30 moments
    "kill-latent": kills.of_latents,  # at 5, an autoencoder and a run of its latents
    "signal": signals.cases,  # SIGTERM and SIGINT at any moment, and twice
    "disk": disks.cases,  # full, read-only, missing, and room again
    "determinism": determinism.cases,  # the same bytes twice
    "hosts": partners.cases,  # two processes, one killed
    "hosts-latent": partners.of_latents,  # the same of an autoencoder and its latents
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_is_lost(subject, tmp_path):
    seed, failed = int(os.environ.get("TORTURE_SEED", "0")), []
    for what, case in SUBJECTS[subject](tmp_path, seed):
        began = time.monotonic()
        try:
            verdict, said = "passed", case()
        except pytest.skip.Exception as error:
            verdict, said = "skipped", error
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            verdict, said = "failed", f"{type(error).__name__}: {error}"
        line = " ".join(f"{what}: {said}".split()) if said else what
        print(f"{verdict:<8} {line}, {time.monotonic() - began:.1f} s", flush=True)
        failed += [line] * (verdict == "failed")
    assert not failed
