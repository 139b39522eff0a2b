// CUDA launch of dropbp_kernels::permuted_residual_add.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>

#include "launch.h"
#include "permuted_residual_add_kernel.cuh"

namespace dropbp {
namespace {

Tensor permuted_residual_add(Tensor residual, Tensor kept, Tensor dropped, Tensor permutation) {
  check_dtype("permutation", permutation, ScalarType::Long);
  check_dtype("dropped", dropped, kept.scalar_type());
  const int64_t num_rows = permutation.numel();
  const int64_t row_size = num_rows > 0 ? residual.numel() / num_rows : 0;
  const int64_t num_kept = kept.dim() > 0 ? kept.size(0) : 0;
  check_numel("residual", residual, num_rows * row_size);
  check_numel("kept", kept, num_kept * row_size);
  check_numel("dropped", dropped, (num_rows - num_kept) * row_size);
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  residual = dense(residual);
  kept = dense(kept);
  dropped = dense(dropped);
  permutation = dense(permutation);
  Tensor result = new_like(residual, shim_dtype(residual));
  const int64_t count = residual.numel();

  visit_residual_and_branch(residual.scalar_type(), kept.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    R* to = output<R>(result);
    const R* from = input<R>(residual);
    const B* first = input<B>(kept);
    const B* rest = input<B>(dropped);
    const auto* entries = input<int64_t>(permutation);
    const auto run = [&](auto pack) {
      constexpr int kN = decltype(pack)::value;
      launch_strided("permuted_residual_add", permuted_residual_add_kernel<R, B, kN>,
                     packs_of(count, kN), residual, to, from, first, rest, entries, num_rows,
                     num_kept, row_size, count);
    };
    if (packs_fit(kFlatPack<R, B>, true, row_size, {to, from, first, rest})) {
      run(std::integral_constant<int, kFlatPack<R, B>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("permuted_residual_add", TORCH_BOX(&permuted_residual_add));
}

}  // namespace
}  // namespace dropbp
