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
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
NAMES = "gaussian.q_sample", "gaussian.p_sample", "losses.simple", "samplers.sample"
SPREAD = [next(row for row in ROWS if name in row.covers) for name in NAMES]
pytestmark = pytest.mark.usefixtures("x64")


def args_of(row: Row, seed: int = 0) -> list[Any]:
    found = inputs(seed)
    return [found[name] for name in row.inputs.split()]


def id_of(row: Row) -> str:
    return row.covers.split()[0]


def same(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    one, other = map(jax.tree.leaves_with_path, (actual, expected))
    for (path, a), (_, b) in zip(one, other, strict=True):
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-10, err_msg=where)


def is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def total(tree: Any) -> jax.Array:
    """One number that everything in a result has a share in."""
    found = [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return sum((jnp.sin(leaf).sum() for leaf in found), jnp.zeros(()))


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


def alone(row: Row) -> Callable[..., Any]:
    """The function of one example, without the first axis."""

    def one(*a):
        wide = jax.tree.map(lambda leaf: leaf[None], a)
        return jax.tree.map(lambda leaf: leaf[0], row.fn(*wide))

    return one


def with_gradient(row: Row, args: Any) -> tuple[Any, Any]:
    """What it gives example by example, and the gradient of the total of that."""
    leaves, tree = jax.tree.flatten(args)
    free = [k for k, leaf in enumerate(leaves) if is_float(leaf) and row.slopes]

    def run(values):
        filled = list(leaves)
        for k, value in zip(free, values, strict=True):
            # Where there is no noise the log-SNR is infinite: not a number to vary.
            filled[k] = jnp.where(jnp.isfinite(leaves[k]), value, leaves[k])
        out = jax.vmap(alone(row))(*jax.tree.unflatten(tree, filled))
        return total(out), out

    values = [jnp.where(jnp.isfinite(leaves[k]), leaves[k], 0.0) for k in free]
    (_, out), slopes = jax.value_and_grad(run, has_aux=True)(values)
    return out, slopes


@pytest.mark.parametrize("row", ROWS, ids=id_of)
def test_all_ways_equal_eager_and_gradients_are_slopes(row):
    """Gradients are finite, and slopes. shard_map asks of each only what it checks."""
    args, others, traces = args_of(row), args_of(row, seed=1), []
    expected = row.fn(*others)
    assert all(len(leaf) == B for leaf in jax.tree.leaves(expected))

    @jax.jit
    def compiled(*a):
        traces.append(1)
        out, slopes = with_gradient(row, a)
        return slopes, out

    slopes, _ = compiled(*args)
    same(compiled(*others)[1], expected)
    hold_slopes(lambda a: total(compiled(*a)[1]), args, slopes)
    assert len(traces) == 1, "another call traced again"
    jax.eval_shape(over_devices(row), *args)


def hold_slopes(fn: Callable, args: Any, slopes: Any) -> None:
    """Along one direction, central differences are good to 1e-7 of the size."""
    if not slopes:
        return
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    rng, step = np.random.default_rng(0), 1e-6
    leaves, tree = jax.tree.flatten(args)
    way = [rng.normal(size=leaf.shape) if is_float(leaf) else None for leaf in leaves]

    def moved(h):
        return [
            leaf if b is None else leaf + h * b
            for leaf, b in zip(leaves, way, strict=True)
        ]

    ahead, behind = (fn(jax.tree.unflatten(tree, moved(h))) for h in (step, -step))
    pairs = list(zip(slopes, (b for b in way if b is not None), strict=True))
    slope = sum(np.vdot(a, b) for a, b in pairs)
    size = sum(np.vdot(abs(a), abs(b)) for a, b in pairs)
    assert abs((ahead - behind) / (2 * step) - slope) < 1e-6 * (1 + size)


def over_devices(row: Row) -> Callable[..., Any]:
    """One example a device."""
    spec = PartitionSpec("data")
    options = {"in_specs": spec, "out_specs": spec, "check_vma": row.check_vma}
    return jax.shard_map(row.fn, mesh=MESH, **options)


# Of each kind of function one is run so: on a device it is what it is for one example.
@pytest.mark.parametrize("row", SPREAD, ids=id_of)
def test_examples_on_devices_of_their_own_equal_eager(row):
    args = args_of(row)
    for ways in (jax.pmap(alone(row)), jax.jit(over_devices(row))):
        same(ways(*args), row.fn(*args))
