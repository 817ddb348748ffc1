"""What the site has beside the pages of this folder: README, changes, and modules."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
USE = (
    *("train", "watch", "data", "sample", "few_steps", "edit", "playground"),
    *("measure", "codec", "latent", "networks", "objectives"),
    *("devices", "safety", "performance", "results"),
)
FROM = (
    *("from_diffusers", "from_denoising_diffusion_pytorch", "from_improved_diffusion"),
    *("from_score_sde", "from_edm"),
)
ROOMS = {
    "mathematics": ".",
    "networks": "nets",
    "training": "training",
    "data": "data",
    "evaluation": "evaluation",
    "codec": "codec",
}


def modules(folder: str) -> list[str]:
    """Returns the public modules of a folder of the library, as they are imported."""
    found = (ROOT / "diffusion_jax" / folder).glob("[a-z]*.py")
    names = sorted(path.relative_to(ROOT).with_suffix("") for path in found)
    return [".".join(name.parts) for name in names]


def page_of(module: str) -> str:
    """Returns the path of the page of a module."""
    return f"api/{module.removeprefix('diffusion_jax.')}.md"


def on_config(config: Any) -> Any:
    """Orders the pages: what one does, then what there is."""
    functions = [
        {room: [{m.partition(".")[2]: page_of(m)} for m in modules(folder)]}
        for room, folder in ROOMS.items()
    ]
    config.nav = [
        {"Home": "index.md"},
        {"Tour": "tour.md"},
        {"Use": [f"{name}.md" for name in USE]},
        {"Coming from": [f"{name}.md" for name in FROM]},
        {"Functions": functions},
        {"Project": ["architecture.md", "extend.md", "contributing.md", "changes.md"]},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in this folder."""
    for name, source in FROM_ROOT.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, name, content=text))
    for module in [m for folder in ROOMS.values() for m in modules(folder)]:
        text = f"# {module}\n\n::: {module}\n"
        files.append(File.generated(config, page_of(module), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns a page with its links as they are on the site."""
    for name, source in FROM_ROOT.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}", f"]({name}", markdown)
    if page.file.src_uri in FROM_ROOT:
        markdown = markdown.replace("](docs/", "](")
    return markdown
