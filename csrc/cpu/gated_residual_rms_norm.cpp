// CPU kernels of dropbp_kernels::gated_residual_rms_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
//
// A row is read twice, and the second time from the cache: once for its statistic, once for the
// result.
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#define DROPBP_KERNELS "gated_residual_rms_norm_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "rows.h"

namespace dropbp {
namespace {

// Calls visitor with the weight as the factor that the kernels apply: as it is where its dtype is
// W or branch's, else in W; for Gemma 1 + weight in W.
template <class W, class B, class Visitor>
void visit_factor(const Tensor& weight_tensor, bool gemma, const Visitor& visitor) {
  const Tensor weight = dense(weight_tensor);
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* data = input<T>(weight);
    if constexpr (std::is_same_v<T, W> || std::is_same_v<T, B>) {
      if (!gemma) return visitor(data);
    }
    const std::unique_ptr<W[]> factor(new W[weight.numel()]);
    with_kernels([&](auto kernels) {
      kernels.offset_run(factor.get(), data, gemma ? W{1} : W{0}, weight.numel());
    });
    visitor(static_cast<const W*>(factor.get()));
  });
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_rms_norm(Tensor residual, Tensor branch,
                                                           Tensor weight, double eps, bool gemma) {
  check_numel("branch", branch, residual.numel());
  const int64_t width = weight.numel(), num_rows = check_width(residual, width);
  residual = dense(residual);
  branch = dense(branch);
  const auto wide =
      residual.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor normed = new_like(branch, shim_dtype(branch));
  Tensor new_residual = new_like(residual, shim_dtype(residual));
  Tensor rstd = new_per_row(residual, wide);
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    B* out = output<B>(normed);
    R* sum = output<R>(new_residual);
    W* scale = output<W>(rstd);
    visit_factor<W, B>(weight, gemma, [&](auto factor) {
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
  const bool is_double = new_residual.scalar_type() == ScalarType::Double;
  check_numel("grad_normed", grad_normed, new_residual.numel());
  check_numel("rstd", rstd, num_rows);
  check_dtype("rstd", rstd, is_double ? ScalarType::Double : ScalarType::Float);
  grad_normed = dense(grad_normed);
  new_residual = dense(new_residual);
  rstd = dense(rstd);
  if (grad_new_residual) {
    check_numel("grad_new_residual", *grad_new_residual, new_residual.numel());
    check_dtype("grad_new_residual", *grad_new_residual, new_residual.scalar_type());
    grad_new_residual = dense(*grad_new_residual);
  }
  Tensor grad_residual = new_like(new_residual, shim_dtype(new_residual));
  const int64_t grad_weight_size = weight_grad ? width : 0;
  Tensor grad_weight = new_tensor(&grad_weight_size, 1, shim_dtype(weight), weight);

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
        visit_factor<W, B>(weight, gemma, [&](auto factor) {
          const auto run = [&](int64_t begin, int64_t end, W* sums) {
            const int64_t at = begin * width;
            with_kernels([&](auto kernels) {
              kernels.backward_rows(grad + at, grad_new ? grad_new + at : nullptr, x + at, factor,
                                    scale + begin, out + at, sums, end - begin, width);
            });
          };
          if (!weight_grad) {
            torch::stable::parallel_for(
                0, num_rows, row_grain(width),
                [&](int64_t begin, int64_t end) { run(begin, end, nullptr); });
            return;
          }
          const RowBlocks blocks(num_rows);
          const std::unique_ptr<W[]> partial(new W[blocks.num_blocks * width]);
          blocks.for_each(width, [&](int64_t block, int64_t begin, int64_t end) {
            W* sums = partial.get() + block * width;
            std::fill_n(sums, width, W{0});
            run(begin, end, sums);
          });
          blocks.sum(grad_weight, partial.get(), width);
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
