"""What a notebook uses: the same numbers as the commands, and words for mistakes."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from small_run import SMALL

from diffusion_jax import gaussian, lab
from diffusion_jax.data import datasets
from diffusion_jax.lab.process import stopping
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import arguments, loop
from diffusion_jax.lab.wiring import build
from experiments import convert, eval_nll, sample
from experiments.configs import EXPERIMENTS

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def digits(trained):
    return lab.load(trained.folder)


def test_samples_are_those_of_the_command(digits, trained, tmp_path):
    out = tmp_path / "a.npz"
    flags = ["--count", "10", "--seed", "3", "--format", "npz", "--out", str(out)]
    how = ["--sampler", "unipc", "--steps", "3"]
    assert sample.main([str(trained.folder), *flags, *how]) == 0
    with np.load(out) as file:
        expected = file["images"]
    found = digits.sample(KEY, 10, sampler="unipc", steps=3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    few = digits.sample(KEY, 10, sampler="unipc", steps=3, batch_size=4)
    assert np.abs(few.astype(int) - expected).max() <= 1


def test_the_bound_is_that_of_the_command(digits, trained):
    assert eval_nll.main([str(trained.folder), "--max-images", "6"]) == 0
    written = json.loads((trained.folder / "eval/nll_train.json").read_text())
    images = datasets.load("digits").images
    chosen = np.sort(np.random.default_rng(0).choice(len(images), 6, replace=False))
    bits = digits.bits_per_dim(images[chosen])
    assert bits.shape == (6,)
    assert bits.mean() == pytest.approx(written["bits_per_dim"], rel=1e-6)
    # Images without an axis of channels are the same.
    np.testing.assert_array_equal(digits.bits_per_dim(images[chosen, ..., 0]), bits)


def test_the_network_is_asked_in_steps(digits):
    clean = jnp.linspace(-3, 3, 2 * 64).reshape(2, 8, 8, 1)  # so that the clip is seen
    noise = gaussian.normal(KEY, clean.shape)
    for t in (1, 20, np.array([3, 17])):
        level = digits.schedule(t)
        x_t = gaussian.q_sample(clean, noise, level)
        pred = digits.denoise(x_t, t)
        net, times = build.make_network(digits.config), np.broadcast_to(t, 2)
        output = net.apply({"params": digits.params["net"]}, x_t, times - 1)
        x0 = gaussian.predict("v", output, x_t, level).x0
        np.testing.assert_allclose(pred.x0, jnp.clip(x0, -1, 1), atol=1e-4)
        level = level.like(x_t)
        together = level.alpha * pred.x0 + level.sigma * pred.eps
        np.testing.assert_allclose(together, x_t, atol=1e-5)
    slope = jax.jit(jax.grad(lambda x: digits.denoise(x, 9).eps.sum()))(clean)
    assert np.abs(slope).max() > 0
    with pytest.raises(ValueError, match=r"t must be in 0..20"):
        digits.denoise(clean, 21)


def test_a_label_is_told_and_none_is_the_last_row(digits, refuses):
    config = config_of("--net.classes", "3", "--net.label-dropout", "0.1")
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # fresh ones are deaf: the last convolution is near zero
        lambda a: a + 0.1 * rng.normal(size=a.shape).astype(a.dtype),
        build.init_params(config, KEY),
    )
    loaded = dataclasses.replace(digits, config=config, params=params)
    x_t = jax.random.normal(KEY, (2, 8, 8, 1))
    net = build.make_network(config)
    for label, rows in ((1, [1, 1]), ([2, 0], [2, 0]), (None, [3, 3])):
        given = {"params": params["net"]}, x_t, jnp.array([8, 8]), jnp.array(rows)
        x0 = gaussian.predict("v", net.apply(*given), x_t, loaded.schedule(9)).x0
        found = loaded.denoise(x_t, 9, label=label).x0
        np.testing.assert_allclose(found, jnp.clip(x0, -1, 1), atol=1e-4)
    never = replace(config, "net", label_dropout=0.0)
    with refuses("none, which this network was never told"):
        dataclasses.replace(loaded, config=never).denoise(x_t, 9)


def test_it_says_what_it_is(digits):
    said = repr(digits)
    assert said.startswith("<digits: images of 8x8x1, ")
    assert said.endswith("; averaged weights of step 12>")


def test_any_kind_of_weights_and_network_is_loaded(digits, trained, tmp_path):
    last = lab.load(trained.folder, raw=True, step=12)
    assert (last.kind, last.step) == ("last", 12)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.shape == b.shape, last.params, digits.params)
    )
    for out in (tmp_path / "net.safetensors", tmp_path / "folder"):
        assert convert.main([str(trained.folder), str(out)]) == 0
        found = lab.load(out)
        np.testing.assert_array_equal(found.sample(KEY, 4), digits.sample(KEY, 4))


def config_of(*flags: str) -> lab.Config:
    """The small run's configuration, as a notebook would write it."""
    return arguments.parse(["digits", *SMALL, *flags], EXPERIMENTS, prog="train")


