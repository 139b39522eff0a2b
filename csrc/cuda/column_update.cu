// CUDA launches of dropbp_kernels::column_update_ and column_restore_.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>

#include "column_update_kernel.cuh"
#include "launch.h"

namespace dropbp {
namespace {

// index, contiguous, must outlive the launch.
Columns columns_of(const Tensor& weight, const Tensor& index) {
  if (weight.dim() != 2) fail("weight: expected 2 dimensions, got ", weight.dim());
  check_own_elements("weight", weight);
  check_dtype("index", index, ScalarType::Long);
  return {input<int64_t>(index), weight.size(0),   index.numel(),
          weight.size(1),        weight.stride(0), weight.stride(1)};
}

Tensor column_update_(Tensor weight, Tensor delta, Tensor index, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  index = dense(index);
  const Columns columns = columns_of(weight, index);
  const int64_t count = columns.num_rows * columns.num_columns;
  check_numel("delta", delta, count);
  delta = dense(delta);
  const int64_t sizes[] = {columns.num_rows, columns.num_columns};
  Tensor original = new_tensor(sizes, 2, shim_dtype(weight), weight);
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    visit_dtype("delta", delta.scalar_type(), [&](auto d) {
      using T = decltype(t);
      using D = decltype(d);
      using W = std::conditional_t<std::is_same_v<D, double>, double, Wide<T>>;
      launch_strided("column_update", column_update_kernel<W, T, D>, count, weight,
                     output<T>(weight), output<T>(original), input<D>(delta), columns,
                     static_cast<W>(scale), count);
    });
  });
  return original;
}

void column_restore_(Tensor weight, Tensor original, Tensor index) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  index = dense(index);
  const Columns columns = columns_of(weight, index);
  const int64_t count = columns.num_rows * columns.num_columns;
  check_numel("original", original, count);
  check_dtype("original", original, weight.scalar_type());
  original = dense(original);
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    launch_strided("column_restore", column_restore_kernel<T>, count, weight, output<T>(weight),
                   input<T>(original), columns, count);
  });
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("column_update_", TORCH_BOX(&column_update_));
  library.impl("column_restore_", TORCH_BOX(&column_restore_));
}

}  // namespace
}  // namespace dropbp
