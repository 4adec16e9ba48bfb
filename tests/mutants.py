"""python -m tests.mutants [WORD]: checks that a test catches each known mistake.

Each mutant is a small patch to a copy of the tree, with the fastest test that should fail on it. The tests
must first pass on the unpatched copy, and a mutant that cannot be imported does not count as caught.
"""

import concurrent.futures
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
IMPORTS = "tests/test_mutant_imports.py"  # in the copy: imports the patched module
AT_ONCE = 2  # each mostly waits for single-threaded compilation


class Mutant(NamedTuple):
    """A mistake: in `file` of the package, `old` (which occurs once) becomes `new`; `test` must fail."""

    mistake: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    # those that come first of their room are in CI: the fastest ones
    Mutant(
        "a process that differs from process 0 is not noticed",
        "training/processes.py",
        "        if changed:",
        "        if False:",
        "tests/run/test_processes.py::test_process_with_other_facts_is_named",
    ),
    Mutant(
        "a best rate at the edge of its grid is a result",
        "studies/grid.py",
        "elif beyond := _beyond(rates, name, losses):",
        "elif beyond := None:",
        "tests/studies/test_grid.py::test_grid_stops_growing_and_says_so",
    ),
    Mutant(
        "losses are paired by their order, not by seed",
        "studies/results.py",
        "[losses[seed] - reference[seed] for seed in losses.keys() & reference.keys()]",
        "[a - b for a, b in zip(losses.values(), reference.values(), strict=False)]",
        "tests/studies/test_results.py::test_single_pair_has_no_interval_and_diverged_runs_are_no_pairs",
    ),
    Mutant(
        "positions that do not restart with a document",
        "model/llama.py",
        "    return index - starts,",
        "    return index,",
        "tests/model/test_llama.py::test_positions_restart_and_attention_stays_within_each_document",
    ),
    Mutant(
        "a lock whose file was removed during the wait",
        "storage/lock.py",
        "            if not _is_at(file, lock.fileno()):",
        "            if False:",
        "tests/storage/test_lock.py::test_waiters_exclude_each_other_after_the_holder_removed_the_file",
    ),
    Mutant(
        "A is zero at wrap, like B: no gradient until the first merge",
        "core/low_rank.py",
        "            a = draw.layers(draw.DRAWS[frozen_a], key, a_shape, layer.param_dtype)",
        "            a = jnp.zeros(a_shape, layer.param_dtype)",
        "tests/core/test_low_rank.py::test_b_has_a_gradient_at_the_first_update_and_a_from_the_second",
    ),
    Mutant(
        "waiting for data counts although the devices still compute",
        "run/goodput.py",
        "min(max(self._devices.idle_since() - began, 0.0), waited_s)",
        "0.0",
        "tests/run/test_goodput.py::test_waiting_for_data_counts_only_while_the_devices_wait_too",
    ),
    Mutant(
        "updates that are done again after a kill count as kept",
        "run/goodput.py",
        'row in (*kept, *train_rows) if row["update"] <= restored_update]',
        "row in (*kept, *train_rows)]",
        "tests/run/test_goodput.py::test_updates_after_the_newest_checkpoint_are_redone",
    ),
    Mutant(
        "nested compilations count twice",
        "run/goodput.py",
        "[span for span in self._spans if span[0] < start]",
        "self._spans",
        "tests/run/test_goodput.py::test_compilation_is_charged_to_itself_wherever_it_is",
    ),
    Mutant(
        "a long evaluation is reported as a stall",
        "run/stall.py",
        '        if cause in (UPDATES, "data"):\n            usual',
        "        if True:\n            usual",
        "tests/run/test_stall.py::test_evaluation_is_measured_by_the_longest_one_before",
    ),
    Mutant(
        "an unrolled loop of a plan counts twice",
        "planning/hlo.py",
        "    return step or 1",
        "    return 1",
        "tests/planning/test_hlo.py::test_unrolled_loop_runs_less_often",
    ),
    Mutant(
        "activations are not kept on their rows on a mesh",
        "model/rows.py",
        "    return math.prod(",
        "    return 1 or math.prod(",
        "tests/training/test_collectives.py::test_no_device_holds_an_activation_of_the_global_batch"
        "[update-(1, 8, 1)]",
    ),
    Mutant(
        "each device looks up its part of the embedding for all rows of the mesh",
        "model/rows.py",
        "    if _sharing_devices() == 1:",
        "    if True:",
        "tests/training/test_collectives.py::test_no_device_holds_an_activation_of_the_global_batch"
        "[update-(1, 8, 1)]",
    ),
    Mutant(
        "whole kernels in a restart on a mesh",
        "training/sharding.py",
        "spec(axes_of(leaf), leaf.shape, **_split_sizes(mesh))",
        "PartitionSpec()",
        "tests/training/test_collectives.py::test_restart_holds_no_whole_kernel_on_any_device[(1, 8, 1)]",
    ),
    Mutant(
        "a checkpoint with the padding of the mesh",
        "training/program.py",
        "        return _resized(state, self.low_rank if is_low_rank(state) else self.full_rank)",
        "        return state",
        "tests/training/test_meshes.py::test_saved_and_restored_state_is_bitwise_the_same_on_a_padded_mesh",
    ),
    Mutant(
        "steps that take the padding of the mesh for weights",
        "training/sharding.py",
        "            cut = [unpadded(arg, to) for arg, to in zip(args, like, strict=False)]",
        "            cut = args[: len(like)]",
        "tests/training/test_meshes.py::test_run_with_restarts_is_the_same_on_any_mesh[mesh3]",
    ),
    Mutant(
        "padding of the mesh that is not zero",
        "training/sharding.py",
        "        return leaf.replace(jnp.pad(leaf.get_value(), widths))",
        '        return leaf.replace(jnp.pad(leaf.get_value(), widths, mode="edge"))',
        "tests/training/test_meshes.py::test_run_with_restarts_is_the_same_on_any_mesh[mesh3]",
    ),
    Mutant(
        "tensor does not split on a mesh",
        "training/sharding.py",
        '            parts[split[0]] = "tensor"',
        "            pass",
        "tests/training/test_sharding.py::test_tensor_splits_heads_mlp_and_vocabulary_on_top_of_fsdp",
    ),
    Mutant(
        "a mesh that splits heads in parts",
        "validate.py",
        "    if heads % mesh.tensor or kv_heads % mesh.tensor:",
        "    if heads % mesh.tensor:",
        "tests/test_config.py::test_tensor_must_divide_key_value_heads_too",
    ),
    Mutant(
        "a merge without the scale",
        "core/merge.py",
        "        step = delta(a[layer], b[layer], scale)",
        "        step = delta(a[layer], b[layer], 1.0)",
        "tests/core/test_low_rank.py::test_merge_and_reinit_leaves_the_function_unchanged",
    ),
    Mutant(
        "a restart that redraws A without merging",
        "core/merge.py",
        "        w = {name: part.at[layer].set(merged[name]) for name, part in w.items()}\n        return",
        "        return",
        "tests/core/test_low_rank.py::test_merge_and_reinit_leaves_the_function_unchanged",
    ),
    Mutant(
        "scaled kernels rounded to nearest at merges",
        "core/base.py",
        "noise = jax.random.uniform(key, w.shape)",
        "noise = 0.5",
        "tests/core/test_base.py::test_merges_round_to_a_neighbor_and_are_unbiased",
    ),
    Mutant(
        "dx of an 8-bit product without the kernel's scales",
        "core/base.py",
        "scaled = dy * _per_output(stored, dy.ndim)",
        "scaled = dy.astype(jnp.float32)",
        "tests/core/test_base.py::test_product_and_dx_are_those_of_values_in_8_bits",
    ),
    Mutant(
        "a weight rounded beyond the range of float8",
        "core/base.py",
        "return jnp.minimum(steps * spacing, self.largest)",
        "return (steps * spacing)",
        "tests/core/test_base.py::test_largest_value_stays_whatever_the_noise",
    ),
    Mutant(
        "subnormal float8 rounded in the spacing of normal ones",
        "core/base.py",
        "jnp.maximum(exponent - 1, -6) - 3",
        "exponent - 4",
        "tests/core/test_base.py::test_merges_round_to_a_neighbor_and_are_unbiased",
    ),
    Mutant(
        "a scale for the whole kernel",
        "core/base.py",
        "return jnp.max(jnp.abs(w), axis=-2, keepdims=True)",
        "return jnp.broadcast_to(jnp.max(jnp.abs(w)), (*w.shape[:-2], 1, w.shape[-1]))",
        "tests/core/test_base.py::test_w_is_stored_as_the_nearest_value_of_the_type",
    ),
    Mutant(
        "directions of quantization count as rank",
        "core/base.py",
        "        return above - below",
        "        return super().spacing(w)",
        "tests/reporting/test_spectrum.py::test_rounding_bound_holds_and_is_tight",
    ),
    Mutant(
        "a merge that leaves the master as it was",
        "core/merge.py",
        "            master = lax.dynamic_update_index_in_dim(master, exact, layer, axis=0)\n",
        "",
        "tests/core/test_base.py::test_master_of_100_restarts_equals_a_float32_kernel_bit_for_bit",
    ),
    Mutant(
        "a merge into the rounded kernel beside a master",
        "core/merge.py",
        "            merged = base.store(exact)\n",
        "            merged = base.merge({n: p[layer] for n, p in w.items()}, step, rounding_key)\n",
        "tests/core/test_base.py::test_master_of_100_restarts_equals_a_float32_kernel_bit_for_bit",
    ),
    Mutant(
        "the master is an argument of updates",
        "training/state.py",
        "return dataclasses.replace(state, master={})",
        "return state",
        "tests/training/test_base_types.py::test_master_is_on_the_host_and_no_part_of_updates",
    ),
    Mutant(
        "the master takes memory of the devices",
        "training/sharding.py",
        'memory = "pinned_host" if isinstance(leaf, BaseMaster) else None',
        "memory = None",
        "tests/training/test_base_types.py::test_master_is_on_the_host_and_no_part_of_updates",
    ),
    Mutant(
        "a merge that does not redraw A",
        "core/merge.py",
        "return w, a.at[layer].set(fresh), master",
        "return w, a, master",
        "tests/core/test_low_rank.py::test_a_is_uniform_and_redrawn_for_each_kernel_layer_and_restart",
    ),
    Mutant(
        "a merge that leaves B as it was",
        "core/low_rank.py",
        "= a, jnp.zeros_like(b)",
        "= a, b",
        "tests/core/test_low_rank.py::test_merge_and_reinit_leaves_the_function_unchanged",
    ),
    Mutant(
        "a merge into bfloat16 that rounds to nearest",
        "core/base.py",
        'return {"kernel": round_stochastically(w, key)}',
        "return self.store(w)",
        "tests/core/test_low_rank.py::test_merges_into_bfloat16_are_unbiased",
    ),
    Mutant(
        "muon is Adam for stacked kernels",
        "training/optimizers.py",
        "leaf.ndim == 3 and not _is_vector(leaf)",
        "leaf.ndim == 2 and not _is_vector(leaf)",
        "tests/training/test_optimizers.py::test_updates_of_each_layer_are_those_of_the_paper[muon]",
    ),
    Mutant(
        "muon orthogonalizes all layers as one matrix",
        "training/optimizers.py",
        "reduction_axis=1, output_axis=2",
        "reduction_axis=(0, 1), output_axis=2",
        "tests/training/test_optimizers.py::test_updates_of_each_layer_are_those_of_the_paper[muon]",
    ),
    Mutant(
        "galore never seeks its subspace again",
        "training/optimizers.py",
        "int(self.rank), int(self.updates)",
        "int(self.rank), 10**9",
        "tests/training/test_optimizers.py::test_galore_seeks_its_subspace_again",
    ),
    Mutant(
        "scale divides rows by their RMS",
        "training/optimizers.py",
        "axis=-2, keepdims",
        "axis=-1, keepdims",
        "tests/training/test_optimizers.py::test_updates_of_each_layer_are_those_of_the_paper[scale]",
    ),
    Mutant(
        "the kernels' own rate does not scale their decay",
        "training/optimizer.py",
        "chain(rest, *decay, *of_kernels,",
        "chain(rest, *of_kernels, *decay,",
        "tests/training/test_oracle.py::test_run_in_float64_equals_oracle[kernels at a third, decayed]",
    ),
    Mutant(
        "scale has no momentum for a tied head",
        "training/optimizers.py",
        "(HEAD if has_head else EMBEDDING)",
        "HEAD",
        "tests/training/test_optimizers.py::test_scale_takes_a_tied_embedding_as_the_head",
    ),
    Mutant(
        "a loss spike is measured from the loss after the restart",
        "reporting/restarts.py",
        "if start - BEFORE * cycle < update <= start]",
        "if start < update <= start + BEFORE * cycle]",
        "tests/reporting/test_restarts.py::test_spike_has_the_height_and_length_that_it_was_built_with",
    ),
    Mutant(
        "activations are averaged in half precision",
        "reporting/landscape.py",
        "np.asarray(program.hidden_states(model, batch), np.float32)",
        "np.asarray(program.hidden_states(model, batch))",
        "tests/reporting/test_landscape.py::test_activations_in_half_precision_are_compared_in_single",
    ),
    Mutant(
        "the line between two models leads away from the second",
        "reporting/landscape.py",
        "_combined(-1.0, second, first), BETWEEN",
        "_combined(-1.0, first, second), BETWEEN",
        "tests/reporting/test_landscape.py::test_line_begins_at_the_first_model_and_ends_at_the_second",
    ),
    Mutant(
        "a direction ignores how large each column is",
        "reporting/landscape.py",
        "axis=axis, keepdims=True) for array",
        "keepdims=True) for array",
        "tests/reporting/test_landscape.py::test_direction_has_the_norm_of_the_weights_column_by_column",
    ),
    Mutant(
        "activations are not centered",
        "reporting/landscape.py",
        "of - of.mean(axis=1, keepdims=True)",
        "of",
        "tests/reporting/test_landscape.py::test_cka_is_that_of_the_definition_and_ignores_rotations",
    ),
    Mutant(
        "spectra of weights leave out the live factors",
        "reporting/spectrum.py",
        "for w in variables.merged_layers(names.kernel_of(layer))",
        "for w in variables[names.kernel_of(layer)]",
        "tests/reporting/test_pair.py::test_spectra_of_weights_are_those_of_the_merged_kernels",
    ),
    Mutant(
        "the ledger compares the logits after a restart with themselves",
        "training/ledger.py",
        "jnp.abs(after.logits - before.logits)",
        "jnp.abs(after.logits - after.logits)",
        "tests/run/test_restarts.py::test_lost_merge_shows_in_the_logits",
    ),
    Mutant(
        "moments that were 0 before count as cleared",
        "training/ledger.py",
        "1 - after.moments / before.moments",
        "1 - 0 * after.moments / before.moments",
        "tests/run/test_restarts.py::test_reset_that_clears_nothing_shows",
    ),
    Mutant(
        "the norm of what is merged is without its scale",
        "training/ledger.py",
        "f.scale * _singular_values(f.a_gram, f.b_gram)",
        "_singular_values(f.a_gram, f.b_gram)",
        "tests/run/test_restarts.py::test_norm_and_effective_rank_are_those_of_what_was_merged[one_sided]",
    ),
    Mutant(
        "the overlap is with the first merge",
        "run/restarts.py",
        "self._read(u - relora.cycle_updates // relora.merges_per_cycle)",
        "self._read(0)",
        "tests/run/test_restarts.py::test_spaces_of_the_merge_before_are_read_from_its_file",
    ),
    Mutant(
        "factors without a gradient are never named",
        "run/restarts.py",
        "            self._raised = True\n            self._warn(u - QUIET_UPDATES, quiet, state)",
        "            self._raised = True",
        "tests/run/test_restarts.py::test_factors_without_a_gradient_are_named_once[merge_and_reinit_late-True]",
    ),
    Mutant(
        "layers of a frozen A are drawn in one batch of LAPACK calls",
        "core/draw.py",
        "jax.lax.map(lambda layer_key: draw(layer_key, (m, n), dtype), keys)",
        "jax.vmap(lambda layer_key: draw(layer_key, (m, n), dtype))(keys)",
        "tests/core/test_one_sided.py::test_layers_are_drawn_one_after_another",
    ),
    Mutant(
        "a frozen A is not read from a checkpoint's frozen part",
        "checkpoint/variables.py",
        "trained if trained in self._specs else names.frozen(path)",
        "trained",
        "tests/hf/test_exporting.py::test_frozen_a_is_exported_like_a_trained_one",
    ),
    Mutant(
        "a frozen A counts as trained",
        "shapes.py",
        "return of_b + (of_a if trains_a(config) else 0)",
        "return of_b + of_a",
        "tests/model/test_llama.py::test_counts_by_shape_equal_the_counts_of_the_variables[False-llama]",
    ),
    Mutant(
        "one_sided trains A",
        "core/low_rank.py",
        "LowRankFactor if frozen_a == draw.TRAINED else FrozenFactor",
        "LowRankFactor",
        "tests/core/test_one_sided.py::test_only_b_is_a_parameter",
    ),
    Mutant(
        "one_sided redraws A as ReLoRA does",
        "core/merge.py",
        "draw.DRAWS[frozen_a](draw_key",
        "draw.uniform(draw_key",
        "tests/core/test_one_sided.py::test_merge_keeps_the_function_draws_another_frozen_a_and_zeroes_b",
    ),
    Mutant(
        "a frozen A of variance 1/in",
        "core/draw.py",
        "/ math.sqrt(shape[1])\n",
        "/ math.sqrt(shape[0])\n",
        "tests/core/test_one_sided.py::test_normal_a_has_variance_1_over_r",
    ),
    Mutant(
        "the sign that QR prefers",
        "core/draw.py",
        " * q * signs[None]",
        " * q",
        "tests/core/test_one_sided.py::test_orthonormal_a_has_orthogonal_columns_of_equal_length_and_is_isotropic",
    ),
    Mutant(
        "the backward pass of a frozen A keeps x",
        "core/product.py",
        "    if frozen_a:\n        x = checkpoint_name",
        "    if False:\n        x = checkpoint_name",
        "tests/core/test_one_sided.py::test_backward_pass_keeps_x_times_a_and_not_x",
    ),
    Mutant(
        "the published mistake draws A at its start",
        "core/restart.py",
        "dense.lora_a[...] *= 0",
        "dense.lora_a[...] *= 1",
        "tests/core/test_one_sided.py"
        "::test_published_mistake_gives_the_factors_no_gradient_before_the_first_merge",
    ),
    Mutant(
        "the same A at every restart",
        "training/steps.py",
        "key=key(config, REINIT, state.update)",
        "key=key(config, REINIT, 0)",
        "tests/training/test_steps.py::test_restarts_draw_different_factors_for_each_update_kernel_and_layer",
    ),
    Mutant(
        "the same A in every layer",
        "core/merge.py",
        "jax.random.split(jax.random.fold_in(key, layer))",
        "jax.random.split(key)",
        "tests/training/test_steps.py::test_restarts_draw_different_factors_for_each_update_kernel_and_layer",
    ),
    Mutant(
        "a gradient of the frozen kernel, from plain autodiff of the fused product",
        "core/product.py",
        "        return _fused(x, w, a, b, base, scale, frozen_a, precision, out_sharding)\n    a = lax",
        "        return jnp.matmul(x, _fused_kernel(x.dtype, w, a, b, base, scale, precision))\n    a = lax",
        "tests/core/test_low_rank.py::test_gradient_of_a_layer_forms_no_product_shaped_like_its_kernel",
    ),
    Mutant(
        "a reset that silently matches no factor",
        "core/reset.py",
        "        if path not in shapes:\n            return leaf",
        "        if path in shapes:\n            return leaf",
        "tests/core/test_reset.py::test_reset_touches_only_factor_moments_and_keeps_exact_counts",
    ),
    Mutant(
        "a reset that also resets the other parameters",
        "core/reset.py",
        "        if path not in shapes:\n            return leaf",
        "        if path not in shapes:\n            return jax.tree.map(jnp.zeros_like, leaf)",
        "tests/core/test_reset.py::test_reset_touches_only_factor_moments_and_keeps_exact_counts",
    ),
    Mutant(
        "first and second moments pruned at different positions",
        "core/reset.py",
        "        mask = masks[path] if value.shape == shapes[path] else False",
        "        mask = _mask(value, state.prune, key) if value.shape == shapes[path] else False",
        "tests/core/test_reset.py::test_reset_touches_only_factor_moments_and_keeps_exact_counts",
    ),
    Mutant(
        "one magnitude threshold for all layers of a stacked factor",
        "core/reset.py",
        "layers = statistic.reshape(-1, math.prod(statistic.shape[-2:]))",
        "layers = statistic.reshape(1, -1)",
        "tests/core/test_reset.py::test_reset_touches_only_factor_moments_and_keeps_exact_counts",
    ),
    Mutant(
        "entries equal to the threshold are all dropped",
        "core/prune.py",
        "    return jax.vmap(lambda i: jnp.zeros(scores.shape[-1], bool).at[i].set(True))(index)",
        "    return scores > jnp.take_along_axis(scores, index, 1)[:, -1:] if count else scores < 0",
        "tests/core/test_reset.py::test_equal_moments_keep_the_lower_index",
    ),
    Mutant(
        "the count of the other parameters is reset with the factors'",
        "core/reset.py",
        "any(True for _ in moments.statistics(node, shapes))",
        "True",
        "tests/core/test_reset.py::test_reset_count_zeroes_only_the_count_of_the_factors",
    ),
    Mutant(
        "the factors' count includes the warm start",
        "training/optimizer.py",
        "if rest in itertools.pairwise(path)}",
        "}",
        "tests/training/test_steps.py::test_start_of_the_low_rank_phase_leaves_logits_and_the_rest_unchanged",
    ),
    Mutant(
        "the moments of embeddings, norms and head are lost at the start of the low-rank phase",
        "training/steps.py",
        "optimizer.carry_over_rest(tx.init(trained), state.opt_state)",
        "tx.init(trained)",
        "tests/training/test_steps.py::test_start_of_the_low_rank_phase_leaves_logits_and_the_rest_unchanged",
    ),
    Mutant(
        "weight decay on the norms",
        "training/optimizer.py",
        "[optax.add_decayed_weights(weight_decay, mask=_decays)]",
        "[optax.add_decayed_weights(weight_decay)]",
        "tests/training/test_oracle.py::test_run_in_float64_equals_oracle[magnitude]",
    ),
    Mutant(
        "clipping by the norm of each group alone",
        "training/optimizer.py",
        "with_reset(optax.chain(*clip, groups)",
        "with_reset(optax.chain(groups)",
        "tests/core/test_reset.py::test_make_optimizer_matches_adamw_in_float64",
    ),
    Mutant(
        "a due restart one update late",
        "training/steps.py",
        "    s, relora = u - config.low_rank_start, config.relora",
        "    s, relora = u - config.low_rank_start - 1, config.relora",
        "tests/training/test_steps.py::test_restarts_are_due_at_the_start_of_an_update_and_never_at_the_end_of_a_run",
    ),
    Mutant(
        "a restart in arms that never merge",
        "training/steps.py",
        '    if config.arm != "relora" or s <= 0:',
        "    if s <= 0:",
        "tests/training/test_steps.py::test_restarts_are_due_at_the_start_of_an_update_and_never_at_the_end_of_a_run",
    ),
    Mutant(
        "re-warming to the current cosine value instead of that at the end of the ramp",
        "core/schedule.py",
        "cosine(s - k + restart_warm_up,",
        "cosine(s,",
        "tests/core/test_schedule.py::test_multiplier_matches_golden_values",
    ),
    Mutant(
        "a skipped batch that does not advance the update counter",
        "training/steps.py",
        "update=state.update + 1,",
        "update=state.update + 1 - bad,",
        "tests/training/test_steps.py::test_skipped_update_changes_only_counters",
    ),
    Mutant(
        "a skipped batch that still changes the moments",
        "training/steps.py",
        "            (state.trained, state.opt_state),\n        )",
        "            (state.trained, opt_state),\n        )",
        "tests/training/test_steps.py::test_skipped_update_changes_only_counters",
    ),
    Mutant(
        "a mean of the microbatches' means",
        "training/steps.py",
        "return eval_step(model, rows)\n\n    def of",
        "n, c = eval_step(model, rows)\n        return 9 * n / c, c\n\n    def of",
        "tests/training/test_oracle.py::test_run_in_float64_equals_oracle[magnitude]",
    ),
    Mutant(
        "the same dropout mask at every update",
        "training/steps.py",
        "dropout_key = key(config, DROPOUT, state.update)",
        "dropout_key = key(config, DROPOUT, 0)",
        "tests/training/test_steps.py::test_dropout_changes_with_update_and_seed_and_is_off_in_evaluation",
    ),
    Mutant(
        "padding counted as targets",
        "model/loss.py",
        "< lengths[..., None] - 1",
        "< lengths[..., None] + 10**6",
        "tests/training/test_oracle.py::test_run_in_float64_equals_oracle[magnitude]",
    ),
    Mutant(
        "a target that does not count has a gradient",
        "model/loss.py",
        "d = jnp.where(counted[..., None], d, 0).astype(x.dtype)",
        "d = d.astype(x.dtype)",
        "tests/model/test_loss.py::test_loss_and_gradients_equal_the_reference",
    ),
    Mutant(
        "all logits exist at once",
        "model/loss.py",
        "count = min(length, -(-rows * length // CHUNK))",
        "count = 1",
        "tests/model/test_loss.py::test_logits_of_one_chunk_exist_at_once[True]",
    ),
    Mutant(
        "the head's gradient is summed in bfloat16",
        "model/loss.py",
        'dw += jnp.einsum("bld,blv->dv", x, d, preferred_element_type=wide)',
        'dw = (dw + jnp.einsum("bld,blv->dv", x, d)).astype(x.dtype).astype(wide)',
        "tests/model/test_loss.py::test_gradients_of_bfloat16_are_summed_in_float32",
    ),
    Mutant(
        "the gradients of an id that repeats are summed in bfloat16",
        "model/llama.py",
        "jnp.zeros_like(table).at[ids].add(dy.astype(table.dtype))",
        "jnp.zeros(table.shape, dy.dtype).at[ids].add(dy).astype(table.dtype)",
        "tests/model/test_llama.py::test_gradient_of_a_repeated_id_is_summed_in_float32",
    ),
    Mutant(
        "model.remat=auto is dots, whether or not it fits",
        "training/remat.py",
        "if fits(policy)), policies[-1])",
        "), policies[-1])",
        "tests/training/test_remat.py::test_first_policy_that_fits_is_chosen",
    ),
    Mutant(
        "model.remat=auto keeps everything on a GPU that does not say its memory",
        "training/remat.py",
        'if platform == "cpu" else POLICIES[:1]',
        "",
        "tests/training/test_remat.py::test_devices_that_do_not_say_their_memory_have_one_candidate",
    ),
    Mutant(
        "model.remat=auto takes a program that XLA has fitted by recomputing",
        "training/remat.py",
        ' and ".remat" not in compiled.as_text()',
        "",
        "tests/training/test_remat.py::test_program_fits_if_it_needs_no_more_than_the_limit_and_recomputes_nothing",
    ),
    Mutant(
        "processes may choose different policies for model.remat=auto",
        "training/remat.py",
        '"no" not in processes.gather("yes" if own else "no")',
        "own",
        "tests/training/test_remat.py::test_program_fits_only_if_it_does_on_every_process",
    ),
    Mutant(
        "a plan does not resolve model.remat=auto",
        "planning/arms.py",
        'if policy == "auto" and name.endswith("_update"):',
        "if False:",
        "tests/planning/test_arms.py::test_plan_chooses_the_policy_of_each_update",
    ),
    Mutant(
        "every block of queries has the mask of the first",
        "model/attention.py",
        "visible[:, start:stop, :stop]",
        "visible[:, : stop - start, :stop]",
        "tests/model/test_attention.py::test_einsum_equals_xla_at_every_length",
    ),
    Mutant(
        "splash attention attends across documents",
        "model/attention.py",
        "None if mask is None or positions is None else jnp.arange",
        "None if True else jnp.arange",
        "tests/model/test_splash.py::test_attend_passes_the_documents",
    ),
    Mutant(
        "splash attention does not scale the scores",
        "model/splash.py",
        "(q * dim**-0.5).astype(q.dtype)",
        "q",
        "tests/model/test_splash.py::test_splash_has_the_values_and_gradients_of_attention_written_out",
    ),
    Mutant(
        "the fused form rounds W before it adds the delta",
        "core/product.py",
        "(base.read(w).astype(wide) + scale",
        "(base.read(w).astype(dtype) + scale",
        "tests/core/test_low_rank.py::test_kernel_of_the_fused_form_in_bfloat16_is_rounded_once_and_keeps_the_delta",
    ),
    Mutant(
        "columns that pad the vocabulary have odds",
        "model/loss.py",
        "logits if w.shape[1] == vocab else jnp.where(is_id, logits, -jnp.inf)",
        "logits",
        "tests/model/test_loss.py::test_loss_and_gradients_equal_the_reference",
    ),
    Mutant(
        "the MLP is computed without padding",
        "model/llama.py",
        'padded(layer, "mlp", self.mlp, x.dtype)',
        "layer",
        "tests/model/test_padding.py::test_every_product_of_an_update_in_bfloat16_has_aligned_sides",
    ),
    Mutant(
        "padding changes what dropout draws",
        "core/product.py",
        "bits = tokens + columns",
        "bits = tokens + columns[..., ::-1]",
        "tests/model/test_padding.py::test_padding_changes_no_loss_gradient_or_draw",
    ),
    Mutant(
        "dropout leaves out the same columns of every token",
        "core/product.py",
        "bits = tokens + columns",
        "bits = 0 * tokens + columns",
        "tests/core/test_low_rank.py::test_dropout_is_independent_between_tokens_and_columns",
    ),
    Mutant(
        "dropout adds bits without hashing the sum",
        "core/product.py",
        "bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)",
        "bits = bits * jnp.uint32(1)",
        "tests/core/test_low_rank.py::test_dropout_is_independent_between_tokens_and_columns",
    ),
    Mutant(
        "a packed kernel is padded as if it were not",
        "model/padding.py",
        "    if to == size or not sizes <= {1, size}:",
        "    if to == size:",
        "tests/model/test_padding.py::test_layer_with_a_variable_of_another_size_stays_as_it_is",
    ),
    Mutant(
        "remat=dots computes the products of the fused form again",
        "model/llama.py",
        "jax.checkpoint_policies.save_only_these_names(PRODUCT)",
        "jax.checkpoint_policies.dots_with_no_batch_dims_saveable",
        "tests/planning/test_arms.py::test_compiled_matmul_flops_are_those_of_the_model[relora-fused-dots]",
    ),
    Mutant(
        "auto is XLA's attention on every device",
        "training/program.py",
        "_phases(_for_devices(config, mesh))",
        "_phases(config)",
        "tests/model/test_attention.py::test_programs_have_the_attention_of_their_devices",
    ),
    Mutant(
        "the last batch of an evaluation is weighted like a full one",
        "training/evaluation.py",
        "loss = math.fsum(float(nats) for nats, _ in sums) / tokens",
        "loss = math.fsum(float(nats) / int(count) for nats, count in sums) / len(sums)",
        "tests/test_evaluate.py::test_evaluation_weighs_tokens_not_batches",
    ),
    Mutant(
        "the live factors are missing from the summed update",
        "reporting/spectrum.py",
        "        total += scale * np.matmul(",
        "        np.matmul(",
        "tests/reporting/test_spectrum.py::test_live_factors_count_with_their_scale",
    ),
    Mutant(
        "documents that end with two EOS tokens",
        "data/packing.py",
        "end[int(ids[-1] == self._eos) :]",
        "end",
        "tests/data/test_packing.py::test_concatenated_rows_are_consecutive_documents_each_with_one_eos",
    ),
    Mutant(
        "padding counted as tokens of a store",
        "data/rows.py",
        "        true = np.arange(ids.shape[1]) < lengths[:, None]",
        "        true = np.arange(ids.shape[1]) < lengths[:, None] + 10**6",
        "tests/data/test_prepared.py::test_truncated_store_does_not_count_padding",
    ),
    Mutant(
        "finished blocks are prepared again after a kill",
        "data/shards.py",
        "                if number in stripe and not self._record(stripe.file, number).exists():",
        "                if number in stripe:",
        "tests/data/test_stores.py::test_killed_preparation_resumes_with_the_missing_blocks",
    ),
    Mutant(
        "a token budget that ends at the workers' progress, not at the first block in order",
        "data/stores.py",
        "            elif self._ends.get(file) == number:",
        "            elif self._ends.get(file) == number or self._train_tokens:",
        "tests/data/test_stores.py::test_ordered_blocks_are_complete_once_the_first_to_reach_the_budget_arrived",
    ),
    Mutant(
        "checkpoints are compressed",
        "checkpoint/manager.py",
        "PyTreeCheckpointHandler(use_compression=False)",
        "PyTreeCheckpointHandler()",
        "tests/checkpoint/test_manager.py::test_arrays_are_not_compressed",
    ),
    Mutant(
        "the last save is not read back",
        "checkpoint/manager.py",
        "            self._opened(self._last).verify()",
        "            self._opened(self._last)",
        "tests/checkpoint/test_manager.py::test_last_save_is_read_back_when_saving_ends",
    ),
    Mutant(
        "a save begins without a look at the one before",
        "checkpoint/manager.py",
        "                processes.together(self._opened(self._last).check_arrays, DamagedError)",
        "                pass",
        "tests/checkpoint/test_manager.py::test_save_that_did_not_become_whole_is_an_error_at_the_next_save",
    ),
    Mutant(
        "a resumed run restored into the wrong phase at W",
        "training/program.py",
        "self.low_rank if u > self.config",
        "self.low_rank if u >= self.config",
        "tests/checkpoint/test_manager.py::test_state_at_w_is_before_the_low_rank_phase",
    ),
    Mutant(
        "a resumed run that reads the data from the beginning",
        "loop.py",
        "program.rows), run.update, updates)",
        "program.rows), 0, updates)",
        "tests/run/test_resume.py::test_run_killed_repeatedly_equals_uninterrupted_bitwise",
    ),
    Mutant(
        "moments in bfloat16",
        "training/optimizer.py",
        "optax.scale_by_adam(b1, b2, eps)",
        "optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.bfloat16)",
        "tests/training/test_steps.py::test_variables_and_moments_are_float32_with_bfloat16_compute",
    ),
    Mutant(
        "a merge at the default precision",
        "core/merge.py",
        "b.astype(wide), precision=HIGHEST)",
        "b.astype(wide))",
        "tests/core/test_low_rank.py::test_every_product_of_a_merge_is_float32_at_highest_precision",
    ),
    Mutant(
        "a merge of all layers at once",
        "core/merge.py",
        "    w, a, master = lax.fori_loop(0, a.shape[0], merge_layer, (w, a, master))",
        "    one = lambda n: jax.tree.map(lambda v: v[n], merge_layer(n, (w, a, master)))\n"
        "    w, a, master = lax.map(one, jnp.arange(a.shape[0]))",
        "tests/core/test_low_rank.py::test_merge_of_350m_needs_less_than_one_float32_kernel_of_scratch",
    ),
    Mutant(
        "an unsupported optimizer is accepted and never pruned",
        "core/moments.py",
        " for name, p in entries if p not in params]",
        " for name, p in entries if False]",
        "tests/core/test_reset.py::test_unsupported_statistics_are_rejected_by_name",
    ),
    Mutant(
        "a document attends to earlier documents in its row",
        "model/llama.py",
        "segment_ids[:, :, None] == segment_ids[:, None, :]",
        "segment_ids[:, :, None] >= segment_ids[:, None, :]",
        "tests/model/test_llama.py::test_separate_documents_equal_the_oracle_of_each_one_alone",
    ),
    Mutant(
        "the first id of the next document is predicted from an EOS",
        "model/loss.py",
        "        counted &= segment_ids[..., 1:] == segment_ids[..., :-1]",
        "        pass",
        "tests/model/test_llama.py::test_separate_documents_equal_the_oracle_of_each_one_alone",
    ),
    Mutant(
        "an EOS belongs to the document after it",
        "data/batches.py",
        "    return ends.cumsum(axis=-1, dtype=np.int32) - ends",
        "    return ends.cumsum(axis=-1, dtype=np.int32)",
        "tests/data/test_batches.py::test_an_eos_belongs_to_the_document_that_it_ends",
    ),
    Mutant(
        "a document mask shifted by one id",
        "model/llama.py",
        "segment_ids[:, :-1])",
        "segment_ids[:, 1:])",
        "tests/test_evaluate.py::test_evaluation_of_separate_documents_equals_that_of_each_alone",
    ),
    Mutant(
        "top_p without the token that reaches it",
        "model/sampling.py",
        "jnp.cumsum(mass) - mass < top_p",
        "jnp.cumsum(mass) < top_p",
        "tests/model/test_sampling.py::test_draws_come_from_the_fewest_ids_that_reach_top_p",
    ),
    Mutant(
        "the same random key at every position of a sample",
        "model/sampling.py",
        "jax.vmap(jax.random.fold_in)(keys, lengths)",
        "keys",
        "tests/model/test_sampling.py::test_draws_depend_only_on_seed_number_and_position",
    ),
    Mutant(
        "an evaluation prompt that continues into another document",
        "training/eval_prompts.py",
        "[-1, *np.flatnonzero(ids == eos), len(ids)]",
        "[-1, len(ids)]",
        "tests/training/test_eval_prompts.py::test_prompts_are_the_longest_beginnings_of_the_first_rows",
    ),
    Mutant(
        "every group of samples is numbered from 0",
        "generate.py",
        "np.arange(first, first + size",
        "np.arange(size",
        "tests/test_generate.py::test_same_seed_gives_the_same_samples_for_any_n",
    ),
    Mutant(
        "a resumed run starts a new W&B run",
        "run/wandb_sink.py",
        '    if saved.get("project") != project:',
        "    if True:",
        "tests/run/test_wandb_sink.py::test_resumed_run_continues_the_same_wandb_run_and_another_starts_its_own",
    ),
    Mutant(
        "two tensors of the same name in a file: the last one is used",
        "hf/tensor_files.py",
        "    json_file.parse(path, header)  #",
        "    #",
        "tests/hf/test_tensor_files.py::test_invalid_file_is_reported_in_one_line",
    ),
    Mutant(
        "an index that points outside its directory",
        "hf/tensor_files.py",
        "isinstance(file, str) and file == os.path.basename(file) and",
        "isinstance(file, str) and",
        "tests/hf/test_tensor_files.py::test_folder_without_a_complete_model_is_reported_in_one_line",
    ),
    Mutant(
        "an import that writes every layer into the first",
        "hf/importing.py",
        "values[spec.layer]",
        "values[0]",
        "tests/hf/test_importing.py::test_every_tensor_is_imported_bit_for_bit",
    ),
    Mutant(
        "an imported weight that is NaN",
        "hf/importing.py",
        "                _check_finite(files.folder, name, tensor)\n",
        "",
        "tests/hf/test_importing.py::test_weight_that_is_not_finite_is_named_and_nothing_is_written",
    ),
    Mutant(
        "an export that loses the sliding window",
        "hf/llama.py",
        'window = {"sliding_window": model.sliding_window or None}',
        'window = {"sliding_window": None}',
        "tests/hf/test_importing.py::test_imported_family_is_exported_as_itself",
    ),
    Mutant(
        "the heads of k normalized with the weights for q",
        "model/llama.py",
        "self.k_norm(k)",
        "self.q_norm(k)",
        "tests/model/test_llama.py::test_logits_and_loss_equal_the_oracle",
    ),
    Mutant(
        "biases that do not decay",
        "training/optimizer.py",
        '"norm" not in getattr(leaf, "axes", ())',
        'not {"norm", "bias"} & {*getattr(leaf, "axes", ())}',
        "tests/core/test_reset.py::test_make_optimizer_matches_adamw_in_float64",
    ),
    Mutant(
        "llama3 scaling applied to the high frequencies instead of the low ones",
        "model/rope.py",
        "        return plain * (ramp + (1 - ramp) / self.factor)\n\n\nclass Yarn",
        "        return plain * (ramp / self.factor + (1 - ramp))\n\n\nclass Yarn",
        "tests/model/test_llama.py::test_logits_and_loss_equal_the_oracle",
    ),
    Mutant(
        "an export without the live factors",
        "checkpoint/variables.py",
        "yield np.asarray(jnp.asarray(w_l).astype(product.dtype) + product)",
        "yield np.asarray(w_l)",
        "tests/hf/test_exporting.py::test_live_factors_are_merged_as_by_unwrap",
    ),
    Mutant(
        "an adapter next to kernels that already include it",
        "hf/exporting.py",
        "for layer, array in _layers(variables, path, merged=not adapter):",
        "for layer, array in _layers(variables, path, merged=True):",
        "tests/hf/test_exporting.py::test_adapter_has_every_factor_and_leaves_base_kernels_unmerged",
    ),
    Mutant(
        "SentencePiece merges that are not in the order of their scores",
        "hf/sentencepiece_json.py",
        "return sorted(splits)",
        "return sorted(splits, reverse=True)",
        "tests/hf/test_sentencepiece_json.py::test_ids_are_equal_on_a_thousand_hard_documents",
    ),
    Mutant(
        "the name of a special piece in a text is tokenized as that piece",
        "hf/sentencepiece_json.py",
        "return piece.score if piece.type == NORMAL else least",
        "return piece.score",
        "tests/hf/test_sentencepiece_json.py::test_ids_are_equal_on_a_thousand_hard_documents",
    ),
    Mutant(
        "a converted tokenizer is written without comparing it to the original",
        "hf/tokenizer_files.py",
        "    _compare(tokenizer, model, converted)\n",
        "",
        "tests/hf/test_tokenizer_files.py::test_tokenizer_with_different_ids_is_never_written",
    ),
    Mutant(
        "pieces with equal scores are not tested next to each other",
        "hf/probes.py",
        "_next_to_symbols(model, pieces), _ties(model))",
        "_next_to_symbols(model, pieces))",
        "tests/hf/test_tokenizer_files.py::test_tied_pieces_with_different_ids_are_rejected",
    ),
    Mutant(
        "a signal stops a run without a save",
        "loop.py",
        "        if stop or self.checkpoints.due(u):",
        "        if self.checkpoints.due(u):",
        "tests/test_train.py::test_signal_postpones_an_evaluation_and_due_work_is_done_once",
    ),
    Mutant(
        "a signal waits for the end of an evaluation",
        "loop.py",
        "            yield batch\n            if self.signals.should_stop():",
        "            yield batch\n            if False:",
        "tests/test_train.py::test_signal_postpones_an_evaluation_and_due_work_is_done_once",
    ),
    Mutant(
        "a process that is not the writer still prints",
        "storage/writer.py",
        "        return stream if self.active else _Silence()",
        "        return stream",
        "tests/run/test_opening.py::test_inactive_process_computes_the_same_and_writes_only_its_shards",
    ),
    Mutant(
        "a merge between resets that prunes moments",
        "training/program.py",
        "self.restart(state, reset=due.reset)",
        "self.restart(state, reset=True)",
        "tests/training/test_oracle.py::test_run_in_float64_equals_oracle[random, two merges a cycle]",
    ),
    Mutant(
        "a custom choice without fields inherits those of its base class",
        "core/grammar.py",
        "        dataclasses.dataclass(frozen=True)(cls)",
        "        pass",
        "tests/training/test_behaviours.py::test_custom_choices_train_and_are_saved_and_restored[separate]",
    ),
    Mutant(
        "a user's mistake ends in a stack trace",
        "validate.py",
        "    except ValueError as error:\n        raise UserError(",
        "    except ValueError as error:\n        raise RuntimeError(",
        "tests/test_bad_input.py::test_wrong_setting_is_named_in_one_line[--config.model.rope_scaling=fast]",
    ),
    Mutant(
        "control pieces count as ids of a text",
        "tokenizer/sentencepiece.py",
        "if not self._model.is_control(i))",
        "if True)",
        "tests/tokenizer/test_tokenizer.py::test_trailing_control_pieces_count_only_as_special_ids",
    ),
    Mutant(
        "of several processes, only the one that got the signal stops",
        "run/signals.py",
        "        return self._stop_together\n",
        "        return self.stop_requested\n",
        "tests/run/test_processes.py::test_signal_to_one_stops_all_at_the_same_update",
    ),
    Mutant(
        "outside momentum: a known state around with_reset keeps the old factors' statistics",
        "core/moments.py",
        "        if any(p in factors or not p for p, _ in leaves(getattr(node, name))):",
        "        if False:",
        "tests/core/test_reset.py::test_reset_rejects_what_an_outer_transformation_stores_of_a_factor",
    ),
    Mutant(
        "foreign factors: the layers of nnx.LoRA count as ours",
        "core/reset.py",
        "return isinstance(leaf, LowRankFactor)",
        "return type(leaf).__name__ in ('LowRankFactor', 'LoRAParam')",
        "tests/core/test_reset.py::test_reset_leaves_the_factors_of_other_lora_layers_alone",
    ),
    Mutant(
        "hidden names that rows' key does not cover",
        "tokenizer/tokenizer.py",
        "**bos, **hidden}",
        "**bos}",
        "tests/tokenizer/test_hugging_face.py::test_rows_with_one_key_have_the_same_ids",
    ),
    Mutant(
        "eos of an imported model instead of the run's, not beside it",
        "generate.py",
        "[tokenizer.eos, *several]",
        "[*several] or [tokenizer.eos]",
        "tests/test_generate.py::test_eos_of_the_run_ends_a_sample_beside_those_of_the_model",
    ),
    Mutant(
        "eos at the last position counted as cut",
        "generate.py",
        "end == length + 1 and not ended",
        "end == length + 1",
        "tests/test_generate.py::test_sample_whose_last_possible_token_is_eos_was_not_cut",
    ),
    Mutant(
        "a plan that counts the body of a loop once",
        "planning/hlo.py",
        "trips * _trip_count(instruction, name, computations)",
        "trips",
        "tests/planning/test_hlo.py::test_costs_of_loops_count_as_often_as_they_run",
    ),
    Mutant(
        "a kernel that reads one layer of a stack counts the stack",
        "planning/kernels.py",
        "    if user.opcode in PARTS and places == [0] and size:",
        "    if False:",
        "tests/planning/test_kernels.py::test_loop_over_stacked_layers_moves_a_layer_at_a_time",
    ),
    Mutant(
        "a kernel that puts one layer into a stack counts the stack",
        "planning/kernels.py",
        "        return _bytes(shapes[instruction.operands[1]])",
        "        return _bytes(instruction.shape)",
        "tests/planning/test_kernels.py::test_loop_over_stacked_layers_moves_a_layer_at_a_time",
    ),
    Mutant(
        "a roofline of sums, not a sum of rooflines",
        "planning/kernels.py",
        "    return sum(kernel.seconds(chip) for kernel in kernels)",
        '    return Kernel("", sum(k.flops for k in kernels), sum(k.bytes for k in kernels)).seconds(chip)',
        "tests/planning/test_kernels.py::test_roofline_adds_the_slower_of_product_and_memory_of_each_kernel",
    ),
    Mutant(
        "the outermost scope of a kernel is its cause",
        "benchmark/expected.py",
        "[OTHER, *scopes][-1]",
        "[*scopes, OTHER][0]",
        "tests/benchmark/test_expected.py::test_innermost_scope_of_a_kernel_is_its_cause",
    ),
    Mutant(
        "a ratio of medians, not of the updates of a round",
        "benchmark/column.py",
        "return statistics.median(a / b for a, b in zip(self.step_s, first.step_s, strict=True))",
        "return self.median_s / first.median_s",
        "tests/benchmark/test_column.py::test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians",
    ),
    Mutant(
        "a benchmark of one column after the other",
        "benchmark/measured.py",
        "[[runner.step() for runner in runners] for _ in range(rounds)]",
        "list(zip(*[[runner.step() for _ in range(rounds)] for runner in runners]))",
        "tests/benchmark/test_measured.py::test_updates_alternate",
    ),
    Mutant(
        "a benchmark that takes the peak of an earlier column as a column's own",
        "benchmark/measured.py",
        "        runner.peak_bytes = after if after != before else None",
        "        runner.peak_bytes = after",
        "tests/benchmark/test_measured.py::"
        "test_peak_of_a_device_is_asked_after_each_runner_alone_smallest_first",
    ),
    Mutant(
        "a peer with all targets, whatever the run's are",
        "benchmark/peer.py",
        "shapes.target_kernels(config)]",
        "shapes.kernels(model)]",
        "tests/benchmark/test_peer.py::test_low_rank_arm_has_the_factors_of_the_run",
    ),
    Mutant(
        "an MFU of the low-rank phase for the warm start",
        "loop.py",
        "low_rank=u > config.low_rank_start)",
        "low_rank=u >= config.low_rank_start)",
        "tests/test_loop.py::test_train_row_has_what_the_devices_could_do_in_its_phase",
    ),
    Mutant(
        "a share of the wait for data that counts earlier rows again",
        "run/metrics.py",
        "data_s, self._waited_s = waited_s - self._waited_s, waited_s",
        "data_s = waited_s - self._waited_s",
        "tests/run/test_metrics.py::test_mfu_and_the_wait_for_data_are_shares_of_the_time_of_updates",
    ),
    Mutant(
        "a plan that counts a collective once for each computation that it spans",
        "planning/hlo.py",
        "            if kind and (identity is None or identity not in channels):",
        "            if kind:",
        "tests/planning/test_hlo.py::test_collective_that_spans_computations_counts_once",
    ),
    Mutant(
        "a plan for which a program that computes values again fits",
        "planning/arms.py",
        "    if compiled.costs is None or compiled.costs.recomputed_flops:",
        "    if compiled.costs is None:",
        "tests/planning/test_arms.py::test_recomputing_is_not_fitting",
    ),
    Mutant(
        "PyTorch recomputes where the run chooses for itself",
        "benchmark/peer.py",
        'model.remat in ("dots", "full")',
        'model.remat != "none"',
        "tests/benchmark/test_peer.py::test_pytorch_recomputes_only_where_the_run_is_set_to",
    ),
    Mutant(
        "unrolled layers keep what they should compute again",
        "model/llama.py",
        'cpus == 1 and remat in ("auto", "none")',
        "cpus == 1",
        "tests/model/test_llama.py::test_layers_are_unrolled_on_one_cpu_without_rematerialization",
    ),
]


