"""The model card says what a network is, and nothing that nobody told."""

import jax
from small_networks import ABOUT, network_of, read, small

from diffusion_jax.interop import unet_config
from diffusion_jax.lab.network_files import diffusers_folder
from diffusion_jax.lab.schema.config import replace


def test_a_recipe_that_nobody_told_is_not_on_the_card(tmp_path):
    config = replace(small(), "data", source="folder:a|b")
    diffusers_folder.write(tmp_path / 'we"ird', network_of(config))
    text = (tmp_path / 'we"ird' / "README.md").read_text()
    compile(text.partition("```python\n")[2].partition("```")[0], "card", "exec")
    assert "| training | loss v, batch 64" in text
    assert "| data | folder:a\\|b |" in text
    (tmp_path / 'we"ird' / diffusers_folder.RECORD).unlink()
    diffusers_folder.write(tmp_path / "again", read(tmp_path / 'we"ird'))
    assert "training" not in (tmp_path / "again" / "README.md").read_text()
    assert read(tmp_path / "again").about.recipe is False


def test_the_card_says_what_it_is(tmp_path):
    config = replace(small("digits_conditional"), "data", image_size=(8, 16))
    scores = {"fd vs train": {"value": "1.8", "of": "1,797 samples"}}
    changes = ("after step 8: train.batch_size from 16 to 32",)
    about = ABOUT._replace(scores=scores, changes=changes)
    network = network_of(config)._replace(about=about)
    digest = diffusers_folder.write(tmp_path / "out", network)
    text = (tmp_path / "out" / "README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    for said in (
        "library_name: diffusers",
        f"U-Net of {count:,} weights",
        "averaged of step 12",
        digest,
        "| fd vs train | 1.8 | 1,797 samples |",
        "class_labels",
        "8x16, grey",
        "attention at 4x8 and in the middle",
        "| data | digits |",
        "10, and a last row for none",
        "| changed under way | after step 8: train.batch_size from 16 to 32 |",
        unet_config.CLASS,
    ):
        assert said in text, said
    assert "pipeline_tag" not in text  # the hub has none for it
