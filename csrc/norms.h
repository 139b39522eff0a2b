// What the CPU and the CUDA kernels of the norms know of their tensors.
#pragma once

#include <optional>

#include "rows.h"

namespace dropbp {

// The dtype of sums and statistics of rows of `tensor`.
inline ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A mean or rstd for each of `num_rows` rows of x, contiguous.
inline Tensor checked_statistic(const char* name, const Tensor& statistic, int64_t num_rows,
                                const Tensor& x) {
  check_numel(name, statistic, num_rows);
  check_dtype(name, statistic, wide_dtype(x));
  return dense(statistic);
}

// A gradient of x's size and dtype, contiguous, if there is one.
inline std::optional<Tensor> checked_gradient(const char* name, const std::optional<Tensor>& grad,
                                              const Tensor& x) {
  if (!grad) return std::nullopt;
  check_numel(name, *grad, x.numel());
  check_dtype(name, *grad, x.scalar_type());
  return dense(*grad);
}

// A gradient for a parameter that is like `weight`; of size (0,) where none is wanted.
inline Tensor new_parameter_grad(const Tensor& weight, bool is_wanted) {
  const int64_t size = is_wanted ? weight.numel() : 0;
  return new_tensor(&size, 1, shim_dtype(weight), weight);
}

// The sizes of `count` rows of a permutation of num_rows: count, then the dimensions within a row.
// A row is an index of the fewest leading dimensions that have num_rows elements.
inline std::vector<int64_t> sizes_of_rows(const Tensor& residual, int64_t num_rows, int64_t count) {
  int64_t product = 1;
  for (int64_t d = 0; d + 1 < residual.dim(); ++d) {
    product *= residual.size(d);
    if (product != num_rows) continue;
    std::vector<int64_t> sizes = {count};
    for (int64_t rest = d + 1; rest < residual.dim(); ++rest) sizes.push_back(residual.size(rest));
    return sizes;
  }
  fail("permutation: expected the size of leading dimensions of residual, got ", num_rows);
}

}  // namespace dropbp
