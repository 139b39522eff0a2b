// CPU kernels of gated_residual_rms_norm on rows. Included by each_isa.h for each instruction set,
// hence no guard.
//
// A row is read twice: once for its statistic, and again, from the cache, for the result. W is the
// type of the arithmetic; factor is the weight, for Gemma 1 + weight in W. A 16-bit weight is
// widened as it is read: a wide copy would push the row out of the L1 cache from width 4096 on.
#include "row_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : RowKernels {
  template <class W, class T>
  static void offset_run(W* output, const T* values, W offset, int64_t count) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) store<W>(output + i, load<W>(values + i) + offset);
    if (i < count)
      store_part<W>(output + i, load_part<W>(values + i, count - i) + offset, count - i);
  }

  template <class R, class B, class F, class W>
  static void forward_rows(const R* residual, const B* branch, const F* factor, W eps, bool gemma,
                           B* normed, R* new_residual, W* rstd, int64_t num_rows, int64_t width) {
    constexpr int kStep = kLanes<W>;
    for (int64_t row = 0; row < num_rows; ++row) {
      Sums<W> squares;
      int64_t i = 0;
      for (; i + kStep * squares.kCount <= width; i += kStep * squares.kCount) {
#pragma GCC unroll 4
        for (int j = 0; j < squares.kCount; ++j) {
          const int64_t at = i + j * kStep;
          const auto x = rounded_to<R, W>(load<W>(residual + at) + load<W>(branch + at));
          store_rounded<W>(new_residual + at, x);
          squares.values[j] += x * x;
        }
      }
      for (; i < width; i += kStep) {
        const int64_t rest = width - i < kStep ? width - i : kStep;
        const auto x =
            rounded_to<R, W>(load_part<W>(residual + i, rest) + load_part<W>(branch + i, rest));
        store_part<W>(new_residual + i, x, rest);
        squares.values[0] += x * x;
      }
      const W scale = reciprocal_sqrt(mean_of(squares.total(), width) + eps);
      rstd[row] = scale;

      if (gemma) {
        normalize_row<true>(new_residual, factor, scale, normed, width);
      } else {
        normalize_row<false>(new_residual, factor, scale, normed, width);
      }
      residual += width, branch += width, normed += width, new_residual += width;
    }
  }

  // With n = x * rstd and g = grad_normed * factor: grad_residual = rstd * (g - n * mean(g * n)) +
  // grad_new_residual, and grad_weight gains grad_normed * n. grad_new_residual and grad_weight may
  // be null.
  template <class R, class B, class F, class W>
  static void backward_rows(const B* grad_normed, const R* grad_new_residual, const R* x,
                            const F* factor, const W* rstd, R* grad_residual, W* grad_weight,
                            int64_t num_rows, int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const W sum = grad_weight
                        ? dot_row<true>(grad_normed, x, factor, rstd[row], grad_weight, width)
                        : dot_row<false>(grad_normed, x, factor, rstd[row], grad_weight, width);
      const W mean = mean_of(sum, width);
      if (grad_new_residual) {
        grad_row<true>(grad_normed, grad_new_residual, x, factor, rstd[row], mean, grad_residual,
                       width);
        grad_new_residual += width;
      } else {
        grad_row<false>(grad_normed, grad_new_residual, x, factor, rstd[row], mean, grad_residual,
                        width);
      }
      grad_normed += width, x += width, grad_residual += width;
    }
  }

 private:
  template <bool kGemma, class B, class W, class V>
  static DROPBP_INLINE V weighted(V normalized, V factor) {
    return kGemma ? normalized * factor : factor * rounded_to<B, W>(normalized);
  }

  template <bool kGemma, class R, class B, class F, class W>
  static DROPBP_INLINE void normalize_row(const R* x, const F* factor, W scale, B* normed,
                                          int64_t width) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      store<W>(normed + i, weighted<kGemma, B, W>(load<W>(x + i) * scale, load<W>(factor + i)));
    }
    if (i < width) {
      const int64_t rest = width - i;
      const auto normalized = load_part<W>(x + i, rest) * scale;
      store_part<W>(normed + i, weighted<kGemma, B, W>(normalized, load_part<W>(factor + i, rest)),
                    rest);
    }
  }

  // The sum of g * n over a row; grad_weight gains grad_normed * n.
  template <bool kWeightGrad, class R, class B, class F, class W>
  static DROPBP_INLINE W dot_row(const B* grad_normed, const R* x, const F* factor, W scale,
                                 W* grad_weight, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> sums;
    int64_t i = 0;
    for (; i + kStep * sums.kCount <= width; i += kStep * sums.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < sums.kCount; ++j) {
        const int64_t at = i + j * kStep;
        const auto product = load<W>(grad_normed + at) * (load<W>(x + at) * scale);
        if (kWeightGrad) store<W>(grad_weight + at, load<W>(grad_weight + at) + product);
        sums.values[j] += product * load<W>(factor + at);
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto product =
          load_part<W>(grad_normed + i, rest) * (load_part<W>(x + i, rest) * scale);
      if (kWeightGrad) {
        store_part<W>(grad_weight + i, load_part<W>(grad_weight + i, rest) + product, rest);
      }
      sums.values[0] += product * load_part<W>(factor + i, rest);
    }
    return sums.total();
  }

  template <bool kGradNew, class R, class B, class F, class W>
  static DROPBP_INLINE void grad_row(const B* grad_normed, const R* grad_new_residual, const R* x,
                                     const F* factor, W scale, W mean, R* grad_residual,
                                     int64_t width) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      prefetch_next_row(grad_normed + i, x + i, width);
      auto grad =
          scale * (load<W>(grad_normed + i) * load<W>(factor + i) - load<W>(x + i) * scale * mean);
      if (kGradNew) grad += load<W>(grad_new_residual + i);
      store<W>(grad_residual + i, grad);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto grad = scale * (load_part<W>(grad_normed + i, rest) * load_part<W>(factor + i, rest) -
                           load_part<W>(x + i, rest) * scale * mean);
      if (kGradNew) grad += load_part<W>(grad_new_residual + i, rest);
      store_part<W>(grad_residual + i, grad, rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
