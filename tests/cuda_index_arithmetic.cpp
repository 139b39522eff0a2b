// The CUDA kernels of flat arrays, compiled for the host: one thread of a launch over more than
// 2^31 elements, on memory that is reserved and never filled. Built and run by test_addresses.py.
//
// A thread writes one pack and reads its inputs; a wrong (for instance 32-bit) address would leave
// the reserved memory and stop the program, or leave the expected place zero.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda_threads.h"
// After it:
#include "../csrc/cuda/column_update_kernel.cuh"
#include "../csrc/cuda/gated_residual_add_kernel.cuh"
#include "../csrc/cuda/partial_gather_kernel.cuh"
#include "../csrc/cuda/permuted_residual_add_kernel.cuh"

namespace {

int num_failures = 0;

void expect(const char* what, double actual, double expected) {
  if (actual == expected) return;
  std::printf("%s: expected %g, got %g\n", what, expected, actual);
  ++num_failures;
}

// Zeros that take no memory before they are touched.
template <class T>
T* reserve(int64_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("no address space\n");
    std::exit(77);
  }
  return static_cast<T*>(memory);
}

constexpr int64_t kWidth = 4096, kRows = (int64_t{1} << 21) + 8, kCount = kRows * kWidth;
static_assert(kCount > int64_t{1} << 32, "beyond unsigned 32-bit numbers too");

// The thread whose pack of kN elements starts at `at`, in a grid that covers everything at once.
template <int kN>
void be_thread_of(int64_t at) {
  blockDim = {256};
  gridDim = {static_cast<unsigned>((kCount / kN + 255) / 256)};
  blockIdx = {static_cast<unsigned>(at / kN / 256)};
  threadIdx = {static_cast<unsigned>(at / kN % 256)};
}

template <int kN>
void check() {
  float* residual = reserve<float>(kCount);
  float* branch = reserve<float>(kCount);
  float* output = reserve<float>(kCount);
  int64_t* rows = reserve<int64_t>(kRows);
  float* scale = reserve<float>(kRows);
  // Beyond 2^31, beyond 2^32, and the last pack.
  for (const int64_t at :
       {(int64_t{1} << 31) + 3 * kWidth, (int64_t{1} << 32) + 5 * kWidth, kCount - kN}) {
    const int64_t row = at / kWidth, column = at % kWidth;
    be_thread_of<kN>(at);

    residual[at] = 1, branch[at] = 2;
    dropbp::gated_residual_add_kernel<float, float, kN>(output, residual, branch, nullptr, 0,
                                                        kWidth, kCount);
    expect("gated_residual_add", output[at], 3);
    expect("gated_residual_add, its neighbour", output[at - 1], 0);
    output[at] = 0;

    // The branch's row `row` belongs at row 0 of the residual, and back.
    rows[row] = 0, residual[column] = 5;
    dropbp::gated_residual_add_kernel<float, float, kN>(output, residual, branch, rows, kRows,
                                                        kWidth, kCount);
    expect("gated_residual_add by rows, from far", output[column], 7);
    output[column] = 0, branch[column] = 4, rows[0] = row;
    be_thread_of<kN>(column);
    dropbp::gated_residual_add_kernel<float, float, kN>(output, residual, branch, rows, kRows,
                                                        kWidth, kWidth);
    expect("gated_residual_add by rows, to far", output[at], 5);
    output[at] = 0;

    scale[row] = 3, scale[0] = 2;
    dropbp::gated_residual_add_backward_kernel<float, float, float, kN>(
        output, residual, rows, scale, 10.0f, kRows, kWidth, kWidth);
    expect("gated_residual_add_backward, gradient from far", output[column], 20);
    output[column] = 0;
    be_thread_of<kN>(at);
    dropbp::gated_residual_add_backward_kernel<float, float, float, kN>(
        output, residual, nullptr, scale, 10.0f, kRows, kWidth, kCount);
    expect("gated_residual_add_backward, to far", output[at], 30);
    output[at] = 0;

    // A quarter of the rows is kept, so that the far row stands in the dropped part.
    constexpr int64_t kNumKept = kRows / 4;
    dropbp::permuted_residual_add_kernel<float, float, kN>(output, residual, branch,
                                                           branch + kNumKept * kWidth, rows, kRows,
                                                           kNumKept, kWidth, kCount);
    expect("permuted_residual_add, from far", output[column], 7);
    output[column] = residual[column] = branch[column] = residual[at] = branch[at] = 0;
    rows[row] = rows[0] = 0, scale[row] = scale[0] = 0;
  }
}

// Channels of a far row, and columns of a weight whose rows, or whose columns, are far apart.
void check_channels() {
  constexpr int64_t kChannels = 2;
  float* input = reserve<float>(kCount);
  float* output = reserve<float>(kRows * kChannels);
  const int64_t index[kChannels] = {7, kWidth - 1}, row = kRows - 1;
  const int64_t far = row * kWidth + kWidth - 1, compact = row * kChannels + 1;
  const int64_t count = kRows * kChannels;
  input[far] = 3;
  be_thread_of<1>(compact);
  gridDim = {static_cast<unsigned>((count + 255) / 256)};
  dropbp::partial_gather_kernel<float>(output, input, index, kWidth, kWidth, kChannels, count);
  expect("partial_gather, from far", output[compact], 3);

  float* delta = reserve<float>(count);
  delta[compact] = 5, output[compact] = 0;
  const dropbp::Columns by_row{index, kRows, kChannels, kWidth, kWidth, 1};
  dropbp::column_update_kernel<float, float, float>(input, output, delta, by_row, 2.0f, count);
  expect("column_update, far row", input[far], 13);
  expect("column_update, what was there", output[compact], 3);
  dropbp::column_restore_kernel<float>(input, output, by_row, count);
  expect("column_restore, far row", input[far], 3);

  // The same place as the last column of a weight (kWidth, kRows) that lies transposed.
  const int64_t columns[kChannels] = {7, kRows - 1};
  const dropbp::Columns by_column{columns, kWidth, kChannels, kRows, 1, kWidth};
  const int64_t last = 2 * kWidth - 1;  // element (kWidth - 1, 1), both by column and by row
  delta[last] = 5;
  be_thread_of<1>(last);
  gridDim = {static_cast<unsigned>((2 * kWidth + 255) / 256)};
  dropbp::column_update_kernel<float, float, float>(input, output, delta, by_column, 2.0f,
                                                    kWidth * kChannels);
  expect("column_update, far column", input[far], 13);
  expect("column_update, what was there in it", output[last], 3);
}

}  // namespace

int main() {
  check<1>();
  check<4>();
  check_channels();
  return num_failures != 0;
}
