// CPU kernels of dropbp_kernels::gated_residual_layer_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#define DROPBP_KERNELS "gated_residual_layer_norm_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "rows.h"

namespace dropbp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_layer_norm(Tensor residual, Tensor branch,
                                                                     Tensor weight,
                                                                     std::optional<Tensor> bias,
                                                                     double eps) {
  const int64_t width = weight.numel(), num_rows = check_width(residual, width);
  check_numel("branch", branch, residual.numel());
  if (bias) check_numel("bias", *bias, width);
  residual = dense(residual);
  branch = dense(branch);
  const auto wide =
      residual.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor normed = new_like(branch, shim_dtype(branch));
  Tensor new_residual = new_like(residual, shim_dtype(residual));
  Tensor mean = new_per_row(residual, wide), rstd = new_per_row(residual, wide);
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const Widened<W> wide_weight(weight);
    std::optional<Widened<W>> wide_bias;
    if (bias) wide_bias.emplace(*bias);
    const W* factor = wide_weight.data();
    const W* shift = wide_bias ? wide_bias->data() : nullptr;
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    B* out = output<B>(normed);
    R* sum = output<R>(new_residual);
    W* centre = output<W>(mean);
    W* scale = output<W>(rstd);
    torch::stable::parallel_for(0, num_rows, row_grain(width), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * width;
      with_kernels([&](auto kernels) {
        kernels.forward_rows(res + at, add + at, factor, shift, static_cast<W>(eps), out + at,
                             sum + at, centre + begin, scale + begin, end - begin, width);
      });
    });
  });
  return {normed, new_residual, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_layer_norm_backward(
    Tensor grad_normed, std::optional<Tensor> grad_new_residual, Tensor new_residual, Tensor weight,
    Tensor mean, Tensor rstd, bool weight_grad, bool bias_grad) {
  const int64_t width = weight.numel(), num_rows = check_width(new_residual, width);
  const auto wide =
      new_residual.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_numel("grad_normed", grad_normed, new_residual.numel());
  check_numel("mean", mean, num_rows);
  check_dtype("mean", mean, wide);
  check_numel("rstd", rstd, num_rows);
  check_dtype("rstd", rstd, wide);
  grad_normed = dense(grad_normed);
  new_residual = dense(new_residual);
  mean = dense(mean);
  rstd = dense(rstd);
  if (grad_new_residual) {
    check_numel("grad_new_residual", *grad_new_residual, new_residual.numel());
    check_dtype("grad_new_residual", *grad_new_residual, new_residual.scalar_type());
    grad_new_residual = dense(*grad_new_residual);
  }
  Tensor grad_residual = new_like(new_residual, shim_dtype(new_residual));
  const int64_t weight_size = weight_grad ? width : 0, bias_size = bias_grad ? width : 0;
  Tensor grad_weight = new_tensor(&weight_size, 1, shim_dtype(weight), weight);
  Tensor grad_bias = new_tensor(&bias_size, 1, shim_dtype(weight), weight);

  visit_residual_and_branch(
      new_residual.scalar_type(), grad_normed.scalar_type(), [&](auto r, auto b) {
        using R = decltype(r);
        using B = decltype(b);
        using W = Wide<R>;
        const Widened<W> factor(weight);
        const B* grad = input<B>(grad_normed);
        const R* grad_new = grad_new_residual ? input<R>(*grad_new_residual) : nullptr;
        const R* x = input<R>(new_residual);
        const W* centre = input<W>(mean);
        const W* scale = input<W>(rstd);
        R* out = output<R>(grad_residual);
        const auto run = [&](int64_t begin, int64_t end, W* weight_sums, W* bias_sums) {
          const int64_t at = begin * width;
          with_kernels([&](auto kernels) {
            kernels.backward_rows(grad + at, grad_new ? grad_new + at : nullptr, x + at,
                                  factor.data(), centre + begin, scale + begin, out + at,
                                  weight_sums, bias_sums, end - begin, width);
          });
        };
        if (!weight_grad && !bias_grad) {
          torch::stable::parallel_for(
              0, num_rows, row_grain(width),
              [&](int64_t begin, int64_t end) { run(begin, end, nullptr, nullptr); });
          return;
        }
        const RowBlocks blocks(num_rows);
        const auto new_partial = [&](bool is_wanted) {
          return std::unique_ptr<W[]>(is_wanted ? new W[blocks.num_blocks * width] : nullptr);
        };
        const auto weight_partial = new_partial(weight_grad), bias_partial = new_partial(bias_grad);
        blocks.for_each(width, [&](int64_t block, int64_t begin, int64_t end) {
          W* weight_sums = weight_grad ? weight_partial.get() + block * width : nullptr;
          W* bias_sums = bias_grad ? bias_partial.get() + block * width : nullptr;
          if (weight_grad) std::fill_n(weight_sums, width, W{0});
          if (bias_grad) std::fill_n(bias_sums, width, W{0});
          run(begin, end, weight_sums, bias_sums);
        });
        if (weight_grad) blocks.sum(grad_weight, weight_partial.get(), width);
        if (bias_grad) blocks.sum(grad_bias, bias_partial.get(), width);
      });
  return {grad_residual, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("gated_residual_layer_norm", TORCH_BOX(&gated_residual_layer_norm));
  library.impl("gated_residual_layer_norm_backward",
               TORCH_BOX(&gated_residual_layer_norm_backward));
}

}  // namespace
}  // namespace dropbp
