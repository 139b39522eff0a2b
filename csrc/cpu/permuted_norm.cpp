// CPU kernels of dropbp_kernels::permuted_norm and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
//
// A "row" here has `width` elements; an entry of the permutation names rows_per_entry consecutive
// rows.
#include <memory>
#include <optional>
#include <tuple>

#define DROPBP_KERNELS "permuted_norm_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "permutation.h"
#include "rows.h"

namespace dropbp {
namespace {

// A parameter, plus an offset, in the type of the arithmetic.
template <class W>
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& parameter, W offset) {
    if (!parameter) return;
    tensor_ = dense(*parameter);
    visit_dtype("weight", tensor_->scalar_type(), [&](auto t) {
      using T = decltype(t);
      const T* values = input<T>(*tensor_);
      if constexpr (std::is_same_v<T, W>) {
        if (offset == 0) {
          data_ = values;
          return;
        }
      }
      buffer_.reset(new W[tensor_->numel()]);
      with_kernels([&](auto kernels) {
        kernels.offset_run(buffer_.get(), values, offset, tensor_->numel());
      });
      data_ = buffer_.get();
    });
  }
  const W* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  std::unique_ptr<W[]> buffer_;
  const W* data_ = nullptr;
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
  const int64_t* entries = checked_permutation(permutation);
  residual = dense(residual);
  int64_t rows_per_entry = 1;
  for (size_t d = 1; d + 1 < sizes.size(); ++d) rows_per_entry *= sizes[d];

  const bool is_double = residual.scalar_type() == ScalarType::Double;
  const int32_t wide = shim_dtype(is_double ? ScalarType::Double : ScalarType::Float);
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
    const Parameter<W> factor(weight, gemma ? W{1} : W{0}), shift(bias, W{0});
    const R* res = input<R>(residual);
    B* first = output<B>(kept);
    B* rest = output<B>(dropped);
    R* saved = output<R>(rows);
    W* means = output<W>(mean);
    W* rstds = output<W>(rstd);
    const int64_t end_of_kept = num_kept * rows_per_entry;
    torch::stable::parallel_for(
        0, num_rows * rows_per_entry, row_grain(width), [&](int64_t begin, int64_t end) {
          with_kernels([&](auto kernels) {
            for (int64_t to = begin; to < end; ++to) {
              const int64_t from =
                  entries[to / rows_per_entry] * rows_per_entry + to % rows_per_entry;
              const R* x = res + from * width;
              const bool is_kept = to < end_of_kept;
              typename decltype(kernels)::template Row<W> row;
              kernels.statistics(x, centered, static_cast<W>(eps), &row, width);
              if (is_kept) {
                std::copy_n(x, width, saved + to * width);
                rstds[to] = row.rstd;
                if (centered) means[to] = row.mean;
              }
              B* normed = is_kept ? first + to * width : rest + (to - end_of_kept) * width;
              kernels.normalize(x, factor.data(), shift.data(), row, !centered && !gemma, normed,
                                width);
            }
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
  const auto wide =
      rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_numel("rows", rows, count * width);
  check_numel("grad_kept", grad_kept, count * width);
  if (centered) check_numel("mean", mean, count);
  check_dtype("rstd", rstd, wide);
  check_dtype("mean", mean, wide);
  check_dtype("grad_residual", grad_residual, rows.scalar_type());
  if (num_kept > num_rows) fail("rows: expected at most ", num_rows, ", got ", num_kept);
  if (num_kept > 0) {
    check_numel("rows", rows, num_kept * rows_per_entry * width);
    check_numel("grad_residual", grad_residual, num_rows * rows_per_entry * width);
  }
  const int64_t* entries = checked_permutation(permutation);
  const Tensor target = dense(grad_residual);
  grad_kept = dense(grad_kept);
  rows = dense(rows);
  mean = dense(mean);
  rstd = dense(rstd);
  const int64_t weight_size = weight_grad ? width : 0, bias_size = bias_grad ? width : 0;
  Tensor grad_weight = new_tensor(&weight_size, 1, shim_dtype(weight), weight);
  Tensor grad_bias = new_tensor(&bias_size, 1, shim_dtype(weight), weight);

  visit_residual_and_branch(rows.scalar_type(), grad_kept.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    using W = Wide<R>;
    const Parameter<W> factor(weight, gemma ? W{1} : W{0});
    const B* grad = input<B>(grad_kept);
    const R* x = input<R>(rows);
    const W* means = input<W>(mean);
    const W* rstds = input<W>(rstd);
    R* out = output<R>(target);
    const auto run = [&](int64_t begin, int64_t end, W* weight_sums, W* bias_sums) {
      with_kernels([&](auto kernels) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t to = entries[k / rows_per_entry] * rows_per_entry + k % rows_per_entry;
          typename decltype(kernels)::template Row<W> row{centered ? means[k] : W{0}, rstds[k]};
          kernels.backward_row(grad + k * width, x + k * width, factor.data(), row, centered,
                               out + to * width, weight_sums, bias_sums, width);
        }
      });
    };
    if (!weight_grad && !bias_grad) {
      torch::stable::parallel_for(0, count, row_grain(width), [&](int64_t begin, int64_t end) {
        run(begin, end, nullptr, nullptr);
      });
      return;
    }
    const RowBlocks blocks(count);
    const int64_t size = blocks.num_blocks * width;
    const std::unique_ptr<W[]> weight_partial(weight_grad ? new W[size]() : nullptr);
    const std::unique_ptr<W[]> bias_partial(bias_grad ? new W[size]() : nullptr);
    blocks.for_each(width, [&](int64_t block, int64_t begin, int64_t end) {
      run(begin, end, weight_grad ? weight_partial.get() + block * width : nullptr,
          bias_grad ? bias_partial.get() + block * width : nullptr);
    });
    if (weight_grad) blocks.sum(grad_weight, weight_partial.get(), width);
    if (bias_grad) blocks.sum(grad_bias, bias_partial.get(), width);
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
