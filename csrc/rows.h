// Tensors seen as rows: the last dimension is contiguous and the leading ones lie at one stride, as
// those of a slice of a packed projection do. Shared by cpu/ and cuda/.
#pragma once

#include "checks.h"

namespace dropbp {

// The distance between two rows of `tensor` in elements; -1 where it cannot be seen as rows.
inline int64_t row_stride(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim == 0) return 1;
  const int64_t width = tensor.size(dim - 1);
  if (width > 1 && tensor.stride(dim - 1) != 1) return -1;
  int64_t stride = width, expected = -1;
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (expected < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != expected) {
      return -1;
    }
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride;
}

// `tensor` itself where it can be seen as rows, else a contiguous copy.
inline Tensor as_rows(const Tensor& tensor) {
  return row_stride(tensor) >= 0 ? tensor : dense_copy(tensor);
}

// The same for a tensor that is written, whose elements may not share memory.
inline Tensor as_own_rows(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return tensor;
  check_own_elements(name, tensor);
  const bool is_apart = tensor.dim() < 2 || row_stride(tensor) >= tensor.size(tensor.dim() - 1);
  return is_apart ? as_rows(tensor) : dense_copy(tensor);
}

// After `tensor` was written through `own`, which as_own_rows returned.
inline void copy_back(Tensor tensor, const Tensor& own) {
  if (own.const_data_ptr() != tensor.const_data_ptr()) torch::stable::copy_(tensor, own);
}

// Every tensor of `width` columns; the number of rows.
inline int64_t check_width(const Tensor& rows_by_width, int64_t width) {
  if (rows_by_width.dim() == 0 || rows_by_width.size(rows_by_width.dim() - 1) != width) {
    fail("weight: expected as many elements as the last dimension of residual, got ", width);
  }
  int64_t num_rows = 1;
  for (int64_t d = 0; d + 1 < rows_by_width.dim(); ++d) num_rows *= rows_by_width.size(d);
  return num_rows;
}

// A value for each row of `rows_by_width`: one dimension less.
inline Tensor new_per_row(const Tensor& rows_by_width, ScalarType dtype) {
  return new_tensor(rows_by_width.sizes().data(), rows_by_width.dim() - 1, shim_dtype(dtype),
                    rows_by_width);
}

// That `tensor` has the sizes and the dtype of `other`.
inline void check_alike(const char* name, const Tensor& tensor, const char* other_name,
                        const Tensor& other) {
  bool is_alike = tensor.dim() == other.dim();
  for (int64_t d = 0; is_alike && d < other.dim(); ++d) is_alike = tensor.size(d) == other.size(d);
  if (!is_alike) fail(name, ": expected the shape of ", other_name);
  check_dtype(name, tensor, other.scalar_type());
}

}  // namespace dropbp
