"""Configurations in the words of diffusers: written, read back, and refused."""

import json
import math

import numpy as np
import pytest

from diffusion_jax.lab.network_files import diffusers_config
from diffusion_jax.lab.schema.config import Config, replace
from experiments.configs import EXPERIMENTS

UNET, SCHEDULER = diffusers_config.to_diffusers(EXPERIMENTS["cifar10"].config)


def from_diffusers(scheduler=SCHEDULER, **unet):
    return diffusers_config.from_diffusers(
        {**UNET, **unet}, scheduler, name="n", where="w"
    )


def test_the_paper_is_what_comes_back():
    paper, config = EXPERIMENTS["cifar10_official"].config, from_diffusers()
    assert (config.net, config.diffusion) == (paper.net, paper.diffusion)
    assert (UNET["norm_eps"], UNET["downsample_padding"]) == (1e-6, 0)
    assert (UNET["freq_shift"], UNET["flip_sin_to_cos"]) == (1, False)
    assert SCHEDULER["variance_type"] == "fixed_large"
    # At 256x256 the authors drew with the small variance.
    church = diffusers_config.to_diffusers(EXPERIMENTS["lsun_church256"].config)[1]
    assert church["variance_type"] == "fixed_small"


NAMED = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("schedule", [*NAMED, "const", "warmup10", "sigmoid"])
def test_schedules_are_known_by_their_name_or_by_their_betas(schedule):
    config = replace(EXPERIMENTS["cifar10"].config, "diffusion", schedule=schedule)
    scheduler = diffusers_config.to_diffusers(config)[1]
    found, betas = from_diffusers(scheduler).diffusion, scheduler["trained_betas"]
    if schedule in NAMED:
        assert (scheduler["beta_schedule"], betas) == (NAMED[schedule], None)
        assert found.schedule == schedule
        return
    assert len(betas) == 1000
    made = diffusers_config.betas_of(Config(diffusion=found))
    np.testing.assert_allclose(made, betas, rtol=1e-5)
    # As float32, which is how diffusers gives them back.
    rounded = np.asarray(betas, np.float32).tolist()
    assert from_diffusers({**scheduler, "trained_betas": rounded}).diffusion == found


def test_betas_of_no_schedule_are_refused(refuses):
    odd = (np.linspace(1e-4, 0.02, 1000) ** 1.5).tolist()
    for field, value, got in (
        ("trained_betas", odd, "trained_betas, 1000 of them, that are none of"),
        ("trained_betas", [2.0] * 1000, "trained_betas from 2 to 2, not above 0"),
        ("trained_betas", [0.1, 0.2], "trained_betas of shape (2,), not (1000,)"),
        ("beta_start", -1, "-1"),
        ("beta_start", 0, "0"),
        ("beta_end", 2, "2"),
    ):
        with refuses(got):
            from_diffusers({**SCHEDULER, field: value})


def test_what_diffusers_lacks_is_named(refuses):
    for name, got in (
        ("edm", "the schedule ve"),
        ("flow", "prediction velocity"),
        ("table2_mean_mse", "prediction mean"),
        ("table2_eps_vlb_learned", "variance learned"),
        ("distilled", "DDIMScheduler"),
        ("meanflow", "no scheduler"),
    ):
        with refuses(got):
            diffusers_config.to_diffusers(EXPERIMENTS[f"digits_{name}"].config)


def test_a_consistency_model_has_a_scheduler_there(refuses):
    config = EXPERIMENTS["digits_consistency"].config
    unet, scheduler = diffusers_config.to_diffusers(config)
    assert scheduler["_class_name"] == "LCMScheduler"
    # c_skip, by its formula: x0 is the network's alone.
    assert 0.25 / (scheduler["timestep_scaling"] ** 2 + 0.25) < 1e-12
    found = from_diffusers(scheduler, **unet)
    assert (found.few.method, found.sample.sampler) == ("consistency", "consistency")
    assert found.diffusion == replace(config, "diffusion", loss="v").diffusion
    usual = {"_class_name": "LCMScheduler", "prediction_type": "v_prediction"}
    read = from_diffusers(usual).diffusion
    assert (read.schedule, read.beta_start, read.beta_end) == ("quad", 0.00085, 0.012)
    with refuses("timestep_scaling 1.0, not at least 10"):
        from_diffusers({**usual, "timestep_scaling": 1.0})


def test_channels_have_to_be_those_of_images(refuses):
    with refuses("4. Networks of latents"):
        from_diffusers(in_channels=4, out_channels=4)
    with refuses("6. Correct variance_type"):
        from_diffusers(out_channels=6)
    learned = {**SCHEDULER, "variance_type": "learned_range"}
    assert from_diffusers(learned, out_channels=6).diffusion.variance == "range"
    with refuses("3. Correct variance_type"):
        from_diffusers(learned)


