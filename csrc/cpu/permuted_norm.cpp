// CPU kernels of dropbp_kernels::permuted_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <optional>
#include <tuple>

#define DROPBP_KERNELS "permuted_norm_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "indices.h"
#include "rows.h"

namespace dropbp {
namespace {

// Rows of residual in permuted order: an entry names rows_per_entry consecutive rows of it.
struct PermutedRows {
  const int64_t* entries;
  int64_t rows_per_entry, num_rows;

  int64_t operator()(int64_t row) const {
    return entries[row / rows_per_entry] * rows_per_entry + row % rows_per_entry;
  }
  // The one after `row`; the same at the end.
  int64_t next(int64_t row) const { return (*this)(std::min(row + 1, num_rows - 1)); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> permuted_norm(
    Tensor residual, Tensor weight, std::optional<Tensor> bias, Tensor permutation,
    int64_t num_kept, double eps, bool centered, bool gemma, ScalarType dtype) {
  check_dtype("permutation", permutation, ScalarType::Long);
  permutation = dense(permutation);
  const int64_t num_rows = permutation.numel(), width = weight.numel();
  if (num_kept < 0 || num_kept > num_rows) {
    fail("num_kept: expected 0 to ", num_rows, ", got ", num_kept);
  }
  std::vector<int64_t> sizes = sizes_of_rows(residual, num_rows, num_kept);
  if (sizes.back() != width) fail("weight: expected ", sizes.back(), " elements, got ", width);
  if (bias) check_numel("bias", *bias, width);
  checked_inverse(permutation);
  const int64_t* entries = input<int64_t>(permutation);
  residual = dense(residual);
  int64_t rows_per_entry = 1;
  for (size_t d = 1; d + 1 < sizes.size(); ++d) rows_per_entry *= sizes[d];

  const int32_t wide = shim_dtype(wide_dtype(residual));
  const int64_t dim = static_cast<int64_t>(sizes.size()), none = 0;
  Tensor kept = new_tensor(sizes.data(), dim, shim_dtype(dtype), residual);
  Tensor rows = new_tensor(sizes.data(), dim, shim_dtype(residual), residual);
  Tensor rstd = new_tensor(sizes.data(), dim - 1, wide, residual);
  Tensor mean = centered ? new_tensor(sizes.data(), dim - 1, wide, residual)
                         : new_tensor(&none, 1, wide, residual);
  sizes[0] = num_rows - num_kept;
  Tensor dropped = new_tensor(sizes.data(), dim, shim_dtype(dtype), residual);

  visit_residual_and_branch(residual.scalar_type(), dtype, [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const R* res = input<R>(residual);
    B* first = output<B>(kept);
    B* rest = output<B>(dropped);
    R* saved = output<R>(rows);
    W* means = output<W>(mean);
    W* rstds = output<W>(rstd);
    const int64_t end_of_kept = num_kept * rows_per_entry;
    const PermutedRows from{entries, rows_per_entry, num_rows * rows_per_entry};
    visit_parameters<W, B>(weight, bias, W(gemma), [&](auto factor, auto shift) {
      torch::stable::parallel_for(
          0, from.num_rows, row_grain(width), [&](int64_t begin, int64_t end) {
            with_kernels([&](auto kernels) {
              W unsaved_mean, unsaved_rstd;
              for (int64_t to = begin; to < end; ++to) {
                const R* x = res + from(to) * width;
                const bool is_kept = to < end_of_kept;
                if (is_kept) std::copy_n(x, width, saved + to * width);
                W* row_mean = !centered ? nullptr : is_kept ? means + to : &unsaved_mean;
                kernels.forward_row(
                    x, factor, shift, static_cast<W>(eps), gemma,
                    is_kept ? first + to * width : rest + (to - end_of_kept) * width, row_mean,
                    is_kept ? rstds + to : &unsaved_rstd, width, res + from.next(to) * width);
              }
            });
          });
    });
  });
  return {kept, dropped, rows, mean, rstd};
}

std::tuple<Tensor, Tensor> permuted_norm_backward_(Tensor grad_residual, Tensor grad_kept,
                                                   Tensor rows, Tensor weight, Tensor mean,
                                                   Tensor rstd, Tensor permutation, bool centered,
                                                   bool gemma, bool weight_grad, bool bias_grad) {
  check_dtype("permutation", permutation, ScalarType::Long);
  permutation = dense(permutation);
  const int64_t num_rows = permutation.numel(), width = weight.numel(), count = rstd.numel();
  const int64_t num_kept = rows.dim() > 0 ? rows.size(0) : 0;
  const int64_t rows_per_entry = num_kept > 0 ? count / num_kept : 0;
  check_numel("rows", rows, count * width);
  check_numel("grad_kept", grad_kept, count * width);
  check_dtype("grad_residual", grad_residual, rows.scalar_type());
  if (num_kept > num_rows) fail("rows: expected at most ", num_rows, ", got ", num_kept);
  if (num_kept > 0) {
    check_numel("rows", rows, num_kept * rows_per_entry * width);
    check_numel("grad_residual", grad_residual, num_rows * rows_per_entry * width);
  }
  checked_inverse(permutation);
  const int64_t* entries = input<int64_t>(permutation);
  const Tensor target = dense(grad_residual);
  grad_kept = dense(grad_kept);
  rows = dense(rows);
  if (centered) mean = checked_statistic("mean", mean, count, rows);
  rstd = checked_statistic("rstd", rstd, count, rows);
  Tensor grad_weight = new_parameter_grad(weight, weight_grad);
  Tensor grad_bias = new_parameter_grad(weight, bias_grad);

  visit_residual_and_branch(rows.scalar_type(), grad_kept.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const B* grad = input<B>(grad_kept);
    const R* x = input<R>(rows);
    const W* means = input<W>(mean);
    const W* rstds = input<W>(rstd);
    R* out = output<R>(target);
    const PermutedRows to{entries, rows_per_entry, count};
    visit_parameters<W, B>(weight, std::nullopt, W(gemma), [&](auto factor, auto) {
      const auto run = [&](int64_t begin, int64_t end, W* weight_sums, W* bias_sums) {
        with_kernels([&](auto kernels) {
          for (int64_t row = begin; row < end; ++row) {
            kernels.backward_row(grad + row * width, x + row * width, factor,
                                 centered ? means + row : nullptr, rstds[row],
                                 out + to(row) * width, weight_sums, bias_sums, width,
                                 out + to.next(row) * width);
          }
        });
      };
      run_with_parameter_grads<W>(count, width, weight_grad, grad_weight, bias_grad, grad_bias,
                                  run);
    });
  });
  if (!grad_residual.is_contiguous()) torch::stable::copy_(grad_residual, target);
  return {grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("permuted_norm", TORCH_BOX(&permuted_norm));
  library.impl("permuted_norm_backward_", TORCH_BOX(&permuted_norm_backward_));
}

}  // namespace
}  // namespace dropbp
