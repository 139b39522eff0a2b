// CUDA launches of dropbp_kernels::permuted_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <optional>
#include <tuple>
#include <vector>

#include "permuted_norm_kernel.cuh"
#include "row_launch.h"

namespace dropbp {
namespace {

Permutation permutation_of(const Tensor& tensor, int64_t rows_per_entry) {
  return {input<int64_t>(tensor), tensor.numel(), rows_per_entry};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> permuted_norm(
    Tensor residual, Tensor weight, std::optional<Tensor> bias, Tensor permutation,
    int64_t num_kept, double eps, bool centered, bool gemma, ScalarType dtype) {
  check_dtype("permutation", permutation, ScalarType::Long);
  const int64_t num_entries = permutation.numel(), width = weight.numel();
  if (num_kept < 0 || num_kept > num_entries) {
    fail("num_kept: expected 0 to ", num_entries, ", got ", num_kept);
  }
  check_packed_width(residual, width);
  if (bias) {
    check_numel("bias", *bias, width);
    check_dtype("bias", *bias, weight.scalar_type());
  }
  std::vector<int64_t> sizes = sizes_of_rows(residual, num_entries, num_kept);
  int64_t rows_per_entry = 1;
  for (size_t d = 1; d + 1 < sizes.size(); ++d) rows_per_entry *= sizes[d];
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  residual = dense(residual);
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  permutation = dense(permutation);

  const int32_t wide = shim_dtype(wide_dtype(residual));
  const int64_t dim = static_cast<int64_t>(sizes.size()), none = 0;
  Tensor kept = new_tensor(sizes.data(), dim, shim_dtype(dtype), residual);
  Tensor kept_x = new_tensor(sizes.data(), dim, shim_dtype(residual), residual);
  Tensor rstd = new_tensor(sizes.data(), dim - 1, wide, residual);
  Tensor mean = centered ? new_tensor(sizes.data(), dim - 1, wide, residual)
                         : new_tensor(&none, 1, wide, residual);
  sizes[0] = num_entries - num_kept;
  Tensor dropped = new_tensor(sizes.data(), dim, shim_dtype(dtype), residual);

  visit_residual_and_branch(residual.scalar_type(), dtype, [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const R* from = input<R>(residual);
    B* first = output<B>(kept);
    B* rest = output<B>(dropped);
    R* x = output<R>(kept_x);
    const Weight factor = weight_of(weight);
    const Weight shift = bias ? weight_of(*bias) : Weight{nullptr, factor.type};
    visit_team<R, B, kForwardPacks, kForwardThreads>(
        width, {from, first, rest, x, factor.values, shift.values},
        [&](auto pack, auto held, dim3 block) {
          launch_rows("permuted_norm", permuted_norm_kernel<R, B, W, pack.value, held.value>,
                      grid_for_all(num_entries * rows_per_entry, block), residual, from, factor,
                      shift, permutation_of(permutation, rows_per_entry), static_cast<W>(eps),
                      centered, gemma, first, rest, x, output<W>(mean), output<W>(rstd),
                      num_kept * rows_per_entry, static_cast<int>(width));
        });
  });
  return {kept, dropped, kept_x, mean, rstd};
}

std::tuple<Tensor, Tensor> permuted_norm_backward_(Tensor grad_residual, Tensor grad_kept,
                                                   Tensor kept_x, Tensor weight, Tensor mean,
                                                   Tensor rstd, Tensor permutation, bool centered,
                                                   bool gemma, bool weight_grad, bool bias_grad) {
  constexpr const char* kName = "permuted_norm_backward_";
  check_dtype("permutation", permutation, ScalarType::Long);
  const int64_t width = weight.numel(), num_rows = check_packed_width(kept_x, width);
  const int64_t num_kept = kept_x.size(0);
  const int64_t rows_per_entry = num_kept > 0 ? num_rows / num_kept : 1;
  check_numel("grad_kept", grad_kept, kept_x.numel());
  check_dtype("grad_residual", grad_residual, kept_x.scalar_type());
  if (num_kept > permutation.numel()) {
    fail("rows: expected at most ", permutation.numel(), ", got ", num_kept);
  }
  if (num_kept > 0) {
    check_numel("grad_residual", grad_residual, permutation.numel() * rows_per_entry * width);
  }
  const torch::stable::accelerator::DeviceGuard guard(grad_residual.get_device_index());
  const Tensor target = dense(grad_residual);
  grad_kept = dense(grad_kept);
  kept_x = dense(kept_x);
  weight = dense(weight);
  if (centered) mean = checked_statistic("mean", mean, num_rows, kept_x);
  rstd = checked_statistic("rstd", rstd, num_rows, kept_x);
  permutation = dense(permutation);
  Tensor grad_weight = new_parameter_grad(weight, weight_grad);
  Tensor grad_bias = new_parameter_grad(weight, bias_grad);

  visit_residual_and_branch(kept_x.scalar_type(), grad_kept.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const B* grad = input<B>(grad_kept);
    const R* x = input<R>(kept_x);
    R* out = output<R>(target);
    const Weight factor = weight_of(weight);
    std::optional<Tensor> weight_partial, bias_partial;
    const auto pointer = [](const std::optional<Tensor>& partial) {
      return partial ? output<W>(*partial) : nullptr;
    };
    const auto run = [&](auto pack, auto held, dim3 block, auto sums) {
      const auto kernel =
          permuted_norm_backward_kernel<R, B, W, pack.value, held.value, sums.value>;
      const int num_sums = held.value > 0 ? 0 : weight_grad + bias_grad;
      const Grid grid = grid_at_once<W>(kName, kernel, num_rows, width, block, num_sums, target);
      if (weight_grad) weight_partial = new_partial(grid.blocks, width, wide_dtype(kept_x), weight);
      if (bias_grad) bias_partial = new_partial(grid.blocks, width, wide_dtype(kept_x), weight);
      launch_rows(kName, kernel, grid, target, grad, x, factor, input<W>(mean), input<W>(rstd),
                  permutation_of(permutation, rows_per_entry), centered, gemma, out,
                  pointer(weight_partial), pointer(bias_partial), grid.shared_bytes > 0, num_rows,
                  static_cast<int>(width));
    };
    visit_team<R, B, kBackwardPacks, kBackwardThreads>(
        width, {grad, x, out, factor.values}, [&](auto pack, auto held, dim3 block) {
          // Single elements are rare: one kernel for both.
          if constexpr (pack.value > 1) {
            if (!weight_grad && !bias_grad) return run(pack, held, block, std::false_type{});
          }
          run(pack, held, block, std::true_type{});
        });
    if (weight_grad) launch_sum_partials<W>(kName, grad_weight, *weight_partial);
    if (bias_grad) launch_sum_partials<W>(kName, grad_bias, *bias_partial);
  });
  if (!grad_residual.is_contiguous()) torch::stable::copy_(grad_residual, target);
  return {grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("permuted_norm", TORCH_BOX(&permuted_norm));
  library.impl("permuted_norm_backward_", TORCH_BOX(&permuted_norm_backward_));
}

}  // namespace
}  // namespace dropbp