# Whatever a file holds, it ends in one error that names it.
NO_NUMBERS = [None, "1", [1], True, math.inf, math.nan, 10**400]
NO_TRUTHS = [None, "false", 0]
NO_NAMES = [None, [], 5, "laplace"]
WRONG = {
    "num_train_timesteps": [*NO_NUMBERS, 1000.0, 1, 1_000_001],
    "beta_start": NO_NUMBERS,
    "beta_end": NO_NUMBERS,
    "beta_schedule": NO_NAMES,
    "trained_betas": ["x", {}, 5, True, *([0.1, value] for value in NO_NUMBERS)],
    "variance_type": NO_NAMES,
    "prediction_type": NO_NAMES,
    "clip_sample": NO_TRUTHS,
    "clip_sample_range": [*NO_NUMBERS, 2.0],
    "thresholding": NO_TRUTHS,
    "rescale_betas_zero_snr": [*NO_TRUTHS, True],
    "set_alpha_to_one": [*NO_TRUTHS, False],
    "dynamic_thresholding_ratio": NO_NUMBERS,
    "sample_max_value": [None, "1", True, math.nan, 10**400],
    "timestep_spacing": NO_NAMES,
    "steps_offset": [None, "1", [], 1.0, True],
    "timestep_scaling": [None, "10", 1, math.nan],
    "original_inference_steps": [None, "1", 1.0],
    "timestep_values": [[1, 2], 0, ""],
    "_class_name": [*NO_NAMES, "PNDMScheduler"],
    "flavour": ["sweet"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_named(name, refuses):
    for value in WRONG[name]:
        with refuses(f"{name} "):
            from_diffusers({**SCHEDULER, name: value})


def test_every_field_that_we_lack_is_named_at_once_and_long_values_are_cut():
    wrong = {name: values[0] for name, values in WRONG.items() if name[0] != "_"}
    with pytest.raises(ValueError) as caught:
        from_diffusers({**SCHEDULER, **wrong, "long": "0" * 10**6})
    said = str(caught.value)
    assert all(f"{name} {value!r}" in said for name, value in wrong.items())
    assert "trained_betas 'x', not null or a list of finite numbers" in said
    assert len(said) < 3000


SIZES = [
    ({"sample_size": 8192}, "8192"),
    ({"layers_per_block": 100_000}, "100000"),
    ({"block_out_channels": [128, 128, 128, 128 * 1024]}, "131072"),
    ({"num_class_embeds": 10**12}, "1000000000000"),
]


def test_sizes_beyond_every_network_are_refused_before_any_work(monkeypatch):
    monkeypatch.delattr("jax.eval_shape")
    for fields, got in SIZES:
        ends = rf"^w: \S.* must be .*(at most|from \d to) \d+; got {got}\. Such a net"
        with pytest.raises(ValueError, match=ends):
            from_diffusers(**fields)


def test_a_threshold_goes_there_and_back_and_at_one_is_the_clip(refuses):
    config = replace(EXPERIMENTS["cifar10"].config, "sample", threshold=0.95)
    scheduler = diffusers_config.to_diffusers(config)[1]
    assert scheduler["thresholding"] is True
    assert scheduler["dynamic_thresholding_ratio"] == 0.95
    again = json.loads(json.dumps(scheduler, allow_nan=False))
    found = from_diffusers(again)
    assert (found.sample.threshold, found.sample.clip) == (0.95, True)
    assert diffusers_config.to_diffusers(found)[1] == scheduler
    assert from_diffusers({**again, "sample_max_value": math.inf}) == found
    # A sample_max_value of 1 is what a scheduler has where nothing else is said.
    on = {**SCHEDULER, "thresholding": True, "clip_sample": False}
    sample = from_diffusers(on).sample
    assert (sample.clip, sample.threshold) == (True, None)
    off = {**on, "thresholding": False, "sample_max_value": 1.5}
    sample = from_diffusers(off).sample
    assert (sample.clip, sample.threshold) == (False, None)
    with refuses("sample_max_value 1.5 with thresholding"):
        from_diffusers({**on, "sample_max_value": 1.5})
    endless = {"sample_max_value": math.inf, "dynamic_thresholding_ratio": 1.5}
    with refuses("1.5"):
        from_diffusers({**on, **endless})


# What is said of a folder that is read without our record.

DDIM = {**SCHEDULER, "_class_name": "DDIMScheduler"}
LABELS = {"num_class_embeds": 11}
NOTES = [
    ({}, None, ("no scheduler_config.json", "T = 1000", "the small variance")),
    (LABELS, SCHEDULER, ("11 rows", "label 10", "our own record")),
    ({}, DDIM, ("timestep_spacing leading", "leave out the noisiest")),
    ({}, {"_class_name": "DDIMScheduler"}, ("timestep_spacing leading",)),
    ({}, {**DDIM, "timestep_spacing": "linspace"}, ("linspace", "are others")),
]


def test_what_a_folder_does_not_say_is_said():
    for unet, scheduler, words in NOTES:
        (note,) = diffusers_config.notes({**UNET, **unet}, scheduler)
        assert all(word in note for word in words)
    assert len(diffusers_config.notes(LABELS, None)) == 2
    # And nothing of our own.
    for scheduler in (SCHEDULER, {**DDIM, "timestep_spacing": "trailing"}):
        assert diffusers_config.notes(UNET, scheduler) == ()
