// Device code of permuted_residual_add. Raw pointers, no torch header.
#pragma once

#include "elements.cuh"
#include "indices.cuh"

namespace dropbp {

// output[permutation[k], :] = residual[permutation[k], :] + branch[k, :], where branch is kept and
// then dropped. Flat over the count elements of the branch, N at a time; row_size is a multiple of
// N.
template <class R, class B, int N>
__global__ void permuted_residual_add_kernel(R* output,                   // (num_rows, row_size)
                                             const R* residual,           // (num_rows, row_size)
                                             const B* kept,               // (num_kept, row_size)
                                             const B* dropped,            // the other rows
                                             const int64_t* permutation,  // (num_rows)
                                             int64_t num_rows, int64_t num_kept, int64_t row_size,
                                             int64_t count) {  // num_rows * row_size
  using W = Wide<R>;
  // I/O: read residual + read branch + write output.
  const int64_t end_of_kept = num_kept * row_size;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i < count; i += stride) {
    const int64_t k = i / row_size;
    const int64_t at =
        checked_index("permutation", permutation, k, num_rows) * row_size + (i - k * row_size);
    R x[N];
    B h[N];
    load(x, residual + at);
    load(h, i < end_of_kept ? kept + i : dropped + (i - end_of_kept));
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = narrow<R>(widen<W>(x[j]) + widen<W>(h[j]));
    store(output + at, x);
  }
}

}  // namespace dropbp
