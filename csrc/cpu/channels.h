// Channels: places in the last dimension of an input, which are columns of a weight.
#pragma once

#include <algorithm>

#include "indices.h"

namespace dropbp {

// An element of a channel is a cache line of its own, read for 2 to 8 of its 64 bytes: a thread is
// worth waking for fewer of them. At 4096 of them two threads take 0.7 to 0.85 of the time of one
// (256 x 256 of which 16 channels, from memory; Zen 4, November 2026).
inline int64_t channel_grain(int64_t num_channels) {
  return std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(num_channels, 1));
}

}  // namespace dropbp
