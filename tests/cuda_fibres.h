// The parts of a GPU that device code with barriers and shuffles uses, on a CPU: one fibre for each
// thread of a block. To be included before the kernels, after CUDA's headers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <utility>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(threads)

static dim3 blockDim, gridDim;
static uint3 threadIdx, blockIdx;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  uint3 thread;
  bool is_done = false;
  int block_round = -1;  // of the block's meeting that it waits for
};
struct Meeting {
  int num_here = 0, round = 0;
};

static std::vector<Fibre> fibres;
static std::function<void()> body;
static ucontext_t scheduler;
static size_t current;
static Meeting block_meeting, warp_meetings[32];
static double exchanged[1024];

static void wait_for_others() { swapcontext(&fibres[current].context, &scheduler); }

static void meet(Meeting& meeting, int num_expected) {
  const int round = meeting.round;
  if (++meeting.num_here == num_expected) {
    meeting.num_here = 0;
    ++meeting.round;
  }
  while (meeting.round == round) wait_for_others();
}

static void __syncthreads() {
  fibres[current].block_round = block_meeting.round;
  meet(block_meeting, static_cast<int>(fibres.size()));
  fibres[current].block_round = -1;
}

template <class W>
W __shfl_xor_sync(unsigned, W value, int distance) {
  Meeting& meeting = warp_meetings[current / 32];
  exchanged[current] = static_cast<double>(value);
  meet(meeting, 32);
  const W other = static_cast<W>(exchanged[current ^ static_cast<size_t>(distance)]);
  meet(meeting, 32);
  return other;
}

// Shared memory whose size the launch says, and bytes behind it that nobody may write. NaN at
// first.
static std::vector<unsigned char> shared;
constexpr size_t kBehind = 64;
static int num_failed = 0;

namespace dropbp {
void* shared_memory() { return shared.data(); }
}  // namespace dropbp

static void fibre_main() {
  body();
  fibres[current].is_done = true;
  wait_for_others();
}

// Lets each thread of a warp go on that does not wait for the block; whether there was one.
static bool run_warp(size_t warp) {
  bool has_run = false;
  for (current = warp * 32; current < std::min(warp * 32 + 32, fibres.size()); ++current) {
    const Fibre& fibre = fibres[current];
    if (fibre.is_done || fibre.block_round == block_meeting.round) continue;
    has_run = true;
    threadIdx = fibre.thread;
    swapcontext(&scheduler, &fibres[current].context);
  }
  return has_run;
}

static void launch(unsigned num_blocks, dim3 block, std::function<void()> kernel,
                   size_t shared_bytes = 0) {
  gridDim = dim3(num_blocks);
  blockDim = block;
  body = std::move(kernel);
  for (unsigned b = 0; b < num_blocks; ++b) {
    blockIdx = uint3{b, 0, 0};
    shared.assign(shared_bytes + kBehind, 0xff);
    fibres.resize(block.x * block.y);  // stacks are used again
    for (size_t i = 0; i < fibres.size(); ++i) {
      fibres[i].is_done = false;
      fibres[i].block_round = -1;
      fibres[i].thread =
          uint3{static_cast<unsigned>(i) % block.x, static_cast<unsigned>(i) / block.x, 0};
      getcontext(&fibres[i].context);
      fibres[i].context.uc_stack.ss_sp = fibres[i].stack.data();
      fibres[i].context.uc_stack.ss_size = fibres[i].stack.size();
      makecontext(&fibres[i].context, fibre_main, 0);
    }
    // A warp runs until all of it waits for the block, and only then the next: what one warp writes
    // without a barrier before it, it writes before another one has read what was there.
    const size_t num_warps = (fibres.size() + 31) / 32;
    for (size_t num_waiting = 0; num_waiting < num_warps;) {
      num_waiting = 0;
      for (size_t warp = 0; warp < num_warps; ++warp) {
        bool has_run = run_warp(warp);
        num_waiting += !has_run;
        while (has_run) has_run = run_warp(warp);
      }
    }
    for (size_t i = shared_bytes; i < shared.size(); ++i) {
      if (shared[i] == 0xff) continue;
      std::printf("%zu bytes of shared memory: one more was written\n", shared_bytes);
      ++num_failed;
    }
  }
}
