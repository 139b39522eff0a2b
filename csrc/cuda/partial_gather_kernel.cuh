// Device code of partial_gather. Raw pointers, no torch header.
#pragma once

#include "indices.cuh"

namespace dropbp {

// output[row, k] = input[row, index[k]]. Flat over the count elements of output: what is read is a
// sector of 32 bytes for each of them, however threads are laid out.
template <class T>
__global__ void partial_gather_kernel(T* output,             // (num_rows, num_channels)
                                      const T* input,        // (num_rows, width), rows at `stride`
                                      const int64_t* index,  // (num_channels)
                                      int64_t stride, int64_t width, int64_t num_channels,
                                      int64_t count) {  // num_rows * num_channels
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < count; i += step) {
    const int64_t row = i / num_channels;
    const int64_t channel = checked_index("index", index, i - row * num_channels, width);
    output[i] = input[row * stride + channel];
  }
}

}  // namespace dropbp
