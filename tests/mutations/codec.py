"""Mistakes in the codec."""

from . import Breakage

CODEC = [
    Breakage(
        "certified-nothing-in-doubt",
        "diffusion_jax/codec/certified.py",
        "0.5 - np.abs(scaled - nearest) < SURE * ONE",
        "0.5 - np.abs(scaled - nearest) < 0",
        "tests/codec/test_certified.py"
        "::test_machines_that_differ_by_less_than_the_margin_agree",
    ),
    Breakage(
        "noise-rows-overlap",
        "diffusion_jax/codec/noise.py",
        "counter = [first * blocks, 0, 0, 0]",
        "counter = [first, 0, 0, 0]",
        "tests/codec/test_certified.py::test_each_row_of_noise_is_to_be_had_alone",
    ),
    Breakage(
        "rans-low-bits-come-back",
        "diffusion_jax/codec/rans.py",
        "return ((x ^ (x >> np.uint64(31))) & _MASK).reshape(rows, lanes)",
        "return (0 * x).reshape(rows, lanes)",
        "tests/codec/test_coders.py"
        "::test_noise_that_is_popped_is_uniform_and_no_copy_of_what_was_pushed",
    ),
    Breakage(
        "container-pixels-unchecked",
        "diffusion_jax/codec/container.py",
        "if zlib.crc32(np.ascontiguousarray(images).tobytes()) != file.crc:",
        "if False:",
        "tests/codec/test_files.py"
        "::test_a_damaged_file_is_refused_or_says_that_it_is_cut",
    ),
]
