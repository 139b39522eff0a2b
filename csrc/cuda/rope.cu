// CUDA launches of dropbp_kernels::rope and its in-place form.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include "launch.h"
#include "rope_kernel.cuh"
// After launch.h:
#include "../rope.h"

namespace dropbp {
namespace {

// `target` has x's sizes and may be x; the channels of both are contiguous.
template <bool kTranspose, class T, class C>
void launch(const Tensor& target, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const RopeSizes sizes = rope_sizes(x, cos, sin);
  const RopeStrides to = rope_strides(target), from = rope_strides(x);
  const Heads<T> turned{output<T>(target), to.batch, to.seq, to.head};
  const Heads<const T> heads{input<T>(x), from.batch, from.seq, from.head};
  const C* cosines = input<C>(cos);
  const C* sines = input<C>(sin);
  constexpr int kPacked = kPack<T, C>;
  bool fits = packs_fit(kPacked, true, sizes.half, {turned.data, heads.data, cosines, sines});
  for (const int64_t stride : {to.batch, to.seq, to.head, from.batch, from.seq, from.head}) {
    fits = fits && stride % kPacked == 0;
  }
  fits = fits && sizes.width % kPacked == 0;
  const int64_t tokens = sizes.batch_size * sizes.seq_len;
  const auto run = [&](auto kernel, int pack) {
    const int64_t count = tokens * sizes.num_heads * ((sizes.width - sizes.half) / pack);
    launch_strided("rope", kernel, count, x, turned, heads, cosines, sines, sizes.table_stride,
                   tokens, sizes.seq_len, sizes.num_heads, sizes.half, sizes.width);
  };
  if (fits) {
    run(rope_kernel<kTranspose, T, C, kPacked>, kPacked);
  } else {
    run(rope_kernel<kTranspose, T, C, 1>, 1);
  }
}

void turn_into(const Tensor& target, const Tensor& x, Tensor cos, Tensor sin, bool transpose) {
  rope_sizes(x, cos, sin);  // checks, also where there is nothing to do
  if (x.numel() == 0) return;
  cos = dense(cos);
  sin = dense(sin);
  visit_x_and_table(x, cos, [&](auto element, auto table) {
    using T = decltype(element);
    using C = decltype(table);
    transpose ? launch<true, T, C>(target, x, cos, sin) : launch<false, T, C>(target, x, cos, sin);
  });
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool transpose) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor result = new_like(x, shim_dtype(x));
  turn_into(result, with_contiguous_heads(x), cos, sin, transpose);
  return result;
}

void rope_(Tensor x, Tensor cos, Tensor sin) {
  check_own_elements("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor target = with_contiguous_heads(x);
  turn_into(target, target, cos, sin, false);
  copy_back(x, target);
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace
}  // namespace dropbp
