"""Compares training objectives: `python -m experiments.ablation [digits]`.

Trains a network with each objective of the paper's Table 2 and of later papers, with
the same network, data, optimizer and number of updates, and measures each: the bound,
L_simple and the distance of its samples from the data. Writes a table, a plot and a
JSON file. The same command again goes on where it stopped (resume).
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from diffusion_jax import continuous, errors, gaussian, schedule
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError, DivergedError, counted
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.measure import bound, extractors, reference
from diffusion_jax.lab.process import entry, progress
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema.checks import validate
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config, changed, replace
from diffusion_jax.lab.schema.facts import Count, Seed, at_least
from diffusion_jax.lab.trained import opening
from diffusion_jax.lab.training import loop
from diffusion_jax.lab.wiring import build, chains
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.training import parallel
from experiments.configs import EXPERIMENTS
from experiments.configs.digits_family import family

DRAWS = 16
"""Times at which L_simple is measured, of each image."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and with how much work."""

    experiment: Annotated[
        Literal["digits", "fashion_mnist", "cifar10"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="EXPERIMENT"),
    ] = "digits"
    """Whose data, network and optimiser all rows have."""
    rows: tuple[str, ...] = ()
    """Which objectives, such as table2_eps_simple; all when not given."""
    steps: Count = 1500
    """Updates of each."""
    count: Count = 500
    """Samples of each: few make every distance larger."""
    bound_images: Annotated[int, at_least(2)] = 128
    """Training images for the bound, of T network evaluations each; one has no
    standard error."""
    seed: Seed = 0
    """Of training, samples and the choice of images."""
    workers: Count | None = None
    """Rows at a time: the cores there are on CPU, each row on its own, else 1. On a GPU
    several share its memory: set XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    path: str | None = None
    """Where the data are, when they are not in the usual place."""
    batch_size: Count | None = None
    """Images an update; the experiment's when not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the activations; the experiment's when not given."""
    output: str = "runs"
    """Folder of all runs: this goes to <output>/ablation_<experiment>."""


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes table, plot and numbers; returns the exit code."""
    options = entry.parse(Options, argv, "ablation", __doc__)
    pictures.check_plots()
    configs, begun = plan(options), time.monotonic()
    folder = Path(options.output) / f"ablation_{options.experiment}"
    folder.mkdir(parents=True, exist_ok=True)
    name = ruler(next(iter(configs.values())), options).name
    widths = (
        f"  {{:<{max(map(len, configs)) + 2}}}{{:>18}}{{:>10}}{{:>{len(name) + 2}}}"
    )
    print(
        f"{folder}: {len(configs)} rows of {options.steps:,} updates and "
        f"{options.count:,} samples; meanwhile each tells {folder}/ROW/log.txt"
    )
    head = widths.format("", "bound (bits/dim)", "L_simple", name)
    print(head)
    found: dict[str, dict[str, Any]] = {}
    said = f"training {counted(len(configs), 'row')}"
    with progress.clock(said, total=len(configs), unit="rows") as bar:
        for row, result in measured(configs, options):
            found[row] = result
            bar.write(line(widths, row, result, name))
            bar.update()
    budget = ("experiment", "steps", "count", "bound_images", "seed")
    about = {
        **{field: getattr(options, field) for field in budget},
        "distance": name,
        "device": jax.devices()[0].device_kind,
        "versions": runs.versions(),
    }
    rows = merged(folder / "ablation.json", about, found)
    table = folder / "ablation.txt"
    lines = [line(widths, row, result, name) for row, result in rows.items()]
    table.write_text("\n".join([head, *lines]) + "\n")
    runs.write_json(folder / "ablation.json", {**about, "rows": rows})
    minutes, left = divmod(round(time.monotonic() - begun), 60)
    print(f"done in {minutes} min {left} s")
    print(f"written: {table} and {folder / 'ablation.json'}")
    print(
        f"plot: {pictures.save(picture(rows, name, options), folder / 'ablation.png')}"
    )
    return 0


