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

UNKNOWN = "No such compile option: 'xla_wish'"


@pytest.fixture
def wished(monkeypatch):
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"xla_wish": True})


def add(state, batch):
    # On the mesh a sum over all, on each device over its share.
    return state + batch.sum(), {}


@pytest.mark.parametrize("strategy", ["mesh", "shard_map"])
def test_a_step_is_compiled_with_the_options_of_its_platform(strategy, wished):
    step = parallel.data_parallel(add, parallel.make_mesh(2), strategy=strategy)
    with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
        step(jnp.zeros(()), jnp.ones(4))


def test_options_that_are_given_stand_in_for_those_of_the_platform(wished):
    mesh = parallel.make_mesh(2)
    step = parallel.data_parallel(
        add, mesh, options={"xla_llvm_disable_expensive_passes": True}
    )
    assert step(jnp.zeros(()), jnp.ones(4))[0] == 4
    other = parallel.data_parallel(add, mesh, options={"xla_hope": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_hope'"):
        other(jnp.zeros(()), jnp.ones(4))


@pytest.mark.parametrize("lower", [compiled.training, compiled.sampling])
def test_what_is_counted_has_them_too(lower, wished):
    one = config.replace(TINY, "train", batch_size=4)
    lowered, _ = lower(one, parallel.make_mesh(1))
    with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
        lowered.compile()
