// CUDA launch of dropbp_kernels::partial_gather.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <vector>

#include "../rows.h"
#include "launch.h"
#include "partial_gather_kernel.cuh"

namespace dropbp {
namespace {

Tensor partial_gather(Tensor input_tensor, Tensor index) {
  check_dtype("index", index, ScalarType::Long);
  const int64_t dim = input_tensor.dim();
  if (dim == 0) fail("input: expected at least one dimension, got none");
  const int64_t width = input_tensor.size(dim - 1), num_channels = index.numel();
  const torch::stable::accelerator::DeviceGuard guard(input_tensor.get_device_index());
  index = dense(index);
  std::vector<int64_t> sizes(input_tensor.sizes().begin(), input_tensor.sizes().end());
  sizes.back() = num_channels;
  Tensor result = new_tensor(sizes.data(), dim, shim_dtype(input_tensor), input_tensor);
  const int64_t count = result.numel();
  if (count == 0) return result;
  input_tensor = as_rows(input_tensor);
  visit_dtype("input", input_tensor.scalar_type(), [&](auto element) {
    using T = decltype(element);
    launch_strided("partial_gather", partial_gather_kernel<T>, count, input_tensor,
                   output<T>(result), input<T>(input_tensor), input<int64_t>(index),
                   row_stride(input_tensor), width, num_channels, count);
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("partial_gather", TORCH_BOX(&partial_gather));
}

}  // namespace
}  // namespace dropbp
