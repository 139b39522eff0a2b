// CPU kernels of dropbp_kernels::gated_residual_rms_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
//
// A row is read twice, and the second time from the cache: once for its statistic, once for the
// result.
#include <optional>
#include <tuple>

#define DROPBP_KERNELS "gated_residual_rms_norm_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "rows.h"

namespace dropbp {
namespace {

std::tuple<Tensor, Tensor, Tensor> gated_residual_rms_norm(Tensor residual, Tensor branch,
                                                           Tensor weight, double eps, bool gemma) {
  check_numel("branch", branch, residual.numel());
  const int64_t width = weight.numel(), num_rows = check_width(residual, width);
  residual = dense(residual);
  branch = dense(branch);
  Tensor normed = new_like(branch, shim_dtype(branch));
  Tensor new_residual = new_like(residual, shim_dtype(residual));
  Tensor rstd = new_per_row(residual, wide_dtype(residual));
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    B* out = output<B>(normed);
    R* sum = output<R>(new_residual);
    W* scale = output<W>(rstd);
    visit_parameters<W, B>(weight, std::nullopt, W(gemma), [&](auto factor, auto) {
      torch::stable::parallel_for(0, num_rows, row_grain(width), [&](int64_t begin, int64_t end) {
        const int64_t at = begin * width;
        with_kernels([&](auto kernels) {
          kernels.forward_rows(res + at, add + at, factor, static_cast<W>(eps), gemma, out + at,
                               sum + at, scale + begin, end - begin, width);
        });
      });
    });
  });
  return {normed, new_residual, rstd};
}

std::tuple<Tensor, Tensor> gated_residual_rms_norm_backward(Tensor grad_normed,
                                                            std::optional<Tensor> grad_new_residual,
                                                            Tensor new_residual, Tensor weight,
                                                            Tensor rstd, bool gemma,
                                                            bool weight_grad) {
  const int64_t width = weight.numel(), num_rows = check_width(new_residual, width);
  check_numel("grad_normed", grad_normed, new_residual.numel());
  grad_normed = dense(grad_normed);
  new_residual = dense(new_residual);
  rstd = checked_statistic("rstd", rstd, num_rows, new_residual);
  grad_new_residual = checked_gradient("grad_new_residual", grad_new_residual, new_residual);
  Tensor grad_residual = new_like(new_residual, shim_dtype(new_residual));
  Tensor grad_weight = new_parameter_grad(weight, weight_grad);

  visit_residual_and_branch(
      new_residual.scalar_type(), grad_normed.scalar_type(), [&](auto r, auto b) {
        using R = decltype(r);
        using B = decltype(b);
        using W = Wide<R>;
        const B* grad = input<B>(grad_normed);
        const R* grad_new = grad_new_residual ? input<R>(*grad_new_residual) : nullptr;
        const R* x = input<R>(new_residual);
        const W* scale = input<W>(rstd);
        R* out = output<R>(grad_residual);
        visit_parameters<W, B>(weight, std::nullopt, W(gemma), [&](auto factor, auto) {
          const auto run = [&](int64_t begin, int64_t end, W* sums, W*) {
            const int64_t at = begin * width;
            with_kernels([&](auto kernels) {
              kernels.backward_rows(grad + at, grad_new ? grad_new + at : nullptr, x + at, factor,
                                    scale + begin, out + at, sums, end - begin, width);
            });
          };
          run_with_parameter_grads<W>(num_rows, width, weight_grad, grad_weight, false, grad_weight,
                                      run);
        });
      });
  return {grad_residual, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("gated_residual_rms_norm", TORCH_BOX(&gated_residual_rms_norm));
  library.impl("gated_residual_rms_norm_backward", TORCH_BOX(&gated_residual_rms_norm_backward));
}

}  // namespace
}  // namespace dropbp
