"""Batches from the device, from grain and from the host: the same, to the bit."""

import re
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import TINY

from diffusion_jax import errors
from diffusion_jax.data import datasets
from diffusion_jax.data.image_files import LazyImages
from diffusion_jax.lab.schema import config
from diffusion_jax.lab.training import beginning
from diffusion_jax.lab.wiring import learning
from diffusion_jax.training import compilation, feed, parallel

# Bits are compared: the programs are those of users.
pytestmark = pytest.mark.optimised

SOURCES = ["host", "device", "grain"]


@pytest.fixture(autouse=True)
def installed(request):
    if "grain" in request.node.name:
        pytest.importorskip("grain")


def dataset(count=37):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return datasets.Dataset(images, np.arange(count, dtype=np.int32) % 10, "random")


KNOWN = dataset()


def lazily(read=lambda i: KNOWN.images[i]):
    return KNOWN._replace(images=LazyImages(read, KNOWN.images.shape))


def make(source, devices, known=KNOWN, **options):
    mesh = parallel.make_mesh(devices)
    options = {"seed": 3, "batch_size": 8, "labels": True, **options}
    return feed.make(known, mesh, source=source, **options), mesh


def compiled(step, fed, mesh, strategy="mesh"):
    step = step if fed.stored is None else feed.gathering(step)
    return parallel.data_parallel(step, mesh, strategy=strategy, stored=fed.stored)


@pytest.mark.usefixtures("small_network")
def test_states_and_metrics_with_grain_are_bitwise_the_same_from_every_source():
    def four_steps(source):
        fed, mesh = make(source, 8, labels=False)
        assert fed.source == source
        step = learning.make_step(TINY, mesh, fed.stored)
        now, seen = learning.as_trained(TINY, learning.init_state(TINY), mesh), []
        for batch in fed.batches(1, 5):
            now, metrics = step(now, batch)
            seen.append(metrics)
        now = now._replace(key=jax.random.key_data(now.key))
        return [np.asarray(x).tobytes() for x in jax.tree.leaves((now, seen))]

    first, *others = map(four_steps, SOURCES)
    assert all(other == first for other in others)


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
@pytest.mark.parametrize("source", SOURCES)
def test_step_k_sees_the_batch_of_k_by_every_strategy(source, strategy):
    # Of images that are read as needed too, with labels and without.
    known, labels = KNOWN if source == "device" else lazily(), strategy != "pmap"
    fed, mesh = make(source, 8, known, strategy=strategy, labels=labels)

    def look(state, batch):
        traced.append(batch)
        if strategy != "mesh":
            batch = jax.lax.all_gather(batch, parallel.AXIS, tiled=True)
        return state, batch

    step, traced = compiled(look, fed, mesh, strategy), []
    state = jax.device_put(jnp.zeros(3), parallel.replicated(mesh))
    seen = [jax.device_get(step(state + 0, b)[1]) for b in fed.batches(3, 9)]
    assert (len(seen), len(traced)) == (6, 1)
    assert list(fed.batches(7, 7)) == []
    for number, batch in enumerate(seen, 3):
        index = datasets.batch_indices(3, number, len(KNOWN.images), 8)
        np.testing.assert_array_equal(batch["image"], KNOWN.images[index])
        if labels:
            np.testing.assert_array_equal(batch.pop("label"), KNOWN.labels[index])
        assert set(batch) == {"image", "position"}
        np.testing.assert_array_equal(batch["position"], np.arange(8))
        assert batch["image"].dtype == np.uint8


def test_images_are_an_argument_of_the_program_and_not_part_of_it():
    fed, mesh = make("device", 8, dataset(5003), labels=False)
    step = compiled(lambda state, batch: (state, batch["image"].sum()), fed, mesh)
    indices = step.put(next(fed.batches(0, 1)))
    lowered = step.program.lower(jnp.zeros(()), indices, *step.rest)
    assert re.search(r"%arg\d+: tensor<5003x8x8x1xui8>", lowered.as_text())
    program = lowered.compile().as_text()
    # Each device takes its own from its own copy.
    assert "u8[1,8,8,1]" in program
    assert "all-gather" not in program
    assert len(program) < 5003 * 64


def test_auto_is_the_device_then_grain_then_the_host(monkeypatch):
    def found(known=KNOWN):
        fed, _ = make("auto", 1, known)
        return fed.source, feed.describe(fed)

    kind, words = found()
    assert (kind, words[:30]) == ("device", "images stay on the device, 0.0")
    lazy = found(lazily())
    monkeypatch.setattr(feed, "LIMIT", KNOWN.images.nbytes - 1)
    assert lazy == found() == ("grain", "prepared in the background by grain")
    monkeypatch.setattr(feed, "find_spec", lambda name: None)
    assert found() == ("host", "from the host, a batch before each step")


def test_what_cannot_be_had_is_named(monkeypatch, refuses):
    with refuses("images that are read as needed"):
        make("device", 8, lazily())
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 800})
    assert feed.size_limit(SimpleNamespace(local_devices=(device,))) == 800 / 8
    # All eight copies are in the memory of the host.
    monkeypatch.setattr(feed, "LIMIT", 8 * KNOWN.images.nbytes - 8)
    with refuses("0.00226 MiB"):
        make("device", 8)
    monkeypatch.setitem(sys.modules, "grain", None)
    chosen = config.replace(config.Config(), "train", input="grain")
    said = r"(?s)grain is missing.*--train\.input"
    with pytest.raises(errors.ConfigError, match=said):
        beginning.feed_of(chosen, KNOWN, parallel.make_mesh(8))


def test_errors_in_the_background_of_grain_come_out_as_they_are():
    def broken(i):
        raise errors.DataError(f"every image must be readable; got {i}. Repair it.")

    fed, _ = make("grain", 1, lazily(broken))
    with pytest.raises(errors.DataError, match="every image must be readable; got"):
        next(fed.batches(0, 100))


def test_closing_ends_the_threads_of_grain_at_once():
    read = []

    def slow(i):
        read.append(i)
        time.sleep(0.01)
        return KNOWN.images[i]

    batches = make("grain", 1, lazily(slow))[0].batches(0, 10_000)
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 1
    while any("grain" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() - begun < 10
        time.sleep(0.01)
    # The batch in use, the one on its way, those that wait and those in the making.
    assert len(read) <= 8 * (2 + feed.WAITING + feed.THREADS)


def test_programs_are_counted_and_those_that_were_kept_apart():
    # Never the same number, which float32 has of the whole time for two minutes.
    function = jax.jit(lambda x: x * (time.time() % 1))
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
