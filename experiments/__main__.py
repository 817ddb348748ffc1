"""All commands by their names: `diffusion-jax COMMAND ...`, once installed.

The same as `python -m experiments.COMMAND ...`.
"""

import runpy
import sys

from diffusion_jax import __version__, errors

COMMANDS = {
    "train": "train a network, or go on where the run stopped",
    "distil": "train a student of it that draws in one to four steps",
    "sample": "draw images from a trained network",
    "playground": "watch, compare, mix, paint and compress in the browser",
    "edit": "encode, interpolate, vary, inpaint or colorize images",
    "eval_fid": "measure how far samples are from data: FID and others",
    "eval_autoencoder": "measure an autoencoder: what is lost, its latents",
    "eval_nll": "bound the negative log-likelihood, in bits/dim",
    "compare_samplers": "measure quality by network evaluations, for every rule",
    "ablation": "train every objective with one budget, and compare them",
    "codec": "compress images, without loss or to any number of bits",
    "legibility": "measure whether samples are legible, and no copies",
    "convert": "convert trained networks: diffusers, the hub, TensorFlow",
    "report": "write what runs came to as one page",
    "runs": "list runs, or show what differs between some",
    "checkpoints": "list the checkpoints of a run, compared with their manifests",
    "train_classifier": "train the classifier that judges samples",
    "train_noisy_classifier": "train a classifier that guides samples",
    "compare_diffusers": "draw the same images with diffusers",
    "bench": "measure the speed of training and sampling",
    "compiled": "count the kernels and bytes of a training step",
}
"""What each file here does, in the order in which one needs it."""


def main() -> None:
    """Runs the command that is named first, and loads no other."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: diffusion-jax COMMAND ...\n\ncommands:")
        for command, said in COMMANDS.items():
            print(f"  {command:<24}{said}")
        print("\nflags of one:  diffusion-jax COMMAND --help")
    elif name == "--version":
        print(f"diffusion_jax {__version__}")
    elif name in COMMANDS:
        sys.argv[1:] = rest
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    else:
        try:
            errors.raise_unknown("the command", name, tuple(COMMANDS))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
