// An entry of a permutation on the device. No torch header.
#pragma once

#include <cstdint>
#include <cstdio>

namespace dropbp {

// A wrong entry would reach outside of the tensors: stop the program with a message instead. The
// host cannot check without waiting for the device.
__device__ inline int64_t checked_entry(const int64_t* permutation, int64_t place,
                                        int64_t num_rows) {
  const int64_t row = permutation[place];
  if (row < 0 || row >= num_rows) {
    printf("dropbp_kernels: permutation: expected numbers from 0 to %lld, got %lld at place %lld\n",
           static_cast<long long>(num_rows - 1), static_cast<long long>(row),
           static_cast<long long>(place));
    __trap();
  }
  return row;
}

}  // namespace dropbp
