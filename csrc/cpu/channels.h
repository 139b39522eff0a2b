// Channels: places in the last dimension of an input, which are columns of a weight.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace dropbp {

// An element of a channel is a cache line of its own, read for 2 to 8 of its 64 bytes: a thread is
// worth waking for fewer of them.
inline int64_t channel_grain(int64_t num_channels) {
  return std::max<int64_t>(1, kGrain / 8 / std::max<int64_t>(num_channels, 1));
}

// Entries of `index`, contiguous int64, each of them from 0 to width - 1.
inline const int64_t* checked_channels(const Tensor& index, int64_t width) {
  const int64_t* channels = input<int64_t>(index);
  for (int64_t k = 0; k < index.numel(); ++k) {
    if (channels[k] < 0 || channels[k] >= width) {
      fail<std::out_of_range>("index: expected numbers from 0 to ", width - 1, ", got ",
                              channels[k], " at place ", k);
    }
  }
  return channels;
}

// The same where they are written to: no entry twice.
inline const int64_t* checked_own_channels(const Tensor& index, int64_t width) {
  const int64_t* channels = checked_channels(index, width);
  std::vector<bool> is_seen(width);
  for (int64_t k = 0; k < index.numel(); ++k) {
    if (is_seen[channels[k]]) {
      fail<std::out_of_range>("index: expected different numbers, got ", channels[k], " twice");
    }
    is_seen[channels[k]] = true;
  }
  return channels;
}

}  // namespace dropbp
