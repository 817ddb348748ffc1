"""One step by three strategies on eight fake devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.lab.schema import config
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import averages, parallel, state

TINY = config.Config(
    data=config.Data(source="digits", image_size=8, channels=1, flip=True),
    diffusion=config.Diffusion(num_steps=100),
    net=config.Net(
        channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0, groups=4
    ),
    optimizer=config.Optimizer(preset="modern", learning_rate=1e-3, warmup=0),
    train=config.Train(steps=20, batch_size=16),
    sample=config.Sample(steps=5, count=8),
)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    position = np.arange(16, dtype=np.int32)
    images = rng.integers(0, 256, (6, 16, 8, 8, 1), dtype=np.uint8)
    return [{"image": image, "position": position} for image in images]


def train(cfg, batches, strategy="mesh", devices=1, fsdp=1):
    """Losses, weights, averages and what the loss remembers."""
    mesh = parallel.make_mesh(devices, fsdp)
    cfg = config.replace(cfg, "train", parallel=strategy)
    step = learning.make_step(cfg, mesh)
    first = learning.init_state(cfg)
    first = jax.device_put(first, parallel.state_sharding(first, mesh))
    now = learning.as_trained(cfg, first, mesh)
    losses = []
    for batch in batches:
        now, metrics = step(now, batch)
        losses.append(float(metrics["loss"]))
    now = learning.as_stored(now, mesh)
    return losses, now.params, now.averages, now.memory


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# By name: fields of the diffusion, and for eight devices strategies with the number of
# them that share a copy. Of shard_map pmap is made; without it, all is left to the
# compiler.
AGREEING = {
    "importance": (
        {"loss": "vlb", "density": "importance", "num_steps": 3},
        {"shard_map": 1, "mesh": 4},
    ),
    "learned": (
        {"schedule": "learned", "loss": "vlb", "spread": "low_discrepancy"},
        {"shard_map": 1},
    ),
}


@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.usefixtures("small_network")
def test_steps_on_eight_devices_agree_with_those_of_one(name, batches):
    fields, spreads = AGREEING[name]
    cfg = config.replace(TINY, "diffusion", **fields)
    # Enough for every time to have been seen ten times, so that the memory is used.
    one = train(cfg, batches)
    for strategy, fsdp in spreads.items():
        assert_close(train(cfg, batches, strategy, 8, fsdp), one, 1e-5)
    if name == "importance":
        counts = one[-1].counts
        assert int(counts.sum()) == 6 * 16
        assert int(counts.min()) >= 10


@pytest.mark.usefixtures("small_network")
def test_official_clipping_is_the_same_by_pmap_and_by_parts_of_the_batch(batches):
    # One device cuts a batch by every eighth example, eight devices cut it into runs
    # of neighbours: ordered so that the parts are the same, both clip the same.
    cfg = config.replace(TINY, "optimizer", preset="official", clip_norm=1e-3)
    order = np.arange(16).reshape(2, 8).T.ravel()
    sorted_ = [{k: x[order] for k, x in batch.items()} for batch in batches[:3]]
    assert_close(train(cfg, sorted_, "pmap", 8), train(cfg, batches[:3]), 1e-5)


def quadratic(width=48):
    """A state large enough to be cut, its loss, and a batch: no network to compile."""
    params = {"w": jnp.ones([width, 3 * width]), "b": jnp.zeros(3 * width)}
    optimizer = optax.adam(1e-2)

    def loss(params, batch, key):
        return ((batch @ params["w"] + params["b"][None]) ** 2).mean()

    step = partial(
        state.make_step, optimizer=optimizer, averages=[averages.exponential(0.9)]
    )
    batch = np.random.default_rng(0).normal(size=(8, width)).astype(np.float32)
    return state.init(jax.random.key(0), params, optimizer), loss, step, batch


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 8), (6, 3)])
def test_each_device_holds_its_part_of_the_state_and_no_more(devices, fsdp):
    now, loss, make, batch = quadratic()
    mesh = parallel.make_mesh(devices, fsdp)
    rows = np.tile(batch, (2, 1))[: 2 * devices]
    run = parallel.data_parallel(make(parallel.gathered(loss, mesh)), mesh)
    placed = parallel.state_sharding(now, mesh)
    now = jax.device_put(now, placed)
    for _ in range(2):  # the second takes what the first gave
        now, _ = run(now, rows)
        large = [x for x in jax.tree.leaves(now) if x.size >= parallel.SMALL]
        assert len(large) == 4  # w, its two moments and its average
        for x in large:
            held = {part.device: part.data.nbytes for part in x.addressable_shards}
            assert len(held) == devices
            assert set(held.values()) == {x.nbytes // fsdp}


SPREADS = (1, 1, "mesh"), (8, 4, "mesh"), (8, 1, "pmap"), (8, 1, "shard_map")


def test_gradients_are_the_same_by_every_strategy_and_for_parts_of_the_state():
    ends = []
    for devices, fsdp, strategy in SPREADS:
        start, loss, make, batch = quadratic()  # a step uses its state up
        mesh = parallel.make_mesh(devices, fsdp)
        axis = None if strategy == "mesh" else parallel.AXIS
        options = {"clip_norm": 0.1, "accumulate": 2, "axis_name": axis}
        step = make(parallel.gathered(loss, mesh), **options)
        run = parallel.data_parallel(step, mesh, strategy=strategy)
        now = jax.device_put(start, parallel.state_sharding(start, mesh))
        for _ in range(3):
            now, metrics = run(now, np.tile(batch, (2, 1)))
        ends.append(jax.device_get((now.params, now.averages, metrics)))
    for other in ends[1:]:
        assert_close(other, ends[0], 1e-6)


def test_only_what_is_large_and_fits_is_cut():
    mesh, plain = parallel.make_mesh(8, 4), parallel.make_mesh(8)
    spec = jax.sharding.PartitionSpec
    for shape, expected in {
        (3, 3, 64, 128): spec(None, None, None, "fsdp"),
        (3, 3, 128, 64): spec(None, None, "fsdp"),
        (1000, 6, 2): spec("fsdp"),
        (1023, 5): spec(),
        (512,): spec(),
        (): spec(),
    }.items():
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert parallel.state_sharding(leaf, mesh).spec == expected, shape
        assert parallel.state_sharding(leaf, plain) == parallel.replicated(plain)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4096))
    assert parallel.state_sharding(keys, mesh).spec == spec()


def test_neighbours_share_a_copy_which_can_be_put_together():
    mesh, w = parallel.make_mesh(8, 4), np.arange(4096.0, dtype=np.float32)
    assert mesh.axis_names == (parallel.AXIS, parallel.FSDP)
    assert [[d.id for d in row] for row in mesh.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batch = parallel.shard(np.arange(16.0), mesh)
    rows = [shard.data.tolist() for shard in batch.addressable_shards]
    assert rows == [[2.0 * i, 2.0 * i + 1] for i in range(8)]
    cut = jax.device_put(w, parallel.state_sharding(w, mesh))
    whole = parallel.whole({"w": cut, "n": 3})
    assert not cut.is_fully_replicated
    assert whole["w"].is_fully_replicated
    np.testing.assert_array_equal(whole["w"], w)


@pytest.mark.parametrize(
    ("cores", "batch_size", "devices"),
    [(2, 64, 2), (2, 63, 1), (8, 64, 2), (8, 128, 4), (6, 192, 6), (4, 8, 1)],
)
def test_cpu_cores_share_a_batch_in_parts_that_pay(
    cores, batch_size, devices, monkeypatch
):
    asked = {}
    monkeypatch.setattr(parallel, "cores", lambda: list(range(cores)))
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    parallel.split_cpu(batch_size)
    assert asked == {}  # XLA_FLAGS of these tests says eight
    monkeypatch.setenv("XLA_FLAGS", "")
    parallel.split_cpu(batch_size)
    assert asked == {"jax_num_cpu_devices": devices}
    parallel.split_cpu()
    assert asked == {"jax_num_cpu_devices": cores}


def cut_in(mesh, strategy):
    return parallel.data_parallel(None, parallel.make_mesh(*mesh), strategy=strategy)


REFUSED = [
    (lambda: parallel.make_mesh(9), "devices must be in 1..8.*; got 9"),
    (lambda: parallel.make_mesh(6, 4), "devices, 6; got 4. Give one of 1, 2, 3, 6"),
    (lambda: parallel.make_mesh(6, 0), "fsdp must divide.*; got 0"),
    (lambda: cut_in((8, 2), "pmap"), "must be 'mesh' where.*; got 'pmap' with fsdp 2"),
    (lambda: cut_in((1,), "pap"), "of mesh, pmap, shard_map; got 'pap'. .*'pmap'"),
    (lambda: parallel.check_batch_size(10, 8), "devices, 8; got 10.*8 and 16"),
]


def test_bad_input_is_named():
    for call, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            call()
