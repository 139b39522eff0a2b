// Indices that come as tensors, contiguous int64. A wrong one would reach outside of the tensors.
#pragma once

#include <vector>

#include "dispatch.h"

namespace dropbp {

// Entries each from 0 to size - 1.
inline const int64_t* checked_indices(const char* name, const Tensor& index, int64_t size) {
  const int64_t* entries = input<int64_t>(index);
  for (int64_t k = 0; k < index.numel(); ++k) {
    if (entries[k] < 0 || entries[k] >= size) {
      fail<std::out_of_range>(name, ": expected numbers from 0 to ", size - 1, ", got ", entries[k],
                              " at place ", k);
    }
  }
  return entries;
}

// The same where they are written to: no entry twice.
inline const int64_t* checked_own_indices(const char* name, const Tensor& index, int64_t size) {
  const int64_t* entries = checked_indices(name, index, size);
  std::vector<bool> is_seen(size);
  for (int64_t k = 0; k < index.numel(); ++k) {
    if (is_seen[entries[k]]) {
      fail<std::out_of_range>(name, ": expected different numbers, got ", entries[k], " twice");
    }
    is_seen[entries[k]] = true;
  }
  return entries;
}

// Where each of 0 ... size - 1 stands among `count` checked entries; -1 where it does not.
inline std::vector<int64_t> places_in(const int64_t* entries, int64_t count, int64_t size) {
  std::vector<int64_t> places(size, -1);
  for (int64_t k = 0; k < count; ++k) places[entries[k]] = k;
  return places;
}

// The inverse of a permutation. Each number has to be there once: one that is missing would leave a
// row of the result unwritten.
inline std::vector<int64_t> checked_inverse(const Tensor& permutation) {
  const int64_t count = permutation.numel();
  const int64_t* entries = input<int64_t>(permutation);
  std::vector<int64_t> places(count, -1);
  for (int64_t k = 0; k < count; ++k) {
    if (entries[k] < 0 || entries[k] >= count || places[entries[k]] >= 0) {
      fail<std::out_of_range>("permutation: expected each number from 0 to ", count - 1,
                              " once, got ", entries[k], " at place ", k);
    }
    places[entries[k]] = k;
  }
  return places;
}

}  // namespace dropbp