def merged(
    path: Path, about: dict[str, Any], found: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns these rows and those of an earlier table of the same budget, in order."""
    rows = runs.recalled(path, about, lambda rows: {**rows, **found}) or found
    return {name: rows[name] for name in rows_of(about["experiment"]) if name in rows}


def rows_of(experiment: str) -> dict[str, Config]:
    """Returns the whole configurations of all rows, by their names."""
    base = EXPERIMENTS[experiment].config
    every = family(base).items()
    return {name.removeprefix(f"{base.name}_"): config for name, config in every}


def plan(options: Options) -> dict[str, Config]:
    """Returns the configuration of each row, by its name.

    Raises:
      ValueError: an unknown row.
      ConfigError: values that do not fit.
    """
    made = rows_of(options.experiment)
    for row in options.rows:
        if row not in made:
            errors.raise_unknown("each of rows", row, tuple(made))
    chosen = {row: made[row] for row in options.rows or made}
    return {row: _budget(row, config, options) for row, config in chosen.items()}


def _budget(row: str, config: Config, options: Options) -> Config:
    """Returns the configuration of a row with the budget of all rows."""
    optimizer, steps = config.optimizer, options.steps
    output = str(Path(options.output) / f"ablation_{options.experiment}")
    config = dataclasses.replace(config, name=row, output=output)
    changes: dict[str, dict[str, Any]] = {
        "data": {"path": options.path},
        "net": {"dtype": options.dtype or config.net.dtype},
        "optimizer": {
            "warmup": min(optimizer.warmup, steps // 8),
            "ema_snapshots": steps // 16 if optimizer.ema_snapshots else 0,
        },
        "train": {
            "steps": steps,
            "seed": options.seed,
            "batch_size": options.batch_size or config.train.batch_size,
            "log_every": max(1, steps // 50),
            "checkpoint_every": steps,
        },
        "sample": {"every": steps, "count": 64},
    }
    for section, fields in changes.items():
        config = replace(config, section, **fields)
    validate(config)
    return config


def ruler(config: Config, options: Options) -> reference.Ruler:
    """Returns what the samples of a row are measured with, the same for all rows."""
    dataset = build.load_data(config)
    extractor = extractors.choose("classifier", config, dataset)
    return reference.ruler(config, dataset.images, extractor, options.count)


def measured(
    configs: dict[str, Config], options: Options
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row's result as it is ready."""
    on_cpu = jax.default_backend() == "cpu"
    cores = parallel.cores()
    workers = options.workers or (len(cores) if on_cpu else 1)
    if workers == 1:
        for row, config in configs.items():
            yield row, measure(config, options)
        return
    spawn = multiprocessing.get_context("spawn")
    free = spawn.Queue()
    for i in range(workers):
        free.put({cores[i % len(cores)]} if on_cpu else set(cores))
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_take_cores, initargs=(free,)
    ) as pool:
        waiting = {
            pool.submit(measure, config, options): row
            for row, config in configs.items()
        }
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_cores(free: Any) -> None:
    """Ties this process to its cores, before XLA counts them."""
    parallel.take_cores(free.get())
    entry.quiet()


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Returns the result of a row, as JSON has it: trained if need be, and bound.

    What training says goes to <row>/log.txt.
    """
    run = runs.of(config)
    if runs.has_checkpoint(run) and (other := changed(runs.read_config(run), config)):
        raise ConfigError(
            f"cannot go on with {run.folder}: it was trained with other values of "
            f"{', '.join(other)}. Give another --output."
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    diverged = None
    with _logged(run):
        try:
            if loop.train(config):
                raise KeyboardInterrupt  # it was asked to stop, and did
        except DivergedError as error:
            diverged = str(error)
    lines = runs.read_lines(run.metrics)
    about = {
        "steps": lines[-1]["step"] if lines else 0,
        "skipped": sum(one["skipped"] for one in lines),
        "diverged": diverged,
    }
    if not runs.has_checkpoint(run):
        return {**about, "bound": None, "l_simple": None, "distance": None}
    drawable, step, _ = opening.load(config, run, Weights())
    if step is not None and step > options.steps:
        raise ConfigError(
            f"steps must be at least those of the run that is there, {step:,}; got "
            f"{options.steps:,}. Give another --output."
        )
    key = {
        "weights": drawable.sha256,
        "count": options.count,
        "bound_images": options.bound_images,
        "seed": options.seed,
        "sampling": chains.describe_sampling(config),
    }
    path = run.folder / "eval" / "ablation.json"
    known = runs.recalled(path, {"key": key}, dict[str, Any])
    if known is not None:
        return known
    dataset = build.load_data(config)
    with _logged(run):
        count, seed = options.bound_images, options.seed
        chosen = datasets.choose(len(dataset.images), count, seed)
        sums = bound.evaluate(config, drawable, dataset, chosen, seed=seed)
        mean, spread = bound.mean(np.array(sums.totals))
        folder, how = run.folder / "eval" / "samples", {"seed": seed, "batch_size": 64}
        drawn = draws.to_disk(folder, config, drawable, count=options.count, **how)
        result = {
            **about,
            "bound": mean,
            "bound_error": spread,
            "l_simple": l_simple(config, drawable, dataset, options),
            "distance": ruler(config, options).distance(drawn),
        }
    runs.write_json(path, {"key": key, **result})
    return result


@contextlib.contextmanager
def _logged(run: runs.Run) -> Iterator[None]:
    """Sends what is printed meanwhile to a file of the run."""
    with (
        (run.folder / "log.txt").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def l_simple(
    config: Config, drawable: Drawable, dataset: datasets.Dataset, options: Options
) -> float:
    """Returns the squared error of eps at the noise of the paper's schedule.

    The mean over t = 1..1000 of that schedule, whatever the network's own: each t is
    taken to the time of the same log-SNR, or the nearest there is.
    """
    chain = build.chain_schedule(config, drawable.params)
    rng = np.random.default_rng(options.seed)
    count = min(512, len(dataset.images))
    chosen = np.sort(rng.choice(len(dataset.images), count, replace=False))
    batch = datasets.batch_at(dataset, chosen)
    label = batch["label"] if config.net.classes else None

    @jax.jit
    def error(weights: Any, image: Any, label: Any, t: Any, key: Any) -> jax.Array:
        levels = build.chain_schedule(config, weights.params)
        x0 = image.astype(jnp.float32) / 127.5 - 1
        eps = jax.random.normal(key, x0.shape)
        x_t = gaussian.q_sample(x0, eps, levels(t))
        denoise = chains.given_labels(config, weights, levels, label, clip=False)
        return jnp.square(denoise(x_t, t).eps - eps).mean()

    total = 0.0
    for j in range(DRAWS):
        # Evenly over t, and over the images in turn.
        share = (np.arange(count) / count + rng.uniform()) % 1
        t = paper_times(chain, share)
        key = jax.random.fold_in(jax.random.key(options.seed), j)
        order = rng.permutation(count)
        total += float(error(drawable, batch["image"], label, t[order], key))
    return total / DRAWS


def paper_times(chain: schedule.Schedule, share: np.ndarray) -> jax.Array:
    """Returns the times of a chain with the noise of the paper's t = 1 + 1000 share."""
    level = schedule.linear()(1 + (1000 * share).astype(int))
    return continuous.time_of(chain, level.logsnr)


def line(widths: str, row: str, result: dict[str, Any], name: str) -> str:
    """Returns a line of the table."""
    if result["bound"] is None:
        return f"  {row}: diverged before its first checkpoint"
    bits = f"{result['bound']:.2f} +- {result['bound_error']:.2f}"
    text = widths.format(
        row, bits, f"{result['l_simple']:.4f}", f"{result['distance']:.2f}"
    )
    if result["diverged"]:
        text += f"  diverged at step {result['steps']:,}"
    elif result["skipped"]:
        text += f"  {result['skipped']:,} steps skipped"
    return text


def picture(rows: dict[str, dict[str, Any]], name: str, options: Options) -> Any:
    """Returns the plot: the three numbers of every row."""
    there = {row: result for row, result in rows.items() if result["bound"] is not None}
    return pictures.bars(
        list(there),
        {
            "bound (bits/dim)": [result["bound"] for result in there.values()],
            "L_simple": [result["l_simple"] for result in there.values()],
            name: [result["distance"] for result in there.values()],
        },
        title=f"{options.experiment}: {options.steps:,} updates of each objective",
    )


if __name__ == "__main__":
    entry.guarded(main)
