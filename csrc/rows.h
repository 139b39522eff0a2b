// A tensor seen as rows: its last dimension is contiguous and its leading ones lie at one stride,
// as those of a slice of a packed projection do. Shared by cpu/ and cuda/.
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
  return row_stride(tensor) >= 0 ? tensor : torch::stable::contiguous(tensor);
}

// The same for a tensor that is written, whose elements may not share memory.
inline Tensor as_own_rows(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return tensor;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) {
      fail<std::runtime_error>(
          name, ": expected elements with memory of their own, got stride 0 in ", "dimension ", d);
    }
  }
  const bool is_apart = tensor.dim() < 2 || row_stride(tensor) >= tensor.size(tensor.dim() - 1);
  return is_apart ? as_rows(tensor) : torch::stable::contiguous(tensor);
}

// After `tensor` was written through `own`, which as_own_rows returned.
inline void copy_back(Tensor tensor, const Tensor& own) {
  if (own.const_data_ptr() != tensor.const_data_ptr()) torch::stable::copy_(tensor, own);
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
