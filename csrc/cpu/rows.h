// What CPU kernels over rows share: shapes, a weight in the type of the arithmetic, and gradients
// that are summed over blocks of rows. Needs with_kernels of each_isa.h and Kernels with the
// functions of row_kernels.h.
#pragma once

#include <algorithm>
#include <memory>

#include "dispatch.h"

namespace dropbp {

// Every tensor of `width` columns; the number of rows.
inline int64_t check_width(const Tensor& rows_by_width, int64_t width) {
  if (rows_by_width.dim() == 0 || rows_by_width.size(rows_by_width.dim() - 1) != width) {
    fail("weight: expected as many elements as the last dimension of residual, got ", width);
  }
  int64_t num_rows = 1;
  for (int64_t d = 0; d + 1 < rows_by_width.dim(); ++d) num_rows *= rows_by_width.size(d);
  return num_rows;
}

inline int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
}

// A value for each row of `rows_by_width`: one dimension less.
inline Tensor new_per_row(const Tensor& rows_by_width, ScalarType dtype) {
  return new_tensor(rows_by_width.sizes().data(), rows_by_width.dim() - 1, shim_dtype(dtype),
                    rows_by_width);
}

// A weight as W, float or double; a copy only where it has another dtype.
template <class W>
class Widened {
 public:
  explicit Widened(const Tensor& weight) : weight_(dense(weight)) {
    visit_dtype("weight", weight_.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const T* weight = input<T>(weight_);
      if constexpr (std::is_same_v<T, W>) {
        data_ = weight;
      } else {
        buffer_.reset(new W[weight_.numel()]);
        with_kernels(
            [&](auto kernels) { kernels.widen_run(buffer_.get(), weight, weight_.numel()); });
        data_ = buffer_.get();
      }
    });
  }
  const W* data() const { return data_; }

 private:
  Tensor weight_;
  std::unique_ptr<W[]> buffer_;
  const W* data_ = nullptr;
};

// A column sum over all rows, such as a weight gradient: taken over blocks of rows, then over
// blocks, in this order whatever the number of threads.
struct RowBlocks {
  // Many blocks keep many threads busy; few keep the buffer of partial sums small.
  static constexpr int64_t kMaxBlocks = 64;
  static constexpr int64_t kMinBlockRows = 32;

  explicit RowBlocks(int64_t num_rows)
      : num_rows(num_rows),
        block_rows(std::max(kMinBlockRows, (num_rows + kMaxBlocks - 1) / kMaxBlocks)),
        num_blocks(std::max<int64_t>(1, (num_rows + block_rows - 1) / block_rows)) {}

  // Calls visitor(block, first row, row after the last) for every block, on all threads.
  template <class Visitor>
  void for_each(int64_t width, const Visitor& visitor) const {
    const int64_t grain = std::max<int64_t>(1, row_grain(width) / block_rows);
    torch::stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        visitor(block, block * block_rows, std::min(num_rows, (block + 1) * block_rows));
      }
    });
  }

  // output (width) = partial (num_blocks, width) summed, in output's dtype.
  template <class W>
  void sum(const Tensor& output_tensor, const W* partial, int64_t width) const {
    visit_dtype("weight", output_tensor.scalar_type(), [&](auto t) {
      using T = decltype(t);
      T* sums = output<T>(output_tensor);
      const int64_t grain = std::max<int64_t>(64, kGrain / num_blocks);
      torch::stable::parallel_for(0, width, grain, [&](int64_t begin, int64_t end) {
        with_kernels([&](auto kernels) {
          kernels.sum_blocks(sums + begin, partial + begin, num_blocks, width, end - begin);
        });
      });
    });
  }

  const int64_t num_rows, block_rows, num_blocks;
};

}  // namespace dropbp