def of_each_room() -> list[Mutant]:
    """The first mutant of each subpackage."""
    rooms = {mutant.file.rpartition("/")[0]: mutant for mutant in reversed(MUTANTS)}
    return [mutant for room, mutant in rooms.items() if room]


def main(mutants: Sequence[Mutant]) -> int:
    """Prints a line for each mutant; returns how many survived."""
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(AT_ONCE):
            copies.put(_copied(pathlib.Path(folder) / str(number)))
        unmutated = _pytest(copies.queue[0], *sorted({mutant.test for mutant in mutants}))
        if unmutated.returncode:
            print(unmutated.stdout[-4000:])
            print("the tests fail on the unpatched code: no mutant was tried")
            return 1

        def killed(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return _killed(mutant, copy)
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            survived = len(mutants) - sum(pool.map(killed, mutants))
    print(f"{len(mutants)} mutants, {survived} survived")
    return survived


def _copied(copy: pathlib.Path) -> pathlib.Path:
    """Copies the parts of the tree that the tests need."""
    for name in ("relora_jax", "tests", "configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    (copy / ".pytest_cache").symlink_to(ROOT / ".pytest_cache")  # reuses compiled programs
    return copy


def _killed(mutant: Mutant, copy: pathlib.Path) -> bool:
    """Whether the test fails on the patched copy; restores the copy afterwards."""
    path = copy / "relora_jax" / mutant.file
    code = path.read_text()
    if code.count(mutant.old) != 1:
        print(
            f"DOES NOT APPLY     {mutant.mistake}: {mutant.file} has the text {code.count(mutant.old)} times"
        )
        return False
    module = ".".join(path.relative_to(copy).with_suffix("").parts)
    (copy / IMPORTS).write_text(f"import {module}\n")  # fails early even if the test runs it in a subprocess
    path.write_text(code.replace(mutant.old, mutant.new))
    try:
        result = _pytest(copy, IMPORTS, mutant.test)
    finally:
        path.write_text(code)
    if result.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"CANNOT BE TRIED    {mutant.mistake}: {result.stdout.strip()[-500:]} {result.stderr.strip()}")
        return False
    failed = result.returncode == pytest.ExitCode.TESTS_FAILED
    name = mutant.test.rpartition("::")[2]
    print(
        f"KILLED by {name}: {mutant.mistake}" if failed else f"SURVIVED {name}: {mutant.mistake}", flush=True
    )
    return failed


def _pytest(copy: pathlib.Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in the copy, on the copy's modules."""
    args = ("-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider", *tests)
    return subprocess.run([sys.executable, "-m", "pytest", *args], cwd=copy, capture_output=True, text=True)


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.exit(main([mutant for mutant in MUTANTS if word in mutant.mistake]))
