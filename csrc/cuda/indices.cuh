// Indices on the device. No torch header.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstdio>

namespace dropbp {

// A wrong entry would reach outside of the tensors: stop the program with a message instead. The
// host cannot check without waiting for the device.
__device__ inline int64_t checked_index(const char* name, const int64_t* index, int64_t place,
                                        int64_t size) {
  const int64_t found = index[place];
  if (found < 0 || found >= size) {
    printf("dropbp_kernels: %s: expected numbers from 0 to %lld, got %lld at place %lld\n", name,
           static_cast<long long>(size - 1), static_cast<long long>(found),
           static_cast<long long>(place));
    // Not __trap(): what was printed may be lost with it, and PyTorch calls it a launch failure.
    __assert_fail(name, "dropbp_kernels", 0, "index out of range");
  }
  return found;
}

}  // namespace dropbp
