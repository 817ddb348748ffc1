"""What tests of networks share: the forms that GPUs compute in."""

import jax
import pytest


@pytest.fixture(params=["cpu", "gpu"])
def forms_of(request, monkeypatch):
    """Computes here in the forms of a CPU, then in those of a GPU."""
    if request.param == "cpu":
        yield
        return

    def of_gpu(*args, default, **_):
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", of_gpu)
    jax.clear_caches()
    yield
    jax.clear_caches()
