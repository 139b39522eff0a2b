// CPU kernel of dropbp_kernels::permuted_residual_add.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#define DROPBP_KERNELS "gated_residual_add_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "indices.h"
#include "row_add.h"

namespace dropbp {
namespace {

Tensor permuted_residual_add(Tensor residual, Tensor kept, Tensor dropped, Tensor permutation) {
  check_dtype("permutation", permutation, ScalarType::Long);
  check_dtype("dropped", dropped, kept.scalar_type());
  permutation = dense(permutation);
  const std::vector<int64_t> places = checked_inverse(permutation);
  const int64_t num_rows = permutation.numel();
  const int64_t row_size = num_rows > 0 ? residual.numel() / num_rows : 0;
  const int64_t num_kept = kept.dim() > 0 ? kept.size(0) : 0;
  check_numel("residual", residual, num_rows * row_size);
  check_numel("kept", kept, num_kept * row_size);
  check_numel("dropped", dropped, (num_rows - num_kept) * row_size);
  residual = dense(residual);
  kept = dense(kept);
  dropped = dense(dropped);
  Tensor result = new_like(residual, shim_dtype(residual));
  visit_residual_and_branch(residual.scalar_type(), kept.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    const B* first = input<B>(kept);
    const B* rest = input<B>(dropped);
    add_rows<R, B>(result, residual, num_rows, row_size, [&](int64_t row) {
      const int64_t k = places[row];
      return k < num_kept ? first + k * row_size : rest + (k - num_kept) * row_size;
    });
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("permuted_residual_add", TORCH_BOX(&permuted_residual_add));
}

}  // namespace
}  // namespace dropbp
