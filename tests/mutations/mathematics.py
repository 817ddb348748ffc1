"""Mistakes in the root of the package: signs, factors, axes, keys, ends of ranges."""

from . import Breakage

MATHEMATICS = [
    # schedule
    Breakage(
        "schedule-in-float32",
        "diffusion_jax/schedule.py",
        "betas = np.asarray(betas, np.float64)",
        "betas = np.asarray(betas, np.float32)",
        "tests/mathematics/test_schedule.py::test_levels_at_every_step",
    ),
    Breakage(
        "schedule-time-wraps",
        "diffusion_jax/schedule.py",
        "index = jnp.where(t < 0, last + 1, t.astype(int))",
        "index = t.astype(int)",
        "tests/mathematics/test_refusals.py::test_what_is_traced_cannot_be_refused_and_reads_nan",
    ),
    Breakage(
        "schedule-warmup-one-late",
        "diffusion_jax/schedule.py",
        "betas[:rise] = np.linspace(beta_start, beta_end, rise)",
        "betas[:rise] = np.linspace(beta_start, beta_end, rise + 1)[:-1]",
        "tests/mathematics/test_schedule.py::test_betas_are_the_authors",
    ),
    # continuous
    Breakage(
        "continuous-farther-step",
        "diffusion_jax/continuous.py",
        "return jnp.where(nearer, below, above)",
        "return jnp.where(nearer, above, below)",
        "tests/mathematics/test_continuous.py::test_time_of_a_level_between_two_is_the_nearest",
    ),
    Breakage(
        "continuous-rises-in-float32",
        "diffusion_jax/continuous.py",
        "rise = np.diff(log_alpha)",
        "rise = np.diff(np.asarray(log_alpha, np.float32))",
        "tests/mathematics/test_sde.py::test_an_interpolated_schedule_has_the_betas_of_its_steps",
    ),
    Breakage(
        "continuous-shift-the-other-way",
        "diffusion_jax/continuous.py",
        "return time_of(schedule, logsnr - nats)",
        "return time_of(schedule, logsnr + nats)",
        "tests/mathematics/test_continuous.py::test_shifts_of_shifts_and_of_interpolated_steps",
    ),
    # learned
    Breakage(
        "learned-mean-square-without-2",
        "diffusion_jax/learned.py",
        "return (2 * losses * logsnr, 2 * losses * slope), (logsnr, slope)",
        "return (losses * logsnr, losses * slope), (logsnr, slope)",
        "tests/mathematics/test_learned.py"
        "::test_ends_get_the_mean_and_the_interior_the_mean_square",
    ),
    Breakage(
        "learned-bends-beyond-the-end",
        "diffusion_jax/learned.py",
        "bends = (jnp.arange(width) + jax.random.uniform(key, (width,), real)) / width",
        "bends = jnp.arange(width) + jax.random.uniform(key, (width,), real)",
        "tests/mathematics/test_learned.py"
        "::test_it_starts_nearly_straight_from_the_ends_asked_for",
    ),
    # gaussian
    Breakage(
        "gaussian-clip-keeps-eps",
        "diffusion_jax/gaussian.py",
        "pred = Prediction(x0, (x_t - level.alpha * x0) / level.sigma)",
        "pred = Prediction(x0, pred.eps)",
        "tests/mathematics/test_denoiser.py::test_denoiser_clips_x0_and_makes_eps_agree",
    ),
    Breakage(
        "gaussian-one-noise-for-all",
        "diffusion_jax/gaussian.py",
        "return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(key)",
        "return jax.random.normal(key[0], shape, dtype)",
        "tests/mathematics/test_gaussian.py::test_noise_of_an_example_is_that_of_its_key",
    ),
    Breakage(
        "gaussian-threshold-of-the-batch",
        "diffusion_jax/gaussian.py",
        "top = jnp.maximum(jnp.quantile(size, percentile, axis=1), 1)",
        "top = jnp.maximum(jnp.quantile(size, percentile), 1)",
        "tests/mathematics/test_scheduler_parity.py::test_path_is_that_of_diffusers",
    ),
    Breakage(
        "gaussian-variance-before-output",
        "diffusion_jax/gaussian.py",
        'output, extra["log_variance"] = jnp.split(output, 2, axis=-1)',
        'extra["log_variance"], output = jnp.split(output, 2, axis=-1)',
        "tests/mathematics/test_denoiser.py::test_denoiser_splits_off_the_learned_variance",
    ),
    # prediction
    Breakage(
        "prediction-small-is-large",
        "diffusion_jax/prediction.py",
        "small = 2 * prev_level.log_alpha - prev_level.logsnr + gap",
        "small = 2 * level.log_alpha - level.logsnr + gap",
        "tests/mathematics/test_variances.py::test_every_kind_over_any_jump",
    ),
    Breakage(
        "prediction-analytic-factor",
        "diffusion_jax/prediction.py",
        "total = prev_level.sigma**2 * gone + c0**2 * known",
        "total = prev_level.sigma**2 * gone + c0 * known",
        "tests/mathematics/test_variances.py::test_every_kind_over_any_jump",
    ),
    Breakage(
        "prediction-range-turned-round",
        "diffusion_jax/prediction.py",
        "mixed = share * large + (1 - share) * jnp.where(last, end, small)",
        "mixed = (1 - share) * large + share * jnp.where(last, end, small)",
        "tests/mathematics/test_variances.py::test_step_to_data",
    ),
    # weightings
    Breakage(
        "weightings-p2-without-logarithm",
        "diffusion_jax/weightings.py",
        "jnp.logaddexp(math.log(k), logsnr))",
        "jnp.logaddexp(k, logsnr))",
        "tests/mathematics/test_weightings.py::test_weighting_is_the_papers",
    ),
    Breakage(
        "weightings-slope-of-a-step",
        "diffusion_jax/weightings.py",
        "return -last_time(schedule) * change",
        "return -change",
        "tests/mathematics/test_weightings.py::test_slope_of_an_interpolated_chain",
    ),
    Breakage(
        "weightings-default-gamma",
        "diffusion_jax/weightings.py",
        "def min_snr(*, gamma: float = 5.0)",
        "def min_snr(*, gamma: float = 1.0)",
        "tests/mathematics/test_weightings.py::test_weighting_is_the_papers",
    ),
    # timesteps
    Breakage(
        "timesteps-spread-over-the-part",
        "diffusion_jax/timesteps.py",
        "u = _draw(key) + position / batch_size",
        "u = _draw(key) + position / len(position)",
        "tests/mathematics/test_timesteps.py::test_cuts_of_a_batch_draw_what_it_draws",
    ),
    Breakage(
        "timesteps-odd-half",
        "diffusion_jax/timesteps.py",
        "half = (batch_size + 1) // 2",
        "half = batch_size // 2",
        "tests/mathematics/test_timesteps.py::test_antithetic_numbers_come_in_pairs",
    ),
    Breakage(
        "timesteps-history-one-less",
        "diffusion_jax/timesteps.py",
        "last = nth >= added.at[row]",
        "last = nth > added.at[row]",
        "tests/mathematics/test_timesteps.py::test_history_keeps_the_last_losses",
    ),
    Breakage(
        "timesteps-unlikely-drawn",
        "diffusion_jax/timesteps.py",
        'index = jnp.searchsorted(up_to, u * up_to[-1], side="right")',
        'index = jnp.searchsorted(up_to, u * up_to[-1], side="left")',
        "tests/mathematics/test_timesteps.py::test_importance_in_float32",
    ),
    # sde
    Breakage(
        "sde-prior-of-vanishing-noise",
        "diffusion_jax/sde.py",
        "std = jnp.maximum(1.0, level.like(x).sigma)",
        "std = level.like(x).sigma",
        "tests/mathematics/test_sde.py::test_prior_is_a_normal_density",
    ),
    Breakage(
        "sde-flow-with-the-whole-score",
        "diffusion_jax/sde.py",
        "return _field(denoise, schedule, 0.5)",
        "return _field(denoise, schedule, 1.0)",
        "tests/mathematics/test_sde.py::test_both_equations_move_the_exact_marginals",
    ),
    Breakage(
        "sde-check-of-all",
        "diffusion_jax/sde.py",
        "and np.any(level.sigma == 0):",
        "and np.all(level.sigma == 0):",
        "tests/mathematics/test_refusals.py::test_bad_input_is_refused",
    ),
    # losses
    Breakage(
        "losses-last-bin-on-one-side",
        "diffusion_jax/losses.py",
        "upper = jnp.where(side * x0 > 0.999, 1.0, upper)",
        "upper = jnp.where(x0 > 0.999, 1.0, upper)",
        "tests/mathematics/test_losses.py::test_decoder_of_every_bin",
    ),
    Breakage(
        "losses-simple-without-gradient",
        "diffusion_jax/losses.py",
        "return _mean(jnp.square(guess - truth))",
        "return _mean(jnp.square(jax.lax.stop_gradient(guess) - truth))",
        "tests/mathematics/test_transforms.py::test_all_ways_equal_eager_and_gradients_are_slopes[losses.simple]",
    ),
    Breakage(
        "losses-simple-of-the-whole-batch",
        "diffusion_jax/losses.py",
        "return _mean(jnp.square(guess - truth))",
        "return _mean(jnp.square(guess - guess.mean(0, keepdims=True) - truth))",
        "tests/mathematics/test_transforms.py::test_all_ways_equal_eager_and_gradients_are_slopes[losses.simple]",
    ),
    Breakage(
        "losses-hybrid-without-T",
        "diffusion_jax/losses.py",
        "return rest + scale * num_steps(schedule) * term",
        "return rest + scale * term",
        "tests/mathematics/test_objectives.py"
        "::test_the_hybrid_loss_teaches_mean_and_variance_apart",
    ),
    Breakage(
        "losses-hybrid-teaches-the-mean",
        "diffusion_jax/losses.py",
        "mean = jax.lax.stop_gradient((pred.x0, pred.eps))",
        "mean = (pred.x0, pred.eps)",
        "tests/mathematics/test_objectives.py"
        "::test_the_hybrid_loss_teaches_mean_and_variance_apart",
    ),
    # grids
    Breakage(
        "grids-more-noise-to-begin-with",
        "diffusion_jax/grids.py",
        "MOST_NOISE = 200.0",
        "MOST_NOISE = 2000.0",
        "tests/mathematics/test_grids.py::test_the_first_time_is_one_at_which_steps_do_something",
    ),
    Breakage(
        "grids-one-time-twice",
        "diffusion_jax/grids.py",
        "rising = np.clip(np.maximum.accumulate(rising), None, "
        "times.max() - index[-1])",
        "rising = np.maximum.accumulate(rising)",
        "tests/mathematics/test_grids.py::test_every_number_of_steps_of_a_discrete_schedule",
    ),
    Breakage(
        "grids-in-single-precision",
        "diffusion_jax/grids.py",
        "with jax.ensure_compile_time_eval(), jax.enable_x64(True):\n"
        "        level = schedule(np.array([first_time, end]))",
        "with jax.ensure_compile_time_eval():\n"
        "        level = schedule(np.array([first_time, end]))",
        "tests/mathematics/test_grids.py::test_a_grid_is_the_same_under_jit_and_in_any_precision",
    ),
    # guidance
    Breakage(
        "guidance-towards-no-label",
        "diffusion_jax/guidance.py",
        "_beside(labels, nulls))",
        "_beside(nulls, labels))",
        "tests/mathematics/test_guidance.py"
        "::test_scale_1_is_conditional_to_the_last_bit_and_scale_0_unconditional",
    ),
    Breakage(
        "guidance-lower-end-in",
        "diffusion_jax/guidance.py",
        "return (low < noise) & (noise <= high)",
        "return (low <= noise) & (noise <= high)",
        "tests/mathematics/test_guidance.py::test_within_is_an_interval_of_sigma_over_alpha",
    ),
    Breakage(
        "guidance-clip-keeps-eps",
        "diffusion_jax/guidance.py",
        "return pred._replace(x0=x0, eps=(x_t - level.alpha * x0) / level.sigma)",
        "return pred._replace(x0=x0, eps=pred.eps - push)",
        "tests/mathematics/test_guidance.py::test_a_classifier_may_clip_after_its_guidance",
    ),
    # analytic
    Breakage(
        "analytic-one-noise-for-all-times",
        "diffusion_jax/analytic.py",
        "own = jax.vmap(jax.random.fold_in, (0, None))(keys, t)",
        "own = keys",
        "tests/mathematics/test_analytic.py::test_every_time_and_image_has_noise_of_its_own",
    ),
    Breakage(
        "analytic-bound-not-squared",
        "diffusion_jax/analytic.py",
        "jnp.minimum(most, half_range**2)",
        "jnp.minimum(most, half_range)",
        "tests/mathematics/test_analytic.py::test_bounded",
    ),
    # samplers
    Breakage(
        "samplers-noise-of-the-start-again",
        "diffusion_jax/samplers.py",
        "new = sampler.step(fold(keys, index + 1), x_t, memory, t, s)",
        "new = sampler.step(fold(keys, index), x_t, memory, t, s)",
        "tests/mathematics/test_samplers.py::test_noise_of_every_step_and_example_is_its_own",
    ),
    Breakage(
        "samplers-every-batch-the-first",
        "diffusion_jax/samplers.py",
        "(None, 0))(key, first + jnp.arange(count))",
        "(None, 0))(key, jnp.arange(count))",
        "tests/mathematics/test_samplers.py::test_example_depends_on_key_and_index_alone",
    ),
    Breakage(
        "samplers-eta-not-squared",
        "diffusion_jax/samplers.py",
        "share = eta**2 * -jnp.expm1(level.logsnr - prev.logsnr)",
        "share = eta * -jnp.expm1(level.logsnr - prev.logsnr)",
        "tests/mathematics/test_scheduler_parity.py::test_path_is_that_of_diffusers",
    ),
    # solvers
    Breakage(
        "solvers-third-order-to-the-end",
        "diffusion_jax/solvers.py",
        "bend = jnp.where(past.left > 2, first - older, 0)",
        "bend = jnp.where(past.left > 1, first - older, 0)",
        "tests/mathematics/test_scheduler_parity.py"
        "::test_third_order_integrates_the_parabola_through_three_outputs",
    ),
    Breakage(
        "solvers-churn-without-limit",
        "diffusion_jax/solvers.py",
        "return jnp.asarray(share.clip(None, np.sqrt(2) - 1), jnp.result_type(float))",
        "return jnp.asarray(share, jnp.result_type(float))",
        "tests/mathematics/test_scheduler_parity.py::test_edm_is_algorithm_2",
    ),
    Breakage(
        "solvers-slope-of-even-steps",
        "diffusion_jax/solvers.py",
        "first = (x0 - past.outputs[0]) / ratio",
        "first = x0 - past.outputs[0]",
        "tests/mathematics/test_scheduler_parity.py"
        "::test_third_order_integrates_the_parabola_through_three_outputs",
    ),
    # langevin
    Breakage(
        "langevin-size-of-the-step-before",
        "diffusion_jax/langevin.py",
        "after = schedule(jnp.maximum(2 * s - t, 0))",
        "prev, after = level, prev",
        "tests/mathematics/test_langevin.py::test_corrector_moves_by_the_signal_to_noise_ratio",
    ),
    Breakage(
        "solvers-slope-from-pure-noise",
        "diffusion_jax/solvers.py",
        "finite = (prev.sigma > 0) & (level.logsnr >= PURE_NOISE)",
        "finite = prev.sigma > 0",
        "tests/mathematics/test_rules_moments.py::test_samples_have_the_weights_means_and_covariance_of_a_mixture[heun-jsd]",
    ),
    Breakage(
        "samplers-start-of-its-own-type",
        "diffusion_jax/samplers.py",
        "start = None if start is None else real_data(start)",
        "start = start",
        "tests/mathematics/test_types.py",
    ),
    Breakage(
        "langevin-half-the-step",
        "diffusion_jax/langevin.py",
        "share = 2 * snr**2 * jnp.exp(2 * (prev.log_alpha - after.log_alpha))",
        "share = snr**2 * jnp.exp(2 * (prev.log_alpha - after.log_alpha))",
        "tests/mathematics/test_langevin.py::test_corrector_moves_by_the_signal_to_noise_ratio",
    ),
    Breakage(
        "langevin-noise-of-the-predictor-again",
        "diffusion_jax/langevin.py",
        "return _move(fold(keys, index + 1), x, score, share)",
        "return _move(keys, x, score, share)",
        "tests/mathematics/test_langevin.py::test_corrector_moves_by_the_signal_to_noise_ratio",
    ),
    Breakage(
        "langevin-noise-in-the-last-step",
        "diffusion_jax/langevin.py",
        "return mean + jnp.where(prev.sigma > 0, b, 0.0) * noise",
        "return mean + b * noise",
        "tests/mathematics/test_langevin.py::test_the_step_to_data_has_no_noise",
    ),
    # ode
    Breakage(
        "ode-first-evaluation-forgotten",
        "diffusion_jax/ode.py",
        "jnp.where(steps > 0, 1 + STAGES * steps, 0)",
        "jnp.where(steps > 0, STAGES * steps, 0)",
        "tests/mathematics/test_ode.py::test_evaluations_are_counted_and_none_is_needless",
    ),
    Breakage(
        "ode-half-solved-is-solved",
        "diffusion_jax/ode.py",
        "end = jax.tree.map(lambda y: jnp.where(widened(failed, y), jnp.nan, y), end)",
        "end",
        "tests/mathematics/test_ode.py::test_the_limit_of_steps_is_never_silent",
    ),
    # likelihood
    Breakage(
        "likelihood-rate-one-step-early",
        "diffusion_jax/likelihood.py",
        "above = np.concatenate([[0.0], np.cumsum(terms[:0:-1])])",
        "above = np.cumsum(terms[::-1])",
        "tests/mathematics/test_likelihood.py::test_rate_is_what_was_received_before_the_estimate",
    ),
    Breakage(
        "likelihood-noise-of-half-a-bin",
        "diffusion_jax/likelihood.py",
        "noise = (draw(samplers.fold(keys, 0)) - 0.5) / 127.5",
        "noise = (draw(samplers.fold(keys, 0)) - 0.5) / 255",
        "tests/mathematics/test_ode_likelihood.py::test_bits_are_those_of_the_dequantised_images",
    ),
    Breakage(
        "likelihood-one-noise-for-all-times",
        "diffusion_jax/likelihood.py",
        "eps = gaussian.normal(samplers.fold(keys, t), x0.shape)",
        "eps = gaussian.normal(keys, x0.shape)",
        "tests/mathematics/test_likelihood.py::test_bound_and_terms_equal_plain_numpy",
    ),
    # editing
    Breakage(
        "editing-known-part-noised-at-the-end",
        "diffusion_jax/editing.py",
        "given = jnp.where(s > 0, noised, known)",
        "given = noised",
        "tests/mathematics/test_editing.py::test_known_pixels_come_out_where_data_keep_some_noise",
    ),
    Breakage(
        "editing-noise-of-the-rule-again",
        "diffusion_jax/editing.py",
        "noise = gaussian.normal(samplers.fold(keys, KNOWN), x_t.shape)",
        "noise = gaussian.normal(keys, x_t.shape)",
        "tests/mathematics/test_editing.py::test_the_known_part_has_noise_of_its_own",
    ),
    Breakage(
        "editing-last-stretch-once",
        "diffusion_jax/editing.py",
        "for end in range(steps - 1, jump - 1, -jump):",
        "for end in range(steps - 1, jump, -jump):",
        "tests/mathematics/test_editing.py::test_a_repainting_grid_walks_each_stretch_as_often",
    ),
    Breakage(
        "latents-noise-has-no-variance",
        "diffusion_jax/latents.py",
        ".sum(axis=0) + extra.sum(axis=0)",
        ".sum(axis=0)",
        "tests/mathematics/test_latents.py"
        "::test_scaled_latents_have_mean_0_and_variance_1_whatever_the_batches",
    ),
    Breakage(
        "latents-shift-after-the-scale",
        "diffusion_jax/latents.py",
        "return z / scale + shift",
        "return (z + shift) / scale",
        "tests/mathematics/test_latents.py"
        "::test_inverting_and_applying_are_each_other_and_variances_follow",
    ),
    Breakage(
        "latents-entropy-forgotten",
        "diffusion_jax/latents.py",
        "rate = share * (of_latents - entropy / math.log(2))",
        "rate = share * of_latents",
        "tests/mathematics/test_latents.py"
        "::test_the_bound_of_images_is_exact_where_all_is_linear_and_gaussian",
    ),
    Breakage(
        "autoencoding-logarithm-halved",
        "diffusion_jax/autoencoding.py",
        "total = _sum(error * jnp.exp(-s) + s)",
        "total = _sum(error * jnp.exp(-s) + 0.5 * s)",
        "tests/mathematics/test_autoencoding.py"
        "::test_a_learned_scalar_ends_at_the_log_of_the_mean_error",
    ),
    Breakage(
        "autoencoding-free-bits-the-other-way",
        "diffusion_jax/autoencoding.py",
        "enough = channels.mean(axis=0, keepdims=True) >= free",
        "enough = channels.mean(axis=0, keepdims=True) < free",
        "tests/mathematics/test_autoencoding.py"
        "::test_free_bits_cost_nothing_until_they_are_used",
    ),
    Breakage(
        "losses-density-of-another-variance",
        "diffusion_jax/losses.py",
        "decoder_variance = jnp.square(schedule(1).sigma)",
        "decoder_variance = schedule(1).sigma",
        "tests/mathematics/test_latents.py"
        "::test_the_bound_of_images_is_exact_where_all_is_linear_and_gaussian",
    ),
    # distillation
    Breakage(
        "distillation-tangent-turned-round",
        "diffusion_jax/distillation.py",
        "return jax.lax.stop_gradient(fixed - warmup * moving)",
        "return jax.lax.stop_gradient(warmup * moving - fixed)",
        "tests/mathematics/test_distillation.py"
        "::test_the_consistency_function_has_no_tangent[cosine]",
    ),
    Breakage(
        "distillation-gradient-through-the-tangent",
        "diffusion_jax/distillation.py",
        "step = jax.lax.stop_gradient(tangent / widened(size + floor, tangent))",
        "step = tangent / widened(size + floor, tangent)",
        "tests/mathematics/test_distillation.py"
        "::test_gradients_are_of_the_network_alone",
    ),
    Breakage(
        "distillation-gradient-of-the-target",
        "diffusion_jax/distillation.py",
        "turned - jax.lax.stop_gradient(turned) - step",
        "turned - turned - step",
        "tests/mathematics/test_distillation.py"
        "::test_gradients_are_of_the_network_alone",
    ),
    Breakage(
        "distillation-weight-of-the-noise",
        "diffusion_jax/distillation.py",
        "jnp.exp(jnp.maximum(level.logsnr, 0))",
        "jnp.exp(jnp.maximum(-level.logsnr, 0))",
        "tests/mathematics/test_distillation.py"
        "::test_two_steps_of_ddim_end_where_one_to_their_x0_does[cosine]",
    ),
    # jumps
    Breakage(
        "jumps-the-noise-of-t",
        "diffusion_jax/jumps.py",
        "return Step(gaussian.q_sample(x0, noise, schedule(s)), memory, x0)",
        "return Step(gaussian.q_sample(x0, noise, schedule(t)), memory, x0)",
        "tests/mathematics/test_distillation.py"
        "::test_consistency_sampling_ends_in_the_data_for_any_number_of_steps",
    ),
    Breakage(
        "jumps-without-a-span",
        "diffusion_jax/jumps.py",
        "pred = denoise(x_t, t, s)",
        "pred = denoise(x_t, t, t)",
        "tests/mathematics/test_distillation.py"
        "::test_mean_velocities_satisfy_mean_flow_and_jump_to_the_end",
    ),
]
