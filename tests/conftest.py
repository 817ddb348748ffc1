"""Strict JAX for every test: CPU, eight fake devices, no implicit rank promotion."""

import contextlib
import gc
import itertools
import os
import re
import signal
import threading
from pathlib import Path

from processes import QUICK_XLA

# These must be set before jax is imported, here and in every xdist worker.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + QUICK_XLA
)

import jax
import pytest
import small_run
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir

from diffusion_jax.lab.wiring import build, chains, learning

jax.jit(lambda: 0)()  # now the flags have been read
# What tests start compiles as it does for users.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(
    " --xla_cpu_use_fusion_emitters=false", ""
)

MAPS, TESTS = Path("/proc/self/maps"), itertools.count()
# Files that take longest begin first, and of these the ones that wait for processes:
# one that began last would have all others wait for it. The rest go as they stand.
LONGEST = (
    "test_hosts",
    "test_kill",
    "test_rules_moments",
    "test_family",
    "test_conditional",
    "test_latent",
    "test_judged_autoencoders",
    "test_distil",
    "test_transforms",
    "test_eval",
    "test_train",
    "test_notebook",
    "test_parity",
    "test_networks_live",
    "test_ablation",
    "test_edit",
    "test_sampling",
    "test_types",
    "test_bench",
    "test_resume",
    "test_unet_training",
    "test_autoencoder_runs",
    "test_exact",
    "test_playground_page",
    "test_scheduler_parity",
    "test_compiled",
    "test_stopping",
    "test_rules",
    "test_parallel",
)
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
# Who asked for an operation is no business of XLA: to write it down takes a while.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Small programs too: the other process and later files need most of them again.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_disable_most_optimizations", True)


def reused(make):
    """Makes contexts that serve ten programs each, as JAX 0.11 does by itself.

    To make one takes longer than to write down a small program. A program within
    another has one of its own, or its module would become a part of the other's.
    """
    local = threading.local()

    def context():
        if ir.Context.current is not None:
            return make()
        local.used = getattr(local, "used", -1) + 1
        if local.used % 10 == 0:
            local.kept = make()
        return local.kept

    return context


if jax.__version_info__ < (0, 11):
    mlir.make_ir_context = reused(mlir.make_ir_context)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}

    def place(item):
        # What is compiled otherwise drops the programs of those before.
        last = len(places) + bool(item.get_closest_marker("optimised"))
        return places.get(item.path.stem, last)

    items.sort(key=place)


def pytest_collection_finish():
    # A million objects of modules need not be looked through, nor ever so often.
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_configure(config):
    # In the background of a script it is ignored, here and in all that tests start.
    with contextlib.suppress(ValueError):  # a worker on another thread
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error:::diffusion_jax")
    optimised = "optimised: programs of this file are compiled with all optimisations"
    config.addinivalue_line("markers", optimised)


@pytest.fixture(autouse=True, scope="module")
def full_compilation(request):
    """Compiles files marked `optimised` as users do.

    All others are compiled with few optimisations: compiling takes most of the time.
    Two programs of the same numbers may then differ in the last bit, and these files
    compare such programs.
    """
    if not request.node.get_closest_marker("optimised"):
        yield
        return
    # Programs of a function are told apart by its arguments alone.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def shared_programs():
    """Runs of one configuration share their programs."""
    steps, draws = small_run.share_steps, small_run.share_draws
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "make_step", steps(learning.make_step))
        patch.setattr(chains, "make_draw", draws(chains.make_draw))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small trained run of the digits, of the file's own; `small_run.SMALL`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    return small_run.copied(shared / "trained", tmp_path_factory.mktemp("runs"))


@pytest.fixture
def small_network(monkeypatch):
    """Makes programs of `small_run.Small`."""
    monkeypatch.setattr(build, "make_network", small_run.make_small)


@pytest.fixture(autouse=True)
def no_pile_of_programs():
    """Drops what was compiled before it is too much: the disk still has it.

    Each program on CPU holds memory maps, of which Linux gives a process 65,530: beyond
    them it dies, and thousands of tests get there. So many are 4 GiB of memory. To
    count them takes milliseconds, and ten tests make a few thousand at most.
    """
    yield
    if next(TESTS) % 10 or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > 8_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """The test runs in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """The test runs twice, and bounds its errors by the precision it runs in."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def refuses():
    """A block must raise ValueError: what must hold, what was got, what to do."""

    @contextlib.contextmanager
    def context(got):
        with pytest.raises(ValueError) as caught:
            yield
        message = str(caught.value)
        assert re.search(r"\bmust\b.*; got .+\. .+[.?]$", message, re.S), message
        said = message.partition("; got ")[2]
        assert got in said, message
        if re.fullmatch(r"-?\d+(\.\d+)?", got):  # a number by itself, not a part of one
            alone = rf"(?<![\w.-]){re.escape(got)}(?!\w|\.\d)"
            assert re.search(alone, said.partition(". ")[0].rstrip(".")), message

    return context


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
