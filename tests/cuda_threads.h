// What a CUDA kernel of a flat array needs of a GPU, on the host. To be included before the kernel;
// whoever calls it says which thread of which launch it is.
#pragma once

struct Index {
  unsigned x;
};
static Index gridDim, blockDim, blockIdx, threadIdx;
#define __global__
#define __device__