def test_training_on_given_images_is_that_of_the_command(digits, tmp_path, capsys):
    known = datasets.load("digits")
    config = dataclasses.replace(config_of(), output=str(tmp_path), name="given images")
    half = lab.train(replace(config, "train", stop_at=7), images=known.images)
    assert half.step == 7
    found = lab.train(config, images=known.images[..., 0])
    assert found.step == 12
    assert "going on from step 7 of 12" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, found.params, digits.params)
    # The file says which images they were, and others are refused.
    with pytest.raises(ValueError, match=r"data\.source.*force=True"):
        lab.train(config, images=known.images[::-1])
    with pytest.raises(ValueError, match=r"given in memory.*--data npz:FILE"):
        eval_nll.main([str(tmp_path / "given images")])


X = np.zeros((4, 8, 8, 1), np.uint8)
MISTAKES = {
    "got 'samplr'": lambda d: d.sample(KEY, 2, samplr="ddim"),
    "got 'ddimm'": lambda d: d.sample(KEY, 2, sampler="ddimm"),
    "got '5'": lambda d: d.sample(KEY, 2, steps="5"),
    "got 0.5": lambda d: d.sample(KEY, 2, sampler="heun", eta=0.5),
    "got 3": lambda d: d.sample(KEY, 2, label=3),
    "got 7": lambda d: d.sample(7, 2),
    "got 0": lambda d: d.sample(KEY, 0),
    "got 2.5": lambda d: d.sample(KEY, 2.5),
    "got [N, 4, 8, 1]": lambda d: d.denoise(X[:, :4] / 255.0, 5),
    "got 1": lambda d: d.denoise(X / 255.0, 5, label=1),
    "got float64": lambda d: d.bits_per_dim(X / 255.0),
    "got [N, 8, 8, 3]": lambda d: d.bits_per_dim(np.repeat(X, 3, -1)),
    "got 2": lambda d: lab.train(config_of(), images=np.repeat(X, 2, -1)),
    "got int64 of shape (3,)": lambda d: lab.train(
        config_of(), images=X, labels=np.zeros(3, int)
    ),
    "got labels alone": lambda d: lab.train(config_of(), labels=[1]),
    "got none": lambda d: lab.train(config_of("--net.classes", "3"), images=X),
    "got 0.": lambda d: lab.train(replace(config_of(), "train", steps=0)),
    "got 'nowhere'": lambda d: lab.load("nowhere"),
}


@pytest.mark.parametrize("got", MISTAKES)
def test_mistakes_are_named_as_python_writes_them(got, digits, refuses, monkeypatch):
    monkeypatch.chdir(digits.run.folder)
    before = sorted(digits.run.folder.rglob("*"))
    with refuses(got.removeprefix("got ").rstrip(".")):
        MISTAKES[got](digits)
    assert sorted(digits.run.folder.rglob("*")) == before


def test_hints_name_no_flags(digits):
    for call in ("got '5'", "got 0.5", "got 3", "got 0."):
        with pytest.raises(ValueError) as error:
            MISTAKES[call](digits)
        assert "--" not in str(error.value)


def test_an_interrupt_is_noted_once_and_the_process_lives_on():
    before = signal.getsignal(signal.SIGINT)
    with stopping.interrupts() as found:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        found.note()
        signal.raise_signal(signal.SIGINT)
        assert found.numbers == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    numbers = []

    def elsewhere():
        with stopping.interrupts() as found:
            numbers.append(found.numbers)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert numbers == [[]]


def test_an_interrupted_training_returns_what_it_has(tmp_path, monkeypatch):
    has_grid = loop.has_grid

    def interrupting(config, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return has_grid(config, step)

    monkeypatch.setattr(loop, "has_grid", interrupting)
    config = dataclasses.replace(config_of(), output=str(tmp_path))
    found = lab.train(config, images=datasets.load("digits").images)
    assert 5 <= found.step < 12


def test_the_face_is_small_and_loads_nothing():
    code = (
        "import sys; from diffusion_jax import lab; assert 'jax' not in sys.modules; "
        "print(*dir(lab)); lab.load; assert 'jax' in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    names = "Config Data Diffusion Net Optimizer Sample Train Trained load train"
    assert found.stdout.split() == names.split()


def test_the_lines_of_the_readme_run(trained, tmp_path, monkeypatch):
    text = (processes.ROOT / "README.md").read_text()
    [lines] = [b for b in text.split("```")[1::2] if "lab.load" in b]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained.folder)
    monkeypatch.chdir(tmp_path)
    scope = {}
    # The network of the tests has 20 steps, and trains for 12.
    exec(lines.removeprefix("python").replace(", 300)", ", 10)"), scope)
    assert scope["images"].shape == (16, 8, 8, 1)
    assert scope["seen"].shape == (16, 8, 8, 1)
    assert scope["bits"].shape == (16,)
    assert scope["own"].step == 12


def test_the_notebook_of_the_docs_runs(trained, tmp_path, monkeypatch):
    for name, value in processes.QUICK.items():
        monkeypatch.setenv(name, value)
    nbclient, nbformat = (
        pytest.importorskip("nbclient"),
        pytest.importorskip("nbformat"),
    )
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "digits").symlink_to(trained.folder)
    book = nbformat.read(processes.ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(
        book, timeout=240, resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [
        output
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) >= 3
