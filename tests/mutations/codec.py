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
        "return (x ^ (x >> np.uint64(31))) & _MASK",
        "return 0 * x",
        "tests/codec/test_coders.py"
        "::test_noise_that_is_popped_is_uniform_and_no_copy_of_what_was_pushed",
    ),
    Breakage(
        "rans-heads-begin-alike",
        "diffusion_jax/codec/rans.py",
        "heads = rng.integers(LOW, 2 * LOW, lanes, dtype=np.uint64)",
        "heads = np.full(lanes, LOW, np.uint64)",
        "tests/codec/test_coders.py::test_a_stack_begins_random",
    ),
    Breakage(
        "codec-fit-the-largest-file",
        "diffusion_jax/codec/fitting.py",
        "(first(found[0]), found[1])",
        "(first(found[0]), -found[1])",
        "tests/codec/test_files.py"
        "::test_the_chain_is_chosen_by_size_and_then_by_what_matters",
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
