"""A run goes on from the newest checkpoint that verifies, or says why not."""

import json
import re
import shutil

import pytest
from small_run import SMALL, train_small

from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.errors import ConfigError
from diffusion_jax.lab.network_files import records
from diffusion_jax.lab.run_folder import changes, runs
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import replace, to_dict
from experiments import convert, sample, train
from experiments.configs import EXPERIMENTS

EVERY = ["--train.checkpoint-every", "4", "--train.keep", "9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("runs"), "whole", *EVERY)


@pytest.fixture
def damaged(whole, tmp_path):
    """The run with a flipped bit in its last two checkpoints."""
    run = runs.Run(shutil.copytree(whole.folder, tmp_path / "damaged"))
    for step in (8, 12):
        flip(run.checkpoints / str(step))
    return run


def flip(path):
    """Flips bits in the data of a checkpoint until one of them mattered."""
    files = (path / "state").rglob("d/*")
    for file in sorted(files, key=lambda file: -file.stat().st_size):
        content = bytearray(file.read_bytes())
        for place in range(100, len(content), len(content) // 8):
            content[place] ^= 1
        file.write_bytes(content)
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError:
            return
    raise AssertionError(path)


def flags(run, *more):
    at = ["--output", str(run.folder.parent), "--name", run.folder.name]
    return ["digits", *SMALL, *EVERY, *at, *more]


def test_training_goes_on_from_the_newest_that_verifies(whole, damaged, capsys):
    grid = damaged.samples / "step_00000012.png"
    grid.unlink()
    assert train.main(flags(damaged)) == 0
    said = capsys.readouterr()
    assert "going on from step 4 of 12" in said.out
    for step in (8, 12):
        path = damaged.checkpoints / str(step)
        assert f"checkpoint {path} is damaged (" in said.err
        assert f"set aside as {path}.damaged, which may be deleted" in said.err
    assert damaged.metrics.read_bytes() == whole.metrics.read_bytes()
    assert grid.read_bytes() == (whole.samples / grid.name).read_bytes()
    for step in (4, 8, 12):
        leaves = [
            checkpoint.verify(run.checkpoints / str(step)).leaves
            for run in (whole, damaged)
        ]
        assert leaves[0] == leaves[1]  # digests and all


def test_strict_refuses_and_changes_nothing(damaged, capsys):
    before = sorted(damaged.folder.rglob("*"))
    for main, given in (
        (train.main, flags(damaged, "--strict")),
        (sample.main, [str(damaged.folder), "--strict", "--count", "1"]),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=r"/12 must be what"):
            main(given)
    now = [path for path in damaged.folder.rglob("*") if path.name != ".lock"]
    assert sorted(now) == [path for path in before if path.name != ".lock"]


def test_samples_come_from_the_newest_that_verifies(damaged, capsys):
    assert sample.main([str(damaged.folder), "--count", "1"]) == 0
    said = capsys.readouterr()
    assert "averaged weights of step 4" in said.out
    assert "step 4 is used in its place" in said.err
    assert (damaged.checkpoints / "12").exists()


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(damaged):
    shutil.rmtree(damaged.checkpoints / "4")
    before = damaged.metrics.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"by step, 12: .*; 8: "):
        train.main(flags(damaged))
    assert damaged.metrics.read_bytes() == before


def test_other_values_are_refused_unless_forced(damaged, capsys):
    before = damaged.config.read_bytes()
    said = (
        r"train.seed: 0 -> 1. Give the old values \(--train.seed 0\), .*--name NAME.* "
        r"by --force\."
    )
    with pytest.raises(ValueError, match=said):
        train.main(flags(damaged, "--train.seed", "1"))
    assert damaged.config.read_bytes() == before
    assert train.main(flags(damaged, "--train.seed", "1", "--force")) == 0
    assert "other values than before: train.seed: 0 -> 1" in capsys.readouterr().err
    # More steps need no force, and a rate that falls to the last of them jumps.
    longer = flags(damaged, "--train.seed", "1", "--train.steps", "14")
    assert train.main(longer) == 0
    said = (
        r"falls to 0 at the last step, which was 12 and is 14: at step 12 .* from 0 to"
    )
    assert re.search(said, capsys.readouterr().err)
    made = runs.read_config(damaged)
    assert (made.train.seed, made.train.steps) == (1, 14)
    # Where no step is made nothing is said to have been made otherwise.
    before = damaged.config.read_bytes()
    fewer = flags(damaged, "--train.steps", "6", "--train.batch-size", "4", "--force")
    assert train.main(fewer) == 0
    assert "no step is left to make" in capsys.readouterr().err
    assert damaged.config.read_bytes() == before
    told = {
        12: ("after step 4: train.seed from 0 to 1",),
        14: (
            "after step 4: train.seed from 0 to 1",
            "after step 12: train.steps from 12 to 14",
        ),
    }
    for step, words in told.items():
        found = convert.of_run(damaged, Weights(step=step))
        assert found.about.changes == words
        assert (found.config.train.steps, found.config.train.seed) == (step, 1)
        assert records.read(json.dumps(records.write(found)), damaged.config)[1] == (
            found.about
        )
    assert changes.before(damaged, made, 4).train.seed == 0


def test_changes_that_made_no_step_are_forgotten(tmp_path):
    """As where a run is killed before its next checkpoint, or goes on from an older."""
    run = runs.Run(tmp_path / "run")
    seeds = [replace(EXPERIMENTS["digits"].config, "train", seed=n) for n in range(4)]
    runs.write_json(run.config, to_dict(seeds[0]))
    for seed, step, lines in (
        (1, 8, {8: [0, 1]}),
        (2, 8, {8: [0, 2]}),
        (0, 8, {}),
        (1, 8, {8: [0, 1]}),
        (2, 9, {8: [0, 1], 9: [1, 2]}),
        (3, 6, {6: [0, 3]}),
        (3, 9, {6: [0, 3]}),
    ):
        changes.record(run, seeds[seed], step)
        found = runs.read_lines(run.changes)
        assert {x["step"]: x["changed"]["train.seed"] for x in found} == lines
        assert runs.read_config(run).train.seed == seed
    for line in ('{"step": 3}', '{"step": 3, "changed": {"a.b": [0, 1], "c": 2}}'):
        run.changes.write_text(line + "\n")
        for read in (changes.before, lambda run, *_: changes.in_words(run, 9)):
            with pytest.raises(ConfigError, match=r"cannot read .*changes\.jsonl"):
                read(run, seeds[0], 0)


def test_force_does_not_make_another_network_fit(damaged):
    more = ["--net.channels", "16", "--force"]
    with pytest.raises(checkpoint.CheckpointError, match=r"leaves that do not: .*conv"):
        train.main(flags(damaged, *more))
    assert json.loads(damaged.config.read_text())["net"]["channels"] == 8


def test_a_run_that_lost_its_configuration_is_not_taken_for_another(damaged):
    damaged.config.unlink()
    with pytest.raises(ValueError, match=r"config.json is not there. Give"):
        train.main(flags(damaged))
    assert train.main(flags(damaged, "--force")) == 0
    assert changes.in_words(damaged, 12) == ("before step 4: what held was lost",)
    damaged.config.write_text("{")
    with pytest.raises(ValueError, match=r"must hold the configuration of a run"):
        train.main(flags(damaged))
    assert train.main(flags(damaged, "--force")) == 0
    assert json.loads(damaged.config.read_text())["train"]["steps"] == 12
