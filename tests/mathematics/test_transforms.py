"""Every public pure function under eager, jit, vmap, grad, pmap and shard_map.

One row a case: a function of arrays whose first axis is the batch of eight, one example
a device. All in float64, where what the transforms do to rounding is far below what
they could do to the mathematics. The rows are in rows_*.py of tests/helpers.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transforms
from jax.sharding import AxisType, PartitionSpec
from transforms import B, Row, inputs

import diffusion_jax

MODULES = [
    importlib.import_module(f"diffusion_jax.{found.name}")
    for found in pkgutil.iter_modules(diffusion_jax.__path__)
    if not found.ispkg and not found.name.startswith("_")
]
FILES = [
    importlib.import_module(path.stem)
    for path in sorted(Path(transforms.__file__).parent.glob("rows_*.py"))
]
ROWS = [row for file in FILES for row in file.ROWS]
NOT_OF_ARRAYS = set().union(*(getattr(f, "NOT_OF_ARRAYS", set()) for f in FILES))
PMAPPED = {"gaussian.q_sample", "gaussian.p_sample", "losses.simple", "samplers.sample"}
BY_PMAP = [next(row for row in ROWS if name in row.covers) for name in sorted(PMAPPED)]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
pytestmark = pytest.mark.usefixtures("x64")


def args_of(row: Row, seed: int = 0) -> list[Any]:
    found = inputs(seed)
    return [found[name] for name in row.inputs.split()]


def same(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    one, other = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-10)


def is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def test_every_public_function_has_a_row():
    public = {
        f"{module.__name__.split('.')[1]}.{name}"
        for module in MODULES
        for name, member in vars(module).items()
        if inspect.isfunction(member)
        and member.__module__ == module.__name__
        and not name.startswith("_")
    }
    covered = {name for row in ROWS for name in row.covers.split()}
    assert covered == public - NOT_OF_ARRAYS


@rows
def test_jit_vmap_and_shard_map_equal_eager(row):
    args, others = args_of(row), args_of(row, seed=1)
    expected = row.fn(*args)
    assert all(len(leaf) == B for leaf in jax.tree.leaves(expected))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    options = {"in_specs": spec, "out_specs": spec, "check_vma": row.check_vma}
    mapped = jax.shard_map(row.fn, mesh=mesh, **options)
    traces = []

    @jax.jit
    def all_ways(*a):
        traces.append(1)
        return row.fn(*a), jax.vmap(alone(row))(*a), mapped(*a)

    for made in all_ways(*args):
        same(made, expected)
    first, *more = all_ways(*others)
    for made in more:
        same(made, first)
    assert len(traces) == 1, "the second call traced again"


# JAX makes pmap of jit and shard_map: of each kind of function one will do.
@pytest.mark.parametrize("row", BY_PMAP, ids=lambda row: row.id)
def test_pmap_equals_eager(row):
    args = args_of(row)
    same(jax.pmap(alone(row))(*args), row.fn(*args))


def alone(row: Row) -> Callable[..., Any]:
    """The function of one example, without the first axis."""

    def one(*a):
        wide = jax.tree.map(lambda leaf: leaf[None], a)
        return jax.tree.map(lambda leaf: leaf[0], row.fn(*wide))

    return one


@rows
def test_gradients(row):
    """Finite, and those of finite differences."""
    args = args_of(row)
    leaves, tree = jax.tree.flatten(args)
    free = [k for k, leaf in enumerate(leaves) if is_float(leaf)]
    # Where there is no noise the log-SNR is infinite: not a number to vary.
    finite = {k: jnp.isfinite(leaves[k]) for k in free}

    def total(values):
        filled = list(leaves)
        for k, value in zip(free, values, strict=True):
            filled[k] = jnp.where(finite[k], value, leaves[k])
        out = jax.tree.leaves(row.fn(*jax.tree.unflatten(tree, filled)))
        return sum(jnp.sin(leaf).sum() for leaf in out if is_float(leaf))

    if not free:
        pytest.skip("a function of integers or keys alone")
    values = [jnp.where(finite[k], leaves[k], 0.0) for k in free]
    both = jax.jit(jax.value_and_grad(total))
    _, grads = both(values)
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    # Along one direction, central differences are good to 1e-7 of the gradient's size.
    rng, step = np.random.default_rng(0), 1e-6
    way = [jnp.asarray(rng.normal(size=value.shape)) for value in values]
    ahead, behind = (
        both([a + h * b for a, b in zip(values, way, strict=True)])[0]
        for h in (step, -step)
    )
    slope = sum(jnp.vdot(a, b) for a, b in zip(grads, way, strict=True))
    size = sum(jnp.vdot(abs(a), abs(b)) for a, b in zip(grads, way, strict=True))
    assert abs((ahead - behind) / (2 * step) - slope) < 1e-6 * (1 + size)
