// Rows of a norm: the threads that share one, sums over it, and sums over columns in a fixed order.
// No torch header.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace dropbp {

// A team of blockDim.x threads, whole warps, works on a row; a block of narrow rows has blockDim.y
// teams of one warp each. A thread takes packs of N columns, blockDim.x packs apart. Up to kHeld of
// them stay in its registers; wider rows (kHeld = 0) are read again, from the cache.
constexpr int kTeamsOfWarps = 4;
// Packs that a thread holds and threads of a block, at most. Going back there are sums over columns
// to hold as well: half the packs, and twice the registers a thread.
constexpr int kForwardPacks = 4, kForwardThreads = 1024;
constexpr int kBackwardPacks = 2, kBackwardThreads = 512;
// Of rows that are not held. Little is in registers then, and loads in flight are what hides the
// latency of memory: 32 KiB for 1024 threads, and the 30 KiB that an H200 needs on each
// multiprocessor (4 TB/s times 1 us, over 132). Their column sums are in shared memory where they
// fit, 64 KiB for 16384 columns: in global memory they would move as many bytes, through an L2
// cache that passes rows at little more than memory's speed, as the row does in 16 bits.
constexpr int kWideThreads = 1024;

enum class ElementType { kFloat, kHalf, kBFloat16, kDouble };

// A weight of any type: a switch that all threads take alike costs less than a kernel for each.
struct Weight {
  const void* values;  // (width)
  ElementType type;
};

template <class T, class W, int N>
__device__ void load_as(W (&values)[N], const void* from, int column) {
  T raw[N];
  load(raw, static_cast<const T*>(from) + column);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = widen<W>(raw[j]);
}

template <class W, int N>
__device__ void load_weight(W (&values)[N], const Weight& weight, int column) {
  switch (weight.type) {
    case ElementType::kFloat:
      return load_as<float>(values, weight.values, column);
    case ElementType::kHalf:
      return load_as<__half>(values, weight.values, column);
    case ElementType::kBFloat16:
      return load_as<__nv_bfloat16>(values, weight.values, column);
    case ElementType::kDouble:
      return load_as<double>(values, weight.values, column);
  }
}

// The weight, or 1 + weight.
template <class W, int N>
__device__ void load_factor(W (&factor)[N], const Weight& weight, bool gemma, int column) {
  load_weight(factor, weight, column);
  if (gemma) {
#pragma unroll
    for (int j = 0; j < N; ++j) factor[j] += 1;
  }
}

// Calls visitor(slot, first column) for each pack of this thread. Held packs have a slot each; else
// every slot is 0.
template <int N, int kHeld, class Visitor>
__device__ void for_each_pack(int width, const Visitor& visitor) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int slot = 0; slot < kHeld; ++slot) {
      const int column = (slot * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
      if (column < width) visitor(slot, column);
    }
  } else {
    for (int64_t column = int64_t{threadIdx.x} * N; column < width;
         column += int64_t{blockDim.x} * N) {
      visitor(0, static_cast<int>(column));
    }
  }
}

// Calls visitor(slot, first column) for each pack that a thread may hold, to load it: the row's
// last one where there is none. Without a branch between them all loads are in flight at once. Pack
// by pack, each waiting for the one before, a backward of two or three blocks a multiprocessor
// would have 16 KiB in flight, of the 30 KiB above. width is at least N.
template <int N, int kHeld, class Visitor>
__device__ void for_each_slot(int width, const Visitor& visitor) {
#pragma unroll
  for (int slot = 0; slot < kHeld; ++slot) {
    const int column = (slot * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
    visitor(slot, column < width ? column : width - N);
  }
}

template <int kHeld>
constexpr int kSlots = kHeld > 0 ? kHeld : 1;

// Each value summed over the team, the same bits for all of its threads.
template <int kCount, class W>
__device__ void sum_over_team(W (&values)[kCount]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      values[c] += __shfl_xor_sync(0xffffffffu, values[c], distance);
    }
  }
  if (blockDim.x == 32) return;  // alike for the whole block: no thread is left waiting below
  __shared__ W shared[kCount][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  __syncthreads();  // the last call's values have been read
  if (lane == 0) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) shared[c][warp] = values[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] = lane < num_warps ? shared[c][lane] : W{0};
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      values[c] += __shfl_xor_sync(0xffffffffu, values[c], distance);
    }
  }
}

__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
__device__ inline int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

__device__ inline float reciprocal_sqrt(float value) { return 1.0f / sqrtf(value); }
__device__ inline double reciprocal_sqrt(double value) { return 1.0 / sqrt(value); }

template <class W>
__device__ W mean_of(W sum, int width) {
  return sum / static_cast<W>(width > 0 ? width : 1);
}

// block_sums (width) = the sums of the block's teams, added in order. Called by all threads.
template <int N, int kHeld, class W>
__device__ void store_sums(W* block_sums, const W (&sums)[kHeld][N], int width) {
  for (int team = 0; team < static_cast<int>(blockDim.y); ++team) {
    if (static_cast<int>(threadIdx.y) == team) {
      for_each_pack<N, kHeld>(width, [&](int slot, int column) {
        W total[N] = {};
        if (team > 0) load(total, block_sums + column);
#pragma unroll
        for (int j = 0; j < N; ++j) total[j] += sums[slot][j];
        store(block_sums + column, total);
      });
    }
    __syncthreads();  // the next team reads what this one stored
  }
}

// The same for rows that are not held: a block has one team then, and adds row by row. Each element
// of sums is one thread's.
template <int N, class W>
__device__ void add_to_sums(W* sums, const W (&values)[N], int column, bool is_first_row) {
  W total[N] = {};
  if (!is_first_row) load(total, sums + column);
#pragma unroll
  for (int j = 0; j < N; ++j) total[j] += values[j];
  store<false>(sums + column, total);
}

// As much shared memory as the launch has asked for.
__device__ inline void* shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

// Sums of rows that are not held: number `place` of those in shared memory, or block_sums.
template <class W>
__device__ W* wide_sums(W* block_sums, bool in_shared, int place, int width) {
  if (!in_shared) return block_sums;
  return static_cast<W*>(shared_memory()) + static_cast<int64_t>(place) * width;
}

// block_sums (width) = those sums, after the last row.
template <int N, class W>
__device__ void store_wide_sums(W* block_sums, const W* sums, int width) {
  if (sums == block_sums) return;
  for_each_pack<N, 0>(width, [&](int, int column) {
    W total[N];
    load(total, sums + column);
    store(block_sums + column, total);
  });
}

constexpr int kColumns = 32, kParts = 32;

// output (width) = partial (num_partials, width) summed: kParts threads a column take every
// kParts-th row, then their sums are added in order. Block (kColumns, kParts).
template <class T, class W>
__global__ void __launch_bounds__(kColumns* kParts)
    sum_partials_kernel(T* output, const W* partial, int num_partials, int width) {
  __shared__ W sums[kParts][kColumns];
  const int column = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x);
  W sum = 0;
  if (column < width) {
    for (int row = threadIdx.y; row < num_partials; row += kParts) {
      sum += partial[static_cast<int64_t>(row) * width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int part = 1; part < kParts; ++part) sum += sums[part][threadIdx.x];
  output[column] = narrow<T>(sum);
}

}  // namespace dropbp
