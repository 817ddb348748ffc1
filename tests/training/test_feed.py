"""Batches from the device, from grain and from the host: the same, to the bit."""

import re
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import errors
from diffusion_jax.data import datasets
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.training import beginning
from diffusion_jax.training import averages, compilation, feed, parallel, state

# Bits are compared: the programs are those of users.
pytestmark = pytest.mark.optimised

SOURCES = ["host", "device", "grain"]


@pytest.fixture(autouse=True)
def installed(request):
    source = getattr(request.node, "callspec", None)
    if source and source.params.get("source") == "grain":
        pytest.importorskip("grain")


def dataset(count=37):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return datasets.Dataset(images, np.arange(count, dtype=np.int32) % 10, "random")


def lazily(known):
    images = LazyImages(lambda i: known.images[i], known.images.shape)
    return known._replace(images=images)


def make(source, mesh, known=None, **options):
    options = {"seed": 3, "batch_size": 8, "labels": True, **options}
    return feed.make(known or dataset(), mesh, source=source, **options)


def convolution(params, batch, key):
    """The loss of the smallest network that has a convolution, a norm and labels."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["position"])
    x = batch["image"].astype(jnp.float32) / 127.5 - 1
    flip = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
    x = jnp.where(flip, x[:, :, ::-1], x)
    noisy = 0.8 * x + 0.6 * jax.vmap(lambda k: jax.random.normal(k, (8, 8, 1)))(keys)
    h = jax.lax.conv_general_dilated(
        noisy, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = h + params["label"][batch["label"]][:, None, None]
    h = jax.nn.silu(h * jax.lax.rsqrt((h**2).mean((1, 2), keepdims=True) + 1e-6))
    return ((h.mean(-1, keepdims=True) - x) ** 2).mean()


def steps(source, devices):
    """The state and all metrics of four training steps, as bytes."""
    mesh = parallel.make_mesh(devices)
    fed = make(source, mesh)
    assert fed.source == source
    optimizer, means = optax.adam(1e-2), [averages.exponential(0.9)]
    step = state.make_step(convolution, optimizer, averages=means)
    if fed.stored is not None:
        step = feed.gathering(step)
    step = parallel.data_parallel(step, mesh, stored=fed.stored)
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(3, 3, 1, 8)), "label": rng.normal(size=(10, 8))}
    params = jax.tree.map(jnp.float32, params)
    now = state.init(jax.random.key(0), params, optimizer)
    now, seen = jax.device_put(now, parallel.replicated(mesh)), []
    for batch in fed.batches(1, 5):
        now, metrics = step(now, batch)
        seen.append(metrics)
    now = now._replace(key=jax.random.key_data(now.key))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((now, seen))]


def test_states_and_metrics_are_bitwise_the_same_from_every_source():
    pytest.importorskip("grain")
    first, *others = (steps(source, 8) for source in SOURCES)
    assert all(other == first for other in others)


def seen_by(source, strategy, devices, known):
    """What a step that only looks at its batch has seen, in the order of steps."""
    mesh = parallel.make_mesh(devices)
    fed = make(source, mesh, known, strategy=strategy)

    def look(state, batch):
        if strategy != "mesh":
            batch = jax.lax.all_gather(batch, parallel.AXIS, tiled=True)
        return state, batch

    look = look if fed.stored is None else feed.gathering(look)
    step = parallel.data_parallel(look, mesh, strategy=strategy, stored=fed.stored)
    state = jax.device_put(jnp.zeros(3), parallel.replicated(mesh))
    return [jax.device_get(step(state + 0, b)[1]) for b in fed.batches(3, 9)]


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
@pytest.mark.parametrize("source", SOURCES)
def test_step_k_sees_the_batch_of_k_by_every_strategy(source, strategy):
    known = dataset()
    # Those that are read as needed too.
    seen = seen_by(source, strategy, 8, known if source == "device" else lazily(known))
    assert len(seen) == 6
    for step, batch in enumerate(seen, 3):
        index = datasets.batch_indices(3, step, len(known.images), 8)
        np.testing.assert_array_equal(batch["image"], known.images[index])
        np.testing.assert_array_equal(batch["label"], known.labels[index])
        np.testing.assert_array_equal(batch["position"], np.arange(8))
        assert batch["image"].dtype == np.uint8


def test_images_are_an_argument_of_the_program_and_not_part_of_it():
    mesh = parallel.make_mesh(8)
    fed = make("device", mesh, dataset(5003), labels=False)
    step = feed.gathering(lambda state, batch: (state, batch["image"].sum()))
    lowered = jax.jit(
        step,
        in_shardings=(None, parallel.sharded(mesh), parallel.replicated(mesh)),
    ).lower(0.0, next(fed.batches(0, 1)), fed.stored)
    assert re.search(r"%arg\d+: tensor<5003x8x8x1xui8>", lowered.as_text())
    program = lowered.compile().as_text()
    # Each device takes its own from its own copy.
    assert "u8[1,8,8,1]" in program
    assert "all-gather" not in program
    assert len(program) < 5003 * 64


@pytest.mark.parametrize("source", SOURCES)
def test_without_labels_there_are_none(source):
    fed = make(source, parallel.make_mesh(1), labels=False)
    assert "label" not in next(fed.batches(0, 1)) | (fed.stored or {})
    assert list(fed.batches(7, 7)) == []


def test_auto_is_the_device_then_grain_then_the_host(monkeypatch):
    known, mesh = dataset(), parallel.make_mesh(1)
    fed = make("auto", mesh)
    assert fed.source == "device"
    assert feed.describe(fed).startswith("images stay on the device")
    kinds = {found(make("auto", mesh, lazily(known)))}
    monkeypatch.setattr(feed, "LIMIT", known.images.nbytes - 1)
    kinds.add(found(make("auto", mesh)))
    assert kinds == {("grain", "prepared in the background by grain")}
    monkeypatch.setattr(feed, "find_spec", lambda name: None)
    host = ("host", "from the host, a batch before each step")
    assert found(make("auto", mesh)) == host


def found(fed):
    return fed.source, feed.describe(fed)


def test_what_cannot_be_had_is_named(monkeypatch, refuses):
    known, mesh = dataset(), parallel.make_mesh(8)
    with refuses("images that are read as needed"):
        make("device", mesh, lazily(known))
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 800})
    assert feed.size_limit(SimpleNamespace(local_devices=(device,))) == 800 / 8
    # All eight copies are in the memory of the host.
    monkeypatch.setattr(feed, "LIMIT", 8 * known.images.nbytes - 8)
    with refuses("0.00226 MiB"):
        make("device", mesh)
    monkeypatch.setitem(sys.modules, "grain", None)
    chosen = config.replace(config.Config(), "train", input="grain")
    with pytest.raises(
        errors.ConfigError, match=r"(?s)grain is missing.*--train\.input"
    ):
        beginning.feed_of(chosen, known, mesh)


def test_errors_in_the_background_come_out_as_they_are():
    pytest.importorskip("grain")

    def broken(i):
        raise errors.DataError(f"every image must be readable; got {i}. Repair it.")

    known = dataset()
    images = LazyImages(broken, known.images.shape)
    fed = make("grain", parallel.make_mesh(1), known._replace(images=images))
    with pytest.raises(errors.DataError, match="every image must be readable; got"):
        next(fed.batches(0, 100))


def test_closing_ends_the_threads_at_once():
    pytest.importorskip("grain")
    known, read = dataset(), []

    def slow(i):
        read.append(i)
        time.sleep(0.01)
        return known.images[i]

    images = LazyImages(slow, known.images.shape)
    fed = make("grain", parallel.make_mesh(1), known._replace(images=images))
    batches = fed.batches(0, 10_000)
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 1
    deadline = time.monotonic() + 10
    while any("grain" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The batch in use, the one on its way, those that wait and those in the making.
    assert len(read) <= 8 * (2 + feed.WAITING + feed.THREADS)


def test_programs_are_counted_and_those_that_were_kept_apart():
    function = jax.jit(lambda x: x * time.time())
    x, before = np.ones(3, np.float32), compilation.count()
    assert compilation.since(before) == ""
    function(x)
    function(x)
    assert compilation.since(before) == "1 program compiled, 0 from the cache"
    # The program of conftest's options is kept, however soon it was made.
    function = jax.jit(lambda x: x * 0.125)
    function(x)
    jax.clear_caches()
    before = compilation.count()
    function(x)
    assert compilation.since(before) == "0 programs compiled, 1 from the cache"
