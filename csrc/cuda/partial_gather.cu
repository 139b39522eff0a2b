// CUDA launch of dropbp_kernels::partial_gather.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <vector>

#include "../rows.h"
#include "launch.h"
#include "partial_gather_kernel.cuh"

namespace dropbp {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads, all that fit

Tensor partial_gather(Tensor input, Tensor index) {
  check_dtype("index", index, ScalarType::Long);
  const int64_t dim = input.dim();
  if (dim == 0) fail("input: expected at least one dimension, got none");
  const int64_t width = input.size(dim - 1), num_channels = index.numel();
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  index = dense(index);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = num_channels;
  Tensor result = new_tensor(sizes.data(), dim, shim_dtype(input), input);
  const int64_t count = result.numel();
  if (count == 0) return result;
  input = as_rows(input);
  visit_dtype("input", input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = std::min<int64_t>(
        (count + kThreads - 1) / kThreads,
        int64_t{num_multiprocessors(input, "partial_gather")} * kBlocksPerMultiprocessor);
    partial_gather_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(input)>>>(
        static_cast<T*>(result.mutable_data_ptr()), static_cast<const T*>(input.const_data_ptr()),
        static_cast<const int64_t*>(index.const_data_ptr()), row_stride(input), width, num_channels,
        count);
    check_cuda(cudaGetLastError(), "partial_gather");
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("partial_gather", TORCH_BOX(&partial_gather));
}

}  // namespace
}  // namespace dropbp
