"""Every public pure function under eager, jit, vmap, grad, pmap and shard_map.

Each call of helpers/calls.py is a function of arrays whose first axis is the batch of
eight, one example a device. All in float64, where what the transforms do to rounding is
far below what they could do to the mathematics.
"""

import inspect
import itertools
import pkgutil

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CALLS
from jax.sharding import AxisType, PartitionSpec

import diffusion_jax

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
# A solver's loops begin with constants, which shard_map is not to check.
SOLVED = ("ode.ode", "likelihood.ode_bits_per_dim")
# The calls of a module are one program, but for those that take long to compile.
QUICK = (name for name in CALLS if name not in SOLVED)
MODULES = itertools.groupby(QUICK, lambda name: name.partition(".")[0])
GROUPS = [*(list(names) for _, names in MODULES), *([name] for name in SOLVED)]
# Of each kind of function one runs on devices: there it is what it is for one example.
SPREAD = ["gaussian.q_sample", "gaussian.p_sample", "losses.simple", "samplers.sample"]
pytestmark = pytest.mark.usefixtures("x64")


def same(actual, expected):
    one, other = map(jax.tree.leaves_with_path, (actual, expected))
    for (path, a), (_, b) in zip(one, other, strict=True):
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=where)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def total(tree):
    """One number that everything in a result has a share in."""
    found = [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return sum((jnp.sin(leaf).sum() for leaf in found), jnp.zeros(()))


def test_every_public_function_is_called():
    there = pkgutil.iter_modules(diffusion_jax.__path__)
    flat = {m.name for m in there if not m.ispkg and m.name[0] != "_"}
    assert flat - {"errors"} <= set(diffusion_jax.__all__)
    modules = {name: getattr(diffusion_jax, name) for name in diffusion_jax.__all__}
    public = {
        f"{place}.{name}"
        for place, module in modules.items()
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__ and name[0] != "_"
    }
    others = {f"{place}.{n}" for place, names in calls.OTHERS.items() for n in names}
    assert {name.partition(" ")[0] for name in CALLS} == public - others


def alone(name):
    """The call of one example, without the first axis."""

    def one(a):
        wide = jax.tree.map(lambda leaf: leaf[None], a)
        return jax.tree.map(lambda leaf: leaf[0], CALLS[name](wide))

    return one


def with_gradient(name, a):
    """What it gives example by example, and the gradient of the total of that."""
    leaves, tree = jax.tree.flatten(a)
    free = [k for k, leaf in enumerate(leaves) if is_float(leaf)]

    def run(values):
        filled = list(leaves)
        for k, value in zip(free, values, strict=True):
            # Where there is no noise the log-SNR is infinite: not a number to vary.
            filled[k] = jnp.where(jnp.isfinite(leaves[k]), value, leaves[k])
        out = jax.vmap(alone(name))(jax.tree.unflatten(tree, filled))
        return total(out), out

    values = [jnp.where(jnp.isfinite(leaves[k]), leaves[k], 0.0) for k in free]
    if name == "ode.ode":  # the gradient of a solve is that of the other
        return run(values)[1], []
    (_, out), slopes = jax.value_and_grad(run, has_aux=True)(values)
    return out, slopes


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_all_ways_equal_eager_and_gradients_are_slopes(names):
    """Gradients are finite, and slopes. shard_map asks of each only what it checks."""
    a, others, traces = calls.inputs(), calls.inputs(seed=1), []
    expected = {name: CALLS[name](others) for name in names}
    assert all(len(leaf) == calls.B for leaf in jax.tree.leaves(expected))

    @jax.jit
    def compiled(a):
        traces.append(1)
        return {name: with_gradient(name, a) for name in names}

    found = compiled(a)
    same({name: out for name, (out, _) in compiled(others).items()}, expected)
    hold_slopes(compiled, a, {name: slopes for name, (_, slopes) in found.items()})
    assert len(traces) == 1, "another call traced again"
    for name in names:
        jax.eval_shape(over_devices(name), a)


def hold_slopes(compiled, a, slopes):
    """Along one direction, central differences are good to 1e-7 of the size."""
    rng, step = np.random.default_rng(0), 1e-6
    leaves, tree = jax.tree.flatten(a)
    way = [rng.normal(size=leaf.shape) if is_float(leaf) else None for leaf in leaves]

    def moved(h):
        there = [
            x if b is None else x + h * b for x, b in zip(leaves, way, strict=True)
        ]
        return jax.tree.unflatten(tree, there)

    ahead, behind = compiled(moved(step)), compiled(moved(-step))
    for name, found in slopes.items():
        assert all(np.all(np.isfinite(slope)) for slope in found), name
        pairs = list(zip(found, (b for b in way if b is not None), strict=bool(found)))
        slope = sum(np.vdot(a, b) for a, b in pairs)
        size = sum(np.vdot(abs(a), abs(b)) for a, b in pairs)
        rise = (total(ahead[name][0]) - total(behind[name][0])) / (2 * step)
        assert found or name == "ode.ode", name
        assert not found or abs(rise - slope) < 1e-6 * (1 + size), name


def over_devices(name):
    """One example a device."""
    spec = PartitionSpec("data")
    options = {"in_specs": spec, "out_specs": spec, "check_vma": name not in SOLVED}
    return jax.shard_map(CALLS[name], mesh=MESH, **options)


@pytest.mark.parametrize("name", SPREAD)
def test_examples_on_devices_of_their_own_equal_eager(name):
    a = calls.inputs()
    for ways in (jax.pmap(alone(name)), jax.jit(over_devices(name))):
        same(ways(a), CALLS[name](a))
