// Device code of gated_residual_add. Raw pointers, no torch header.
#pragma once

#include "elements.cuh"
#include "indices.cuh"

namespace dropbp {

// output[row(k), :] = residual[row(k), :] + branch[k, :], where row(k) = rows[k], or k if rows is
// null. Flat over the branch's count elements, N at a time; width is a multiple of N. output may be
// residual.
template <class R, class B, int N>
__global__ void gated_residual_add_kernel(R* output,            // (num_rows, width)
                                          const R* residual,    // (num_rows, width)
                                          const B* branch,      // (K, width), count = K * width
                                          const int64_t* rows,  // (K) or null
                                          int64_t num_rows, int64_t width, int64_t count) {
  using W = Wide<R>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i + N <= count; i += stride) {
    int64_t at = i;
    if (rows) {
      const int64_t k = i / width;
      at = checked_index("rows", rows, k, num_rows) * width + (i - k * width);
    }
    R x[N];
    B h[N];
    load(x, residual + at);
    load(h, branch + i);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = narrow<R>(widen<W>(x[j]) + widen<W>(h[j]));
    store(output + at, x);
  }
  // The tail, fewer than N elements, only where rows is null.
  if (N > 1) {
    for (; i < count; ++i) output[i] = narrow<R>(widen<W>(residual[i]) + widen<W>(branch[i]));
  }
}

// grad_branch[k, :] = grad_output[row(k), :] * grad_scale * row_scale[k], and zeros, without
// reading grad_output, where row_scale is zero. rows and row_scale may be null.
template <class G, class B, class W, int N>
__global__ void gated_residual_add_backward_kernel(B* grad_branch,        // (K, width)
                                                   const G* grad_output,  // (num_rows, width)
                                                   const int64_t* rows,   // (K) or null
                                                   const W* row_scale,    // (K) or null
                                                   W grad_scale, int64_t num_rows, int64_t width,
                                                   int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i + N <= count; i += stride) {
    int64_t at = i;
    W factor = 1;
    if (rows || row_scale) {
      const int64_t k = i / width;
      if (rows) at = checked_index("rows", rows, k, num_rows) * width + (i - k * width);
      if (row_scale) factor = row_scale[k];
    }
    B out[N] = {};
    if (factor != W{0}) {
      G grad[N];
      load(grad, grad_output + at);
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = narrow<B>(widen<W>(grad[j]) * grad_scale * factor);
    }
    store(grad_branch + i, out);
  }
  if (N > 1) {
    for (; i < count; ++i) grad_branch[i] = narrow<B>(widen<W>(grad_output[i]) * grad_scale);
  }
}

}  // namespace dropbp
