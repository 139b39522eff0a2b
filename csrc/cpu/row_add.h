// Sums of a stream and rows that lie elsewhere. Needs with_kernels of each_isa.h and Kernels of
// gated_residual_add_kernels.h.
#pragma once

#include <algorithm>

#include "dispatch.h"

namespace dropbp {

// Cuts elements [begin, end) of an array (num_rows, row_size) at the ends of its rows.
template <class Visitor>
void for_each_row_part(int64_t begin, int64_t end, int64_t row_size, const Visitor& visitor) {
  while (begin < end) {
    const int64_t column = begin % row_size;
    const int64_t count = std::min(row_size - column, end - begin);
    visitor(begin / row_size, column, count);
    begin += count;
  }
}

// Where nothing is converted, memory is the limit and 32-byte vectors reach it best: beyond the L2
// cache 5 to 25 % faster than 64-byte ones (Zen 4, November 2026).
template <class R, class B, class... Next>
void add_run(R* output, const R* residual, const B* branch, int64_t count, const Next*... next) {
  constexpr int kMaxVectorBytes = std::is_same_v<R, B> && sizeof(R) >= 4 ? 32 : 64;
  with_kernels<kMaxVectorBytes>(
      [&](auto kernels) { kernels.add_run(output, residual, branch, count, next...); });
}

// output = residual, both (num_rows, row_size), plus the row that branch_of(row) points to; null
// where there is none. In the stream's order, so that one of three arrays alone is read by jumps.
template <class R, class B, class BranchOf>
void add_rows(const Tensor& output_tensor, const Tensor& residual, int64_t num_rows,
              int64_t row_size, const BranchOf& branch_of) {
  R* out = output<R>(output_tensor);
  const R* res = input<R>(residual);
  torch::stable::parallel_for(0, num_rows * row_size, kGrain, [&](int64_t begin, int64_t end) {
    for_each_row_part(begin, end, row_size, [&](int64_t row, int64_t column, int64_t count) {
      const int64_t at = row * row_size + column;
      const B* branch = branch_of(row);
      if (branch == nullptr) {
        std::copy_n(res + at, count, out + at);
        return;
      }
      const B* next = branch_of(std::min(row + 1, num_rows - 1));
      add_run(out + at, res + at, branch + column, count, next);
    });
  });
}

}  // namespace dropbp
