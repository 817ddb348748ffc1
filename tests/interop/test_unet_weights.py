"""Weights and configurations of the U-Net under the names of others: there and back."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import any_bits, assert_same_bits

from diffusion_jax.interop import unet_config, unet_names
from diffusion_jax.nets import unet

Architecture = unet_config.Architecture

SMALL = unet.UNet(channels=8, multipliers=(1, 2), attention=(4,), groups=4, blocks=1)
NETS = {
    "small": Architecture(SMALL, 8, 3),
    "no attention": Architecture(SMALL.clone(attention=()), 8, 3),
    "three levels": Architecture(
        SMALL.clone(multipliers=(1, 3, 2), attention=(16, 4), blocks=2), 16, 3
    ),
    "grey": Architecture(
        SMALL.clone(out_channels=2, attention=(14,), dropout=0.0), 28, 1
    ),
    "labels": Architecture(SMALL.clone(num_classes=5), 8, 3),
    "wide": Architecture(SMALL, (8, 16), 3),
    "high": Architecture(SMALL, (24, 8), 3),
    "variant": Architecture(SMALL.clone(variant="diffusers"), 8, 3),
}
OFFICIALS = ("average", "last")


@functools.cache
def shapes(name):
    net, size, channels = NETS[name]
    return unet_names.shapes(net, channels, image_size=size)


def names_of(table, name):
    if table in OFFICIALS:
        return unet_names.official_names(shapes(name), average=table == "average")
    levels = len(NETS[name].net.multipliers)
    return unet_names.diffusers_names(shapes(name), levels)


@functools.cache
def parameters(name):
    return any_bits(shapes(name))


def read(found, table="diffusers", name="small", **options):
    names = names_of(table, name)
    return unet_names.from_tensors(
        found, names, shapes(name), where="a file", **options
    )


def exported(table="diffusers", name="small"):
    return unet_names.to_tensors(parameters(name), names_of(table, name))


# Names.


# All variables below "model/" of the authors' network SMALL, and their shapes.
RES = "norm1/beta norm1/gamma conv1/W conv1/b temb_proj/W temb_proj/b norm2/beta "
RES += "norm2/gamma conv2/W conv2/b"
ATTENTION = "norm/beta norm/gamma q/W q/b k/W k/b v/W v/b proj_out/W proj_out/b"
SHORTCUT = "nin_shortcut/W nin_shortcut/b"
OFFICIAL = {
    "temb": "dense0/W dense0/b dense1/W dense1/b",
    "conv_in": "W b",
    "down_0/block_0": RES,
    "down_0/downsample/conv": "W b",
    "down_1/block_0": f"{RES} {SHORTCUT}",
    "down_1/attn_0": ATTENTION,
    "mid/block_1": RES,
    "mid/attn_1": ATTENTION,
    "mid/block_2": RES,
    "up_1/block_0": f"{RES} {SHORTCUT}",
    "up_1/attn_0": ATTENTION,
    "up_1/block_1": f"{RES} {SHORTCUT}",
    "up_1/attn_1": ATTENTION,
    "up_1/upsample/conv": "W b",
    "up_0/block_0": f"{RES} {SHORTCUT}",
    "up_0/block_1": f"{RES} {SHORTCUT}",
    "norm_out": "beta gamma",
    "conv_out": "W b",
}
SHAPES = {
    "temb/dense0/W": (8, 32),
    "down_1/block_0/conv1/W": (3, 3, 8, 16),
    "down_1/block_0/temb_proj/W": (32, 16),
    "up_1/block_0/norm1/gamma": (32,),
    "up_1/block_1/nin_shortcut/W": (24, 16),
    "conv_out/W": (3, 3, 8, 3),
}


@pytest.mark.parametrize("table", OFFICIALS)
def test_official_names_are_the_variables_of_the_authors(table):
    end = "/ExponentialMovingAverage" if table == "average" else ""
    variables = [f"{at}/{leaf}" for at in OFFICIAL for leaf in OFFICIAL[at].split()]
    found = exported(table)
    assert set(found) == {f"model/{variable}{end}" for variable in variables}
    for variable, shape in SHAPES.items():
        assert found[f"model/{variable}{end}"].shape == shape


def test_the_authors_have_no_labels(refuses):
    with refuses("num_classes"):
        names_of("average", "labels")


def before(name):
    """A tensor of an attention as releases before 0.18 named it; others as they are."""
    if ".attentions." not in name or ".group_norm." in name:
        return name
    head, _, rest = name.partition(".to_")
    part, leaf = rest.replace("out.0", "out").split(".")
    old = {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}
    return f"{head}.{old[part]}.{leaf}"


def test_old_names_of_attentions_are_understood():
    today = exported(name="three levels")
    old = {before(name): tensor for name, tensor in today.items()}
    # Attention in two levels: twice on the way down, three times up; and the middle.
    assert len(old.keys() - today.keys()) == 8 * (2 * (2 + 3) + 1)
    assert unet_names.renamed(old).keys() == today.keys()
    assert unet_names.renamed(today).keys() == today.keys()
    params = read(unet_names.renamed(old), name="three levels")
    assert_same_bits(params, parameters("three levels"))


# Values.


@pytest.mark.parametrize(
    ("table", "name"),
    [("diffusers", name) for name in ("no attention", "labels", "variant")]
    + [(table, "three levels") for table in ("diffusers", *OFFICIALS)],
)
def test_export_and_import_are_inverse_to_each_other(table, name):
    """To the bit, and every tensor has a name of its own."""
    names, found = names_of(table, name), exported(table, name)
    assert names.keys() == shapes(name).keys()
    assert len(found) == len(names)
    assert all(tensor.flags.c_contiguous for tensor in found.values())
    params = read(found, table, name)
    assert_same_bits(params, parameters(name))
    assert_same_bits(unet_names.to_tensors(params, names), found)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_comes_in_exactly(dtype):
    found = {
        key: np.full(x.shape, 1 / 3).astype(dtype) for key, x in exported().items()
    }
    for key, tensor in unet_names.to_tensors(
        read(found), names_of("diffusers", "small")
    ).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, found[key].astype(np.float64))


@pytest.mark.parametrize("table", OFFICIALS)
def test_variables_of_training_are_left_out_and_no_others(table, refuses):
    last = exported("last")
    slots = ("Adam", "Adam_1", "ExponentialMovingAverage")
    found = {f"{key}/{slot}": -last[key] for key in last for slot in slots}
    found |= dict.fromkeys(("beta1_power", "beta2_power"), np.float32(1.0))
    found |= {**last, "global_step": np.int64(790_000), **exported(table)}
    others = unet_names.official_others(shapes("small"))
    assert_same_bits(read(found, table, ignore=others), parameters("small"))
    with refuses("global_step"):
        read(found, table)
    for unknown in ("model/conv_in/V", "model/mid/attn_2/q/b/Adam"):
        with refuses(unknown):
            read({**found, unknown: np.zeros(3, np.float32)}, table, ignore=others)


def test_all_that_is_wrong_is_named_at_once(refuses):
    found, zeros = exported(), np.zeros(3, np.float32)
    shortcut = "down_blocks.1.resnets.0.conv_shortcut.weight"
    del found["conv_in.bias"], found["mid_block.attentions.0.to_q.weight"]
    found |= {"conv_in.scale": zeros, "up_blocks.7.resnets.0.conv1.bias": zeros}
    # Of the shape that is ours, but for the order of axes.
    found["conv_in.weight"] = found["conv_in.weight"].transpose(2, 3, 1, 0)
    found[shortcut] = found[shortcut][:, :, 0, 0]
    found["time_embedding.linear_1.bias"] = np.zeros(32)
    found["conv_out.bias"] = np.float32([0, np.nan, 0])
    with pytest.raises(ValueError) as caught:
        read(found)
    lines = (
        "conv_in.bias: nothing for float32",
        "mid_block.attentions.0.to_q.weight: nothing for float32",
        "conv_in.scale: float32[3] for nothing",
        "up_blocks.7.resnets.0.conv1.bias: float32[3] for nothing",
        "conv_in.weight: float32[3,3,3,8] for float32[8,3,3,3]",
        f"{shortcut}: float32[16,8] for float32[16,8,1,1]",
        "time_embedding.linear_1.bias: float64[",
        "conv_out.bias: values that are not finite",
    )
    with refuses(f"{len(lines)} that do not fit"):
        raise caught.value
    assert [line for line in lines if line not in str(caught.value)] == []


# Configurations.


def config(**fields):
    """That of the network SMALL, with other fields."""
    return {**unet_config.write_config(SMALL, 3, image_size=8), **fields}


@pytest.mark.parametrize("name", NETS)
def test_configuration_comes_back_through_json(name):
    net, size, channels = NETS[name]
    written = unet_config.write_config(net, channels, image_size=size)
    text = json.dumps(written)
    assert unet_config.read_config(json.loads(text), where="a file") == NETS[name]
    assert json.loads(text).keys() - {"_class_name", "_diffusers_version"} == set(
        unet_config._DEFAULTS
    )


def test_configuration_says_which_constants():
    fields = ("norm_eps", "freq_shift", "flip_sin_to_cos", "downsample_padding")
    fields += ("attention_head_dim",)
    net = NETS["variant"].net
    said = unet_config.write_config(net, 3, image_size=8)
    assert [config()[field] for field in fields] == [1e-6, 1, False, 0, None]
    assert [said[field] for field in fields] == [1e-5, 0, True, 1, 8]


def test_fields_that_are_missing_are_those_of_diffusers():
    """The head of attention is what comes of its defaults, 8 channels wide."""
    short = {"_class_name": "UNet2DModel", "sample_size": 16}
    net = unet.UNet(
        channels=224,
        multipliers=(1, 2, 3, 4),
        attention=(8, 4, 2),
        dropout=0.0,
        variant="diffusers",
    )
    assert unet_config.read_config(short, where="a file") == Architecture(net, 16, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"act_fn": "swish"},
        {"sample_size": [8, 8]},
        {"time_embedding_dim": 32},
        {"attn_norm_num_groups": 4},
        {"mid_block_scale_factor": 1.0},
        {"num_train_timesteps": 1000},
        {"_name_or_path": "here", "_commit": 7},
        # Of averaged weights, from diffusers' own training script.
        {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "power": 2 / 3},
        {"optimization_step": 9, "update_after_step": 0, "use_ema_warmup": True},
        {
            "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
            "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
        },
    ],
    ids=str,
)
def test_other_words_for_the_same_are_understood(fields):
    assert unet_config.read_config(config(**fields), where="a file") == NETS["small"]


# Each is refused by itself, and all together.
UNSUPPORTED = [
    {"center_input_sample": True},
    {"time_embedding_type": "fourier"},
    {"time_embedding_dim": 64},
    {"mid_block_type": None},
    {"mid_block_scale_factor": 2},
    {"downsample_type": "resnet"},
    {"upsample_type": "resnet"},
    {"act_fn": "gelu"},
    {"attn_norm_num_groups": 2},
    {"resnet_time_scale_shift": "scale_shift"},
    {"add_attention": False},
    {"class_embed_type": "timestep"},
    {"out_channels": 9},
    {"cross_attention_dim": 768},
    {"norm_eps": 1e-4},
    {"freq_shift": 0},
    {"flip_sin_to_cos": True},
    {"downsample_padding": 1},
    {"attention_head_dim": 8},
    {"block_out_channels": [8, 12]},
    {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
    {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]},
    {"sample_size": [8, 15]},
    {"sample_size": [7, 16]},
    {"sample_size": 7},
]
# Both ways have a kind a level, with the same attention.
LEVELS = [
    ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "elsewhere than down_block"),
    ({"down_block_types": ["DownBlock2D"] * 2}, "elsewhere than down_block_types"),
    ({"down_block_types": ["DownBlock2D"] * 3}, "a level"),
    ({"block_out_channels": [8, 16, 16]}, "a level"),
    *(({"_class_name": c}, f"the class {c!r}") for c in ("SD", None, 3)),
]


NO_NUMBERS = (None, True, -1, 0, 1.5, "3", [3], {}, float("nan"))
KINDS = {
    "in_channels": NO_NUMBERS,
    "layers_per_block": NO_NUMBERS,
    "num_class_embeds": NO_NUMBERS[1:],
    "dropout": (None, -1, 2, "little", [], {}, float("nan"), float("inf")),
    "norm_eps": (None, "x", -1, 1, [], {}, float("nan")),
    "sample_size": (*NO_NUMBERS[:-3], [], [[8]], [8, 8, 8], {}, float("nan")),
    "block_out_channels": (*NO_NUMBERS[:6], {}, [], [[8]], [0, 8], [8] * 20_000),
    "down_block_types": (*NO_NUMBERS, [], ["DownBlock2D", "Evil"], [["DownBlock2D"]]),
    "up_block_types": (*NO_NUMBERS, [], ["Evil", "UpBlock2D"]),
    "no_such_field": (1,),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_another_kind_are_refused(name, refuses):
    for value in KINDS[name]:
        with refuses(name):
            unet_config.read_config(config(**{name: value}), where="a file")


def test_all_that_we_lack_is_named_each_by_itself_and_at_once(refuses):
    fields = {name: value for each in UNSUPPORTED for name, value in each.items()}
    with pytest.raises(ValueError) as caught:
        unet_config.read_config(config(**fields), where="a file")
    for each, got in [*((each, next(iter(each))) for each in UNSUPPORTED), *LEVELS]:
        with refuses(got):
            unet_config.read_config(config(**each), where="a file")
        assert got in str(caught.value) or each not in UNSUPPORTED


def test_what_diffusers_lacks_is_named_at_once(refuses):
    net = SMALL.clone(multipliers=(2, 1), fourier=(7,))
    with pytest.raises(ValueError) as caught:
        unet_config.write_config(net, 3, image_size=8)
    for lacking in ("fourier (7,)", "multipliers (2, 1)"):
        with refuses(lacking):
            raise caught.value
