// CPU kernels of dropbp_kernels::rope and its in-place form.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>

#define DROPBP_KERNELS "rope_kernels.h"
#include "dispatch.h"
// After dispatch.h:
#include "../rope.h"
#include "each_isa.h"

namespace dropbp {
namespace {

// `target` has x's sizes and may be x; the channels of both are contiguous.
void turn_into(const Tensor& target, const Tensor& x, Tensor cos, Tensor sin, bool transpose) {
  const RopeSizes sizes = rope_sizes(x, cos, sin);
  if (x.numel() == 0) return;
  cos = dense(cos);
  sin = dense(sin);
  const RopeStrides to = rope_strides(target), from = rope_strides(x);
  visit_x_and_table(x, cos, [&](auto element, auto table) {
    using T = decltype(element);
    using C = decltype(table);
    T* out = output<T>(target);
    const T* values = input<T>(x);
    const C* cosines = input<C>(cos);
    const C* sines = input<C>(sin);
    const int64_t grain = std::max<int64_t>(1, kGrain / (sizes.num_heads * sizes.width));
    torch::stable::parallel_for(
        0, sizes.batch_size * sizes.seq_len, grain, [&](int64_t begin, int64_t end) {
          with_kernels([&](auto kernels) {
            for (int64_t token = begin; token < end; ++token) {
              const int64_t sample = token / sizes.seq_len, position = token % sizes.seq_len;
              const int64_t row = sample * sizes.table_stride + position * 2 * sizes.half;
              const auto run = [&](auto turned_back) {
                kernels.template turn_heads<decltype(turned_back)::value>(
                    out + sample * to.batch + position * to.seq, to.head,
                    values + sample * from.batch + position * from.seq, from.head, cosines + row,
                    sines + row, sizes.num_heads, sizes.half, sizes.width);
              };
              transpose ? run(std::true_type{}) : run(std::false_type{});
            }
          });
        });
  });
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool transpose) {
  Tensor result = new_like(x, shim_dtype(x));
  turn_into(result, with_contiguous_heads(x), cos, sin, transpose);
  return result;
}

void rope_(Tensor x, Tensor cos, Tensor sin) {
  check_own_elements("x", x);
  const Tensor target = with_contiguous_heads(x);
  turn_into(target, target, cos, sin, false);
  copy_back(x, target);
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace
}  // namespace dropbp
