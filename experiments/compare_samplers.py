"""Compares samplers by network evaluations: `python -m experiments.compare_samplers`.

Draws samples from a trained run with every sampling rule at several numbers of network
evaluations (NFE), from the same noise, and measures how far they are from the training
images. Writes a table, a plot and a JSON file. The same command again goes on where it
stopped (resume).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import errors, samplers
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.measure import extractors, reference
from diffusion_jax.lab.process import entry, progress, replaceable
from diffusion_jax.lab.run_folder import runs
from diffusion_jax.lab.schema import choices, latents
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import Config
from diffusion_jax.lab.schema.facts import Count, Seed
from diffusion_jax.lab.schema.few import takes
from diffusion_jax.lab.schema.sampling import RULES, Sampling
from diffusion_jax.lab.trained import opening, weights
from diffusion_jax.lab.wiring import build, chains, latent_space
from diffusion_jax.lab.wiring.chains import Drawable
from diffusion_jax.storage.waiting import Bar
from diffusion_jax.training import parallel


def rows() -> dict[str, Sampling]:
    """Returns the rows of the table: every rule that takes steps, by itself.

    Or in each of its orders but the first, which is no better than ddim.
    """
    found: dict[str, Sampling] = {}
    for name, rule in RULES.items():
        if rule.grid is not None and not rule.orders:
            found[name] = Sampling(name)
        for order in rule.orders[1:]:
            found[f"{name} {order}"] = Sampling(name, order=order)
    # Its default of 10 moves a level would leave too few levels within a budget.
    found["langevin"] = Sampling("langevin", moves=2)
    return found


NAME = "compare_samplers"
TWICE = ("heun", "edm", "dpm_solver_pp 2S", "predictor_corrector")
"""Rows of two network evaluations a step, but one in the last."""
SLOW = 50
"""Rules whose default is so many steps are measured beyond 100 evaluations too."""
TOLERANCES = (1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    MAIN: ClassVar = (
        "run evaluations rules beside count batch_size seed out overwrite "
        "raw average step"
    )
    run: choices.Named = None
    evaluations: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 1000)
    """Network evaluations a sample (NFE), for every rule; more than 100 only for the
    slow rules, and never more than T steps. ode has three tolerances instead, each with
    its own number of evaluations."""
    rules: tuple[str, ...] = ()
    """Which rows of the table to draw; all that the network takes when not given."""
    beside: tuple[str, ...] = ()
    """Other runs on the same data, such as students of few steps, whose rows follow
    under their names."""
    count: Count = 800
    """Samples for each number: few make every distance larger."""
    batch_size: Count = 200
    """Images at a time."""
    seed: Seed = 0
    """Of the noise: the same for every rule."""
    which: choices.Which = Weights()
    out: Path | None = None
    """Folder of samplers.json and samplers.png; <run>/eval when not given."""
    overwrite: bool = False
    """Whether a file may be replaced that this command did not write."""


class Point(NamedTuple):
    """One cell of the table."""

    rule: str
    budget: float
    """Evaluations that were allowed; of ode the tolerance."""
    evaluations: float
    """Network evaluations a sample, counted as they were made."""
    distance: float
    """Frechet distance to the training images."""
    sampling: dict[str, Any]
    """The rule and its options."""
    seconds: float
    """For all samples, without compiling."""


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes table, plot and numbers; returns the exit code."""
    options = entry.parse(Options, argv, NAME, __doc__)
    pictures.check_plots()
    parallel.split_cpu()
    validate(options)
    run, config = opening.opened(options.run, options, which=options.which)
    out = options.out or run.folder / "eval"
    path, plot = out / "samplers.json", out / "samplers.png"
    if options.out is not None:
        over = options.overwrite
        replaceable.check_file(path, replaceable.report_of(NAME), overwrite=over)
        replaceable.check_file(plot, pictures.MARK, overwrite=over)
    dataset = build.load_data(config)
    extractor, size = (
        extractors.choose("classifier", config, dataset),
        options.batch_size,
    )
    ruler = reference.ruler(
        config, dataset.images, extractor, options.count, batch_size=size
    )
    halves = ruler.real.halves
    drawable, step, kind = opening.load(config, run, options.which)
    about: dict[str, Any] = {
        "distance": ruler.name,
        "count": options.count,
        "seed": options.seed,
        "weights_sha256": drawable.sha256,
        "training_step": step,
        "half_of_train_against_the_other_half": halves if np.isfinite(halves) else None,
        "versions": runs.versions(),
    }
    networks = {"": (config, drawable), **beside(options, config)}
    if options.beside:
        about["beside"] = {n: of.sha256 for n, (_, of) in networks.items() if n}
    kept = runs.recalled(path, about, lambda points, command="": points) or []
    known = [Point(**point) for point in kept]
    print(
        f"{run.folder}, {weights.describe(kind, step)}: {about['distance']} of "
        f"{options.count:,} samples; in brackets evaluations, where they are others"
    )
    budgets = sorted(set(options.evaluations))
    print(f"  {'evaluations (NFE)':<20}" + "".join(f"{b:>13}" for b in budgets))
    points: list[Point] = []
    for name, rule, row in table(networks, options, ruler.distance, known):
        points += row
        kept = points + [point for point in known if point not in points]
        told = {"command": replaceable.typed(NAME, argv), **about}
        runs.write_json(path, {**told, "points": [p._asdict() for p in kept]})
        print(line(f"{name}{rule}", row, budgets), flush=True)
    print(f"written: {path}")
    picture = pictures.curves(
        {
            rule: [(p.evaluations, p.distance) for p in points if p.rule == rule]
            for rule in dict.fromkeys(p.rule for p in points)
        },
        title=f"{options.count:,} samples of {config.name} by sampling rule",
        xlabel="network evaluations a sample (NFE)",
        ylabel=about["distance"],
    )
    print(f"plot: {pictures.save(picture, plot)}")
    return 0


