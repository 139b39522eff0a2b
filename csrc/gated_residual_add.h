// What the CPU and the CUDA kernels of gated_residual_add know of their tensors.
#pragma once

#include <optional>

#include "checks.h"

namespace dropbp {

// Elements in a row, which is an index of dim 0.
inline int64_t row_size(const Tensor& tensor) {
  int64_t size = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) size *= tensor.size(d);
  return size;
}

// Of the sizes and device of `tensor`, but for dim 0.
inline Tensor new_rows(const Tensor& tensor, int64_t num_rows, int32_t dtype) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes[0] = num_rows;
  return new_tensor(sizes.data(), tensor.dim(), dtype, tensor);
}

// residual (R, ..., D), branch (K, ..., D), rows (K,) of int64; without rows of one size.
inline void check_pair(const Tensor& residual, const Tensor& branch,
                       const std::optional<Tensor>& rows) {
  if (!rows) return check_numel("branch", branch, residual.numel());
  check_dtype("rows", *rows, ScalarType::Long);
  if (residual.dim() == 0 || branch.dim() != residual.dim()) {
    fail("branch: expected residual's ", residual.dim(), " dimensions, at least one, got ",
         branch.dim());
  }
  for (int64_t d = 1; d < residual.dim(); ++d) {
    if (residual.size(d) != branch.size(d)) {
      fail("branch: expected size ", residual.size(d), " in dimension ", d, ", got ",
           branch.size(d));
    }
  }
  check_numel("rows", *rows, branch.size(0));
}

}  // namespace dropbp
