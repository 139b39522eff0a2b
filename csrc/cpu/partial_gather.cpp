// CPU kernel of dropbp_kernels::partial_gather.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
//
// Not vectorised: a gather instruction reads one cache line for each lane as well.
#include "../rows.h"
#include "channels.h"

namespace dropbp {
namespace {

Tensor partial_gather(Tensor input_tensor, Tensor index) {
  check_dtype("index", index, ScalarType::Long);
  const int64_t dim = input_tensor.dim();
  if (dim == 0) fail("input: expected at least one dimension, got none");
  const int64_t width = input_tensor.size(dim - 1), num_channels = index.numel();
  index = dense(index);
  const int64_t* channels = checked_indices("index", index, width);
  std::vector<int64_t> sizes(input_tensor.sizes().begin(), input_tensor.sizes().end());
  sizes.back() = num_channels;
  Tensor result = new_tensor(sizes.data(), dim, shim_dtype(input_tensor), input_tensor);
  if (result.numel() == 0) return result;
  const int64_t num_rows = result.numel() / num_channels;
  input_tensor = as_rows(input_tensor);
  const int64_t stride = row_stride(input_tensor);
  visit_dtype("input", input_tensor.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* from = input<T>(input_tensor);
    T* to = output<T>(result);
    torch::stable::parallel_for(0, num_rows, channel_grain(num_channels),
                                [=](int64_t begin, int64_t end) {
                                  for (int64_t row = begin; row < end; ++row) {
                                    const T* values = from + row * stride;
                                    T* chosen = to + row * num_channels;
                                    for (int64_t k = 0; k < num_channels; ++k)
                                      chosen[k] = values[channels[k]];
                                  }
                                });
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("partial_gather", TORCH_BOX(&partial_gather));
}

}  // namespace
}  // namespace dropbp