def beside(options: Options, config: Config) -> dict[str, tuple[Config, Drawable]]:
    """Returns the other networks by what their rows begin with.

    Raises:
      ConfigError: there is no such run, or it is of other data.
    """
    found = {}
    for name in options.beside:
        run, other = opening.opened(name, options)
        if other.data.source != config.data.source:
            raise ConfigError(
                f"each of beside must be a run on {config.data.source}; got {name} on "
                f"{other.data.source}. Leave it out, and compare it by itself."
            )
        found[f"{run.folder.name} "] = other, opening.load(other, run, Weights())[0]
    return found


def table(
    networks: dict[str, tuple[Config, Drawable]],
    options: Options,
    distance: Callable[[np.ndarray], float],
    known: Sequence[Point],
) -> Iterator[tuple[str, str, list[Point]]]:
    """Yields what each row begins with, its rule and its points."""
    for name, (config, drawable) in networks.items():
        mine = [
            point._replace(rule=point.rule.removeprefix(name))
            for point in known
            if point.rule.startswith(name)
        ]
        asked = options.rules if not name else ()
        for rule in asked or possible(config):
            row = measure(rule, config, drawable, options, distance, mine)
            yield name, rule, [p._replace(rule=f"{name}{rule}") for p in row]


def possible(config: Config) -> list[str]:
    """Returns the rows that a network can take."""
    return [r for r in (*rows(), "ode") if takes(config.few.method, r.split()[0])]


def validate(options: Options) -> None:
    """Raises ValueError before anything is drawn."""
    known = (*rows(), "ode")
    for rule in options.rules:
        if rule not in known:
            errors.raise_unknown("each of rules", rule, known)
    if not options.evaluations or min(options.evaluations) < 1:
        raise ConfigError(
            "evaluations must be numbers of at least 1; got "
            f"{options.evaluations}. Leave them out for 1 to 1000."
        )


