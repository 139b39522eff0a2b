// What the CPU and the CUDA kernels of rope know of their tensors. Include after dispatch.h or
// launch.h, as dtypes.h.
#pragma once

#include "dtypes.h"
#include "rows.h"

namespace dropbp {

// x (batch_size, seq_len, num_heads, width); cos and sin (1 or batch_size, seq_len, 2 * half).
struct RopeSizes {
  int64_t batch_size, seq_len, num_heads, width, half;
  int64_t table_stride;  // between two samples of cos and sin, 0 where all share one
};

// Where a token's heads lie; the channels of a head are contiguous.
struct RopeStrides {
  int64_t batch, seq, head;
};

inline RopeSizes rope_sizes(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  if (x.dim() != 4) fail("x: expected 4 dimensions, got ", x.dim());
  const int64_t dim = cos.dim();
  if (dim != 2 && dim != 3) fail("cos: expected 2 or 3 dimensions, got ", dim);
  const int64_t channels = cos.size(dim - 1), samples = dim == 3 ? cos.size(0) : 1;
  const bool fits = cos.size(dim - 2) == x.size(1) && (samples == 1 || samples == x.size(0)) &&
                    channels % 2 == 0 && channels <= x.size(3);
  if (!fits) fail("cos: expected shape (1 or batch, seq, R), R even and at most head_dim");
  check_numel("sin", sin, cos.numel());
  check_dtype("sin", sin, cos.scalar_type());
  return {x.size(0), x.size(1),    x.size(2),
          x.size(3), channels / 2, samples == 1 ? 0 : x.size(1) * channels};
}

inline RopeStrides rope_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// x itself where the channels of a head are contiguous, else a contiguous copy.
inline Tensor with_contiguous_heads(const Tensor& x) {
  return x.dim() == 4 && (x.stride(3) == 1 || x.size(3) <= 1) ? x : dense_copy(x);
}

// Calls visitor with a value of the element type of x and one of that of cos and sin.
template <class Visitor>
void visit_x_and_table(const Tensor& x, const Tensor& cos, const Visitor& visitor) {
  visit_dtype("x", x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (cos.scalar_type() == x.scalar_type()) return visitor(T{}, T{});
    check_dtype("cos", cos,
                std::is_same_v<Wide<T>, double> ? ScalarType::Double : ScalarType::Float);
    visitor(T{}, Wide<T>{});
  });
}

}  // namespace dropbp
