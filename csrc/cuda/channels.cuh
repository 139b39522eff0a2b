// Channels on the device: places in the last dimension of an input, columns of a weight. No torch
// header.
#pragma once

#include <cstdint>
#include <cstdio>

namespace dropbp {

// A wrong entry would reach outside of the tensors: stop the program with a message instead. The
// host cannot check without waiting for the device.
__device__ inline int64_t checked_channel(const int64_t* index, int64_t place, int64_t width) {
  const int64_t channel = index[place];
  if (channel < 0 || channel >= width) {
    printf("dropbp_kernels: index: expected numbers from 0 to %lld, got %lld at place %lld\n",
           static_cast<long long>(width - 1), static_cast<long long>(channel),
           static_cast<long long>(place));
    __trap();
  }
  return channel;
}

}  // namespace dropbp
