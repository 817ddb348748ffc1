"""Mistakes in the playground."""

from . import Breakage

_TESTS = "tests/lab/test_playground.py::"
PLAYGROUND = [
    Breakage(
        "playground-key-of-another-step",
        "diffusion_jax/lab/playground/walk.py",
        "samplers.fold(keys, index + 1)",
        "samplers.fold(keys, index)",
        _TESTS + "test_the_last_frame_is_what_sample_draws_to_the_bit",
    ),
    Breakage(
        "playground-depth-without-its-noise",
        "diffusion_jax/lab/playground/plans.py",
        "skipped = 0 if edits.has_memory(config) else len(whole) - len(grid)",
        "skipped = 0",
        _TESTS + "test_variations_and_mixtures_are_those_of_the_edit_command",
    ),
    Breakage(
        "playground-second-step-compiles",
        "diffusion_jax/lab/playground/walk.py",
        "= jax.device_put((plan.start, memory), place)",
        "= (plan.start, memory)",
        _TESTS + "test_the_last_frame_is_what_sample_draws_to_the_bit",
    ),
    Breakage(
        "playground-any-name-leads-here",
        "diffusion_jax/lab/playground/guard.py",
        "        if not self._ours(host):",
        "        if False:",
        _TESTS + "test_who_comes_by_another_name_or_without_the_token_is_refused",
    ),
    Breakage(
        "playground-any-cookie-will-do",
        "diffusion_jax/lab/playground/guard.py",
        "if self.cookie in cookies and self._same(cookies[self.cookie].value):",
        "if self.cookie in cookies:",
        _TESTS + "test_who_comes_by_another_name_or_without_the_token_is_refused",
    ),
    Breakage(
        "playground-bodies-without-end",
        "diffusion_jax/lab/playground/guard.py",
        "        if size > most:",
        "        if False:",
        _TESTS + "test_bodies_are_bounded_while_they_are_read",
    ),
]