def ways(rule: str, config: Config, options: Options) -> list[tuple[float, Config]]:
    """Returns the budgets of a row, and the configuration to draw with for each."""
    if rule == "ode":
        if config.net.classes and config.sample.label is None:
            return []  # draws images one by one, and cannot take the classes in turn
        hows = [(value, Sampling("ode", tolerance=value)) for value in TOLERANCES]
        return [(value, with_sampling(config, how)) for value, how in hows]
    how, total = rows()[rule], config.diffusion.num_steps
    slow = (RULES[rule.split()[0]].steps or total) >= SLOW
    if config.diffusion.schedule == "learned":
        # The other grids need noise levels before the weights are loaded.
        how = dataclasses.replace(how, grid="uniform")
    found: list[tuple[float, Config]] = []
    for budget in sorted(set(options.evaluations)):
        steps = steps_within(budget, rule)
        if rule == "ddpm" and config.diffusion.variance == "learned" and steps < total:
            continue  # a learned variance is of single steps alone
        few = config.few
        if steps < 1 or (few.method == "progressive" and steps != few.last):
            continue
        if steps == 1 and RULES[rule.split()[0]].grid != "uniform":
            continue  # times evenly spaced in log-SNR have two ends
        if steps <= total and (budget <= 100 or slow):
            way = with_sampling(config, dataclasses.replace(how, steps=steps))
            found.append((float(budget), way))
    return found


def steps_within(budget: int, rule: str) -> int:
    """Returns the most steps that a row takes with so many network evaluations."""
    if rule == "langevin":  # one more at the end
        return (budget - 1) // 2
    return (budget + 1) // 2 if rule in TWICE else budget


def measure(
    rule: str,
    config: Config,
    drawable: Drawable,
    options: Options,
    distance: Callable[[np.ndarray], float],
    known: Sequence[Point],
) -> Iterator[Point]:
    """Yields the points of a rule; one program draws all its grids."""
    chosen = []
    for budget, way in ways(rule, config, options):
        about = chains.describe_sampling(way)
        same = [p for p in known if (p.rule, p.sampling) == (rule, about)]
        if same:
            yield same[0]
        else:
            chosen.append((budget, way))
    if not chosen:
        return
    length = max(len(chains.make_grid(way)) for _, way in chosen)
    mesh = parallel.make_mesh()
    size = min(options.batch_size, options.count)
    shape = (size, *latents.seen(config))
    out = parallel.sharded(mesh) if size % mesh.size == 0 else parallel.replicated(mesh)

    def program(way: Config) -> Callable[..., jax.Array]:
        @jax.jit
        def draw(
            drawable: Drawable, key: jax.Array, first: jax.Array, grid: Any, std: Any
        ) -> jax.Array:
            rule = samplers.padded(chains.make_sampler(way, drawable, first=first))
            drawn = samplers.sample(key, rule, grid, shape, start_std=std, first=first)
            drawn = latent_space.decode(way, drawable.space, drawn)
            return jax.lax.with_sharding_constraint(drawn, out)

        return draw

    compiled = program(chosen[0][1])
    for budget, way in chosen:
        if rule == "ode" and budget != chosen[0][0]:
            compiled = program(way)  # a tolerance is compiled in; a grid is not
        grid = jnp.asarray(samplers.pad(chains.make_grid(way), length))
        std = jnp.asarray(chains.start_std(way))
        key, parts = jax.random.key(options.seed), []
        # Compiles.
        with progress.clock(f"compiling {rule}"):
            compiled(drawable, key, jnp.asarray(0), grid[-1:].repeat(length), std)
        begun = time.monotonic()
        starts = range(0, options.count, size)
        for first in Bar(starts, f"drawing by {rule}", unit="batches"):
            batch = np.asarray(compiled(drawable, key, jnp.asarray(first), grid, std))
            parts.append(pictures.to_uint8(batch))
        seconds = time.monotonic() - begun
        drawn = np.concatenate(parts)[: options.count]
        about = chains.describe_sampling(way)
        evaluations = chains.count_evaluations(way, drawable)
        yield Point(rule, budget, evaluations, distance(drawn), about, seconds)


def line(rule: str, row: list[Point], budgets: Sequence[int]) -> str:
    """Returns a row of the table."""

    def cell(point: Point | None) -> str:
        if point is None:
            return "-"
        others = rule == "ode" or point.evaluations < point.budget
        fewer = f" ({point.evaluations:.0f})" if others else ""
        return f"{point.distance:.2f}{fewer}"

    known = {point.budget: point for point in row}
    points = row if rule == "ode" else [known.get(budget) for budget in budgets]
    return f"  {rule:<20}" + "".join(f"{cell(point):>13}" for point in points)


if __name__ == "__main__":
    entry.guarded(main)
