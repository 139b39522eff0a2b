// CUDA launches of dropbp_kernels::gated_residual_layer_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <optional>
#include <tuple>

#include "gated_residual_layer_norm_kernel.cuh"
#include "row_launch.h"

namespace dropbp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm(Tensor residual, Tensor branch,
                                                                     Tensor weight,
                                                                     std::optional<Tensor> bias,
                                                                     double eps) {
  const int64_t width = weight.numel(), num_rows = check_packed_width(residual, width);
  check_numel("branch", branch, residual.numel());
  if (bias) check_numel("bias", *bias, width);
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  residual = dense(residual);
  branch = dense(branch);
  weight = dense(weight);
  if (bias) bias = dense(*bias);
  Tensor normed = new_like(branch, shim_dtype(branch));
  Tensor new_residual = new_like(residual, shim_dtype(residual));
  Tensor mean = new_per_row(residual, wide_dtype(residual)),
         rstd = new_per_row(residual, wide_dtype(residual));
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    B* out = output<B>(normed);
    R* sum = output<R>(new_residual);
    const Weight factor = weight_of(weight);
    const Weight shift = bias ? weight_of(*bias) : Weight{nullptr, ElementType::kFloat};
    visit_team<R, B, kForwardPacks, kForwardThreads>(
        width, {res, add, out, sum, factor.values, shift.values},
        [&](auto pack, auto held, dim3 block) {
          launch_rows("gated_residual_layer_norm",
                      gated_residual_layer_norm_kernel<R, B, W, pack.value, held.value>,
                      grid_for_all(num_rows, block), residual, res, add, factor, shift,
                      static_cast<W>(eps), out, sum, output<W>(mean), output<W>(rstd), num_rows,
                      static_cast<int>(width));
        });
  });
  return {normed, new_residual, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_layer_norm_backward(
    Tensor grad_normed, std::optional<Tensor> grad_new_residual, Tensor new_residual, Tensor weight,
    Tensor mean, Tensor rstd, bool weight_grad, bool bias_grad) {
  constexpr const char* kName = "gated_residual_layer_norm_backward";
  const int64_t width = weight.numel(), num_rows = check_packed_width(new_residual, width);
  check_numel("grad_normed", grad_normed, new_residual.numel());
  const torch::stable::accelerator::DeviceGuard guard(new_residual.get_device_index());
  grad_normed = dense(grad_normed);
  new_residual = dense(new_residual);
  weight = dense(weight);
  mean = checked_statistic("mean", mean, num_rows, new_residual);
  rstd = checked_statistic("rstd", rstd, num_rows, new_residual);
  grad_new_residual = checked_gradient("grad_new_residual", grad_new_residual, new_residual);
  Tensor grad_residual = new_like(new_residual, shim_dtype(new_residual));
  Tensor grad_weight = new_parameter_grad(weight, weight_grad);
  Tensor grad_bias = new_parameter_grad(weight, bias_grad);

  visit_residual_and_branch(
      new_residual.scalar_type(), grad_normed.scalar_type(), [&](auto r, auto b) {
        using R = decltype(r);
        using B = decltype(b);
        using W = Wide<R>;
        const B* grad = input<B>(grad_normed);
        const R* grad_new = grad_new_residual ? input<R>(*grad_new_residual) : nullptr;
        const R* x = input<R>(new_residual);
        R* out = output<R>(grad_residual);
        const Weight factor = weight_of(weight);
        std::optional<Tensor> weight_partial, bias_partial;
        const auto pointer = [](const std::optional<Tensor>& tensor) {
          return tensor ? output<W>(*tensor) : nullptr;
        };
        const auto run = [&](auto pack, auto held, dim3 block, auto sums) {
          const auto kernel = gated_residual_layer_norm_backward_kernel<R, B, W, pack.value,
                                                                        held.value, sums.value>;
          const int num_sums = held.value > 0 ? 0 : weight_grad + bias_grad;
          const Grid grid =
              grid_at_once<W>(kName, kernel, num_rows, width, block, num_sums, new_residual);
          if (weight_grad)
            weight_partial = new_partial(grid.blocks, width, wide_dtype(new_residual), weight);
          if (bias_grad)
            bias_partial = new_partial(grid.blocks, width, wide_dtype(new_residual), weight);
          launch_rows(kName, kernel, grid, new_residual, grad, grad_new, x, factor, input<W>(mean),
                      input<W>(rstd), out, pointer(weight_partial), pointer(bias_partial),
                      grid.shared_bytes > 0, num_rows, static_cast<int>(width));
        };
        visit_team<R, B, kBackwardPacks, kBackwardThreads>(
            width, {grad, grad_new, x, out, factor.values}, [&](auto pack, auto held, dim3 block) {
              // Single elements are rare: one kernel for both.
              if constexpr (pack.value > 1) {
                if (!weight_grad && !bias_grad) {
                  return run(pack, held, block, std::false_type{});
                }
              }
              run(pack, held, block, std::true_type{});
            });
        if (weight_grad) launch_sum_partials<W>(kName, grad_weight, *weight_partial);
        if (bias_grad) launch_sum_partials<W>(kName, grad_bias, *bias_partial);
      });
  return {grad_residual, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("gated_residual_layer_norm", TORCH_BOX(&gated_residual_layer_norm));
  library.impl("gated_residual_layer_norm_backward",
               TORCH_BOX(&gated_residual_layer_norm_backward));
}

}  // namespace
}  // namespace dropbp
