// CPU kernels of dropbp_kernels::gated_residual_layer_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
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
    W* centre = output<W>(mean);
    W* scale = output<W>(rstd);
    visit_parameters<W, B>(weight, bias, W{0}, [&](auto factor, auto shift) {
      torch::stable::parallel_for(0, num_rows, row_grain(width), [&](int64_t begin, int64_t end) {
        const int64_t at = begin * width;
        with_kernels([&](auto kernels) {
          kernels.forward_rows(res + at, add + at, factor, shift, static_cast<W>(eps), out + at,
                               sum + at, centre + begin, scale + begin, end - begin, width);
        });
      });
    });
  });
  return {normed, new_residual, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_layer_norm_backward(
    Tensor grad_normed, std::optional<Tensor> grad_new_residual, Tensor new_residual, Tensor weight,
    Tensor mean, Tensor rstd, bool weight_grad, bool bias_grad) {
  const int64_t width = weight.numel(), num_rows = check_width(new_residual, width);
  check_numel("grad_normed", grad_normed, new_residual.numel());
  grad_normed = dense(grad_normed);
  new_residual = dense(new_residual);
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
        const W* centre = input<W>(mean);
        const W* scale = input<W>(rstd);
        R* out = output<R>(grad_residual);
        visit_parameters<W, B>(weight, std::nullopt, W{0}, [&](auto factor, auto) {
          const auto run = [&](int64_t begin, int64_t end, W* weight_sums, W* bias_sums) {
            const int64_t at = begin * width;
            with_kernels([&](auto kernels) {
              kernels.backward_rows(grad + at, grad_new ? grad_new + at : nullptr, x + at, factor,
                                    centre + begin, scale + begin, out + at, weight_sums, bias_sums,
                                    end - begin, width);
            });
          };
          run_with_parameter_grads<W>(num_rows, width, weight_grad, grad_weight, bias_grad,
                                      grad_bias, run);
        });
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
