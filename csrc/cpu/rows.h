// What CPU kernels over rows share: parameters as kernels read them, and gradients that are
// summed over blocks of rows. Needs with_kernels of each_isa.h and Kernels with the
// functions of row_kernels.h.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "../norms.h"
#include "dispatch.h"

namespace dropbp {

inline int64_t row_grain(int64_t width) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
}

// A parameter, plus an offset, in W; a copy only where there is something to change.
template <class W>
class Widened {
 public:
  explicit Widened(const Tensor& parameter, W offset = 0) : parameter_(dense(parameter)) {
    visit_dtype("weight", parameter_.scalar_type(), [&](auto t) {
      using T = decltype(t);
      const T* values = input<T>(parameter_);
      if constexpr (std::is_same_v<T, W>) {
        if (offset == 0) {
          data_ = values;
          return;
        }
      }
      buffer_.reset(new W[parameter_.numel()]);
      with_kernels([&](auto kernels) {
        kernels.widen_run(buffer_.get(), values, offset, parameter_.numel());
      });
      data_ = buffer_.get();
    });
  }
  const W* data() const { return data_; }

 private:
  Tensor parameter_;
  std::unique_ptr<W[]> buffer_;
  const W* data_ = nullptr;
};

// Calls visitor(weight + offset, bias) with pointers as the kernels over a branch of B read them:
// as they are where their dtype is W or B, else as copies in W. Widening in registers is cheap, and
// a wide copy of a 16-bit weight would push the row out of the L1 cache from width 4096 on.
template <class W, class B, class Visitor>
void visit_parameters(const Tensor& weight_tensor, const std::optional<Tensor>& bias_tensor,
                      W offset, const Visitor& visitor) {
  const Tensor weight = dense(weight_tensor);
  std::optional<Tensor> bias;
  if (bias_tensor) {
    check_dtype("bias", *bias_tensor, weight.scalar_type());
    bias = dense(*bias_tensor);
  }
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, W> || std::is_same_v<T, B>) {
      if (offset == 0) return visitor(input<T>(weight), bias ? input<T>(*bias) : nullptr);
    }
    const Widened<W> wide_weight(weight, offset);
    std::optional<Widened<W>> wide_bias;
    if (bias) wide_bias.emplace(*bias);
    visitor(wide_weight.data(), wide_bias ? wide_bias->data() : nullptr);
  });
}

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

// Calls run(first row, row after the last, sums of weight gradients, sums of bias gradients) for
// all rows, on all threads. Sums (width), null where no gradient is wanted, are added to; in the
// end they are in grad_weight and grad_bias.
template <class W, class Run>
void run_with_parameter_grads(int64_t num_rows, int64_t width, bool weight_grad,
                              const Tensor& grad_weight, bool bias_grad, const Tensor& grad_bias,
                              const Run& run) {
  W* const none = nullptr;
  if (!weight_grad && !bias_grad) {
    torch::stable::parallel_for(0, num_rows, row_grain(width),
                                [&](int64_t begin, int64_t end) { run(begin, end, none, none); });
    return;
  }
  const RowBlocks blocks(num_rows);
  const int64_t size = blocks.num_blocks * width;
  const std::unique_ptr<W[]> weight_partial(weight_grad ? new W[size] : nullptr);
  const std::unique_ptr<W[]> bias_partial(bias_grad ? new W[size] : nullptr);
  blocks.for_each(width, [&](int64_t block, int64_t begin, int64_t end) {
    W* weight_sums = weight_grad ? weight_partial.get() + block * width : none;
    W* bias_sums = bias_grad ? bias_partial.get() + block * width : none;
    if (weight_grad) std::fill_n(weight_sums, width, W{0});
    if (bias_grad) std::fill_n(bias_sums, width, W{0});
    run(begin, end, weight_sums, bias_sums);
  });
  if (weight_grad) blocks.sum(grad_weight, weight_partial.get(), width);
  if (bias_grad) blocks.sum(grad_bias, bias_partial.get(), width);
}

}  // namespace dropbp
