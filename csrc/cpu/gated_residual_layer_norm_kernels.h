// CPU kernels of gated_residual_layer_norm on rows. Included by each_isa.h for each instruction
// set, hence no guard.
//
// A row is read from memory once; its mean, the squares around the mean and the result are three
// passes over the cache. W is the type of the arithmetic, also of weight and bias.
#include "row_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : RowKernels {
  // bias may be null.
  template <class R, class B, class W>
  static void forward_rows(const R* residual, const B* branch, const W* weight, const W* bias,
                           W eps, B* normed, R* new_residual, W* mean, W* rstd, int64_t num_rows,
                           int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      mean[row] = mean_of(add_row<R, B, W>(residual, branch, new_residual, width), width);
      const W variance = mean_of(squares_of_row(new_residual, mean[row], width), width);
      rstd[row] = reciprocal_sqrt(variance + eps);
      if (bias) {
        normalize_row<true>(new_residual, weight, bias, mean[row], rstd[row], normed, width);
      } else {
        normalize_row<false>(new_residual, weight, bias, mean[row], rstd[row], normed, width);
      }
      residual += width, branch += width, normed += width, new_residual += width;
    }
  }

  // With n = (x - mean) * rstd and g = grad_normed * weight:
  // grad_residual = rstd * (g - mean(g) - n * mean(g * n)) + grad_new_residual, grad_weight gains
  // grad_normed * n and grad_bias grad_normed. The last two and grad_new_residual may be null.
  template <class R, class B, class W>
  static void backward_rows(const B* grad_normed, const R* grad_new_residual, const R* x,
                            const W* weight, const W* mean, const W* rstd, R* grad_residual,
                            W* grad_weight, W* grad_bias, int64_t num_rows, int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const Norm<W> norm{mean[row], rstd[row]};
      W sum, dot;
      if (grad_weight && grad_bias) {
        dot_row<true, true>(grad_normed, x, weight, norm, grad_weight, grad_bias, width, sum, dot);
      } else if (grad_weight) {
        dot_row<true, false>(grad_normed, x, weight, norm, grad_weight, grad_bias, width, sum, dot);
      } else if (grad_bias) {
        dot_row<false, true>(grad_normed, x, weight, norm, grad_weight, grad_bias, width, sum, dot);
      } else {
        dot_row<false, false>(grad_normed, x, weight, norm, grad_weight, grad_bias, width, sum,
                              dot);
      }
      const W mean_grad = mean_of(sum, width), mean_dot = mean_of(dot, width);
      if (grad_new_residual) {
        grad_row<true>(grad_normed, grad_new_residual, x, weight, norm, mean_grad, mean_dot,
                       grad_residual, width);
        grad_new_residual += width;
      } else {
        grad_row<false>(grad_normed, grad_new_residual, x, weight, norm, mean_grad, mean_dot,
                        grad_residual, width);
      }
      grad_normed += width, x += width, grad_residual += width;
    }
  }

 private:
  template <class W>
  struct Norm {
    W mean, rstd;

    template <class V>
    DROPBP_INLINE V operator()(V x) const {
      return (x - mean) * rstd;
    }
  };

  // Stores the rounded sums of a row; the sum of those.
  template <class R, class B, class W>
  static DROPBP_INLINE W add_row(const R* residual, const B* branch, R* new_residual,
                                 int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> sums;
    int64_t i = 0;
    for (; i + kStep * sums.kCount <= width; i += kStep * sums.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < sums.kCount; ++j) {
        const int64_t at = i + j * kStep;
        const auto x = rounded_to<R, W>(load<W>(residual + at) + load<W>(branch + at));
        store_rounded<W>(new_residual + at, x);
        sums.values[j] += x;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto x =
          rounded_to<R, W>(load_part<W>(residual + i, rest) + load_part<W>(branch + i, rest));
      store_part<W>(new_residual + i, x, rest);
      sums.values[0] += x;
    }
    return sums.total();
  }

  // Around the mean: the mean of squares less the square of the mean would lose everything to a
  // large mean.
  template <class R, class W>
  static DROPBP_INLINE W squares_of_row(const R* x, W mean, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> squares;
    int64_t i = 0;
    for (; i + kStep * squares.kCount <= width; i += kStep * squares.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < squares.kCount; ++j) {
        const auto centred = load<W>(x + i + j * kStep) - mean;
        squares.values[j] += centred * centred;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      W centred[kStep];
      store<W>(centred, load_part<W>(x + i, rest) - mean);
      const auto kept = load_part<W>(centred, rest);  // beyond the row zero, and not -mean
      squares.values[0] += kept * kept;
    }
    return squares.total();
  }

  template <bool kBias, class R, class B, class W>
  static DROPBP_INLINE void normalize_row(const R* x, const W* weight, const W* bias, W mean,
                                          W rstd, B* normed, int64_t width) {
    constexpr int kStep = kLanes<W>;
    const Norm<W> norm{mean, rstd};
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      auto value = norm(load<W>(x + i)) * load<W>(weight + i);
      if (kBias) value += load<W>(bias + i);
      store<W>(normed + i, value);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto value = norm(load_part<W>(x + i, rest)) * load_part<W>(weight + i, rest);
      if (kBias) value += load_part<W>(bias + i, rest);
      store_part<W>(normed + i, value, rest);
    }
  }

  // sum = the sum of g over a row, dot = that of g * n; grad_weight gains grad_normed * n and
  // grad_bias grad_normed.
  template <bool kWeightGrad, bool kBiasGrad, class R, class B, class W>
  static DROPBP_INLINE void dot_row(const B* grad_normed, const R* x, const W* weight, Norm<W> norm,
                                    W* grad_weight, W* grad_bias, int64_t width, W& sum, W& dot) {
    constexpr int kStep = kLanes<W>;
    Sums<W> sums, dots;
    int64_t i = 0;
    for (; i + kStep * sums.kCount <= width; i += kStep * sums.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < sums.kCount; ++j) {
        const int64_t at = i + j * kStep;
        const auto grad = load<W>(grad_normed + at), normalized = norm(load<W>(x + at));
        if (kWeightGrad) store<W>(grad_weight + at, load<W>(grad_weight + at) + grad * normalized);
        if (kBiasGrad) store<W>(grad_bias + at, load<W>(grad_bias + at) + grad);
        const auto scaled = grad * load<W>(weight + at);
        sums.values[j] += scaled;
        dots.values[j] += scaled * normalized;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto grad = load_part<W>(grad_normed + i, rest);
      const auto normalized = norm(load_part<W>(x + i, rest));
      if (kWeightGrad) {
        store_part<W>(grad_weight + i, load_part<W>(grad_weight + i, rest) + grad * normalized,
                      rest);
      }
      if (kBiasGrad) store_part<W>(grad_bias + i, load_part<W>(grad_bias + i, rest) + grad, rest);
      const auto scaled = grad * load_part<W>(weight + i, rest);  // beyond the row zero
      sums.values[0] += scaled;
      // Beyond the row n is -mean * rstd, and infinite where the mean is: zero times that is NaN.
      W products[kStep];
      store<W>(products, scaled * normalized);
      dots.values[0] += load_part<W>(products, rest);
    }
    sum = sums.total();
    dot = dots.total();
  }

  template <bool kGradNew, class R, class B, class W>
  static DROPBP_INLINE void grad_row(const B* grad_normed, const R* grad_new_residual, const R* x,
                                     const W* weight, Norm<W> norm, W mean_grad, W mean_dot,
                                     R* grad_residual, int64_t width) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      prefetch_next_row(grad_normed + i, x + i, width);
      auto grad = norm.rstd * (load<W>(grad_normed + i) * load<W>(weight + i) - mean_grad -
                               norm(load<W>(x + i)) * mean_dot);
      if (kGradNew) grad += load<W>(grad_new_residual + i);
      store<W>(grad_residual + i, grad);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto grad =
          norm.rstd * (load_part<W>(grad_normed + i, rest) * load_part<W>(weight + i, rest) -
                       mean_grad - norm(load_part<W>(x + i, rest)) * mean_dot);
      if (kGradNew) grad += load_part<W>(grad_new_residual + i, rest);
      store_part<W>(grad_residual + i, grad, rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
