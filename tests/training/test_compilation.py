"""What the compiler is told of the large programs."""

import jax
import jax.numpy as jnp
import pytest
from test_parallel import TINY

from diffusion_jax.lab.schema import config
from diffusion_jax.training import compilation, parallel
from experiments import compiled

# Where JAX is told to optimise little, no option counts.
pytestmark = pytest.mark.optimised


@pytest.fixture(autouse=True)
def wished(monkeypatch):
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"xla_wish": True})


def unknown(option):
    said = f"No such compile option: '{option}'"
    return pytest.raises(jax.errors.JaxRuntimeError, match=said)


@pytest.mark.parametrize("strategy", ["mesh", "shard_map"])
def test_a_step_is_compiled_with_the_options_of_its_platform_or_those_given(strategy):
    def run(options=None):
        step = parallel.data_parallel(
            lambda state, batch: (state, {}),
            parallel.make_mesh(2),
            strategy=strategy,
            options=options,
        )
        return step(jnp.ones(()), jnp.ones(4))[0]

    with unknown("xla_wish"):
        run()
    with unknown("xla_hope"):
        run({"xla_hope": True})
    assert run({"xla_llvm_disable_expensive_passes": True}) == 1


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("lower", [compiled.training, compiled.sampling])
def test_what_is_counted_has_them_too(lower):
    one = config.replace(TINY, "train", batch_size=4)
    lowered, _ = lower(one, parallel.make_mesh(1))
    with unknown("xla_wish"):
        lowered.compile()
