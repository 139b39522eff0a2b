// CPU kernels of permuted_norm on one row. Included by each_isa.h for each instruction set, hence
// no guard.
//
// A row is read from memory once and then from the cache: for its mean, its variance, the result. W
// is the type of the arithmetic; factor is the weight in W, for Gemma 1 + weight.
#include "row_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : RowKernels {
  template <class W>
  struct Row {
    W mean, rstd;
  };

  // output[i] = values[i] + offset.
  template <class W, class T>
  static void offset_run(W* output, const T* values, W offset, int64_t count) {
    constexpr int kStep = kLanes<W>;
    for (int64_t i = 0; i < count; i += kStep) {
      const int64_t rest = count - i < kStep ? count - i : kStep;
      store_part<W>(output + i, load_part<W>(values + i, rest) + offset, rest);
    }
  }

  template <class R, class W>
  static void statistics(const R* x, bool centered, W eps, Row<W>* found, int64_t width) {
    const W mean = centered ? mean_of(sum_row<false>(x, W{0}, width), width) : W{0};
    *found = {mean, reciprocal_sqrt(mean_of(sum_row<true>(x, mean, width), width) + eps)};
  }

  // The norm of a row. bias may be null. rounds_first: to B before the product with factor.
  template <class R, class B, class W>
  static void normalize(const R* x, const W* factor, const W* bias, Row<W> row, bool rounds_first,
                        B* normed, int64_t width) {
    if (rounds_first) {
      normalize_row<true, false>(x, factor, bias, row, normed, width);
    } else if (bias) {
      normalize_row<false, true>(x, factor, bias, row, normed, width);
    } else {
      normalize_row<false, false>(x, factor, bias, row, normed, width);
    }
  }

  // With n = (x - mean) * rstd and g = grad_kept * factor: grad_residual gains rstd * (g - n *
  // mean(g * n) - mean(g)), the last term if centered; grad_weight gains grad_kept * n and
  // grad_bias grad_kept. These two may be null.
  template <class R, class B, class W>
  static void backward_row(const B* grad_kept, const R* x, const W* factor, Row<W> row,
                           bool centered, R* grad_residual, W* grad_weight, W* grad_bias,
                           int64_t width) {
    constexpr int kStep = kLanes<W>;
    if (grad_bias) {
      for (int64_t i = 0; i < width; i += kStep) {
        const int64_t rest = width - i < kStep ? width - i : kStep;
        const auto sum = load_part<W>(grad_bias + i, rest) + load_part<W>(grad_kept + i, rest);
        store_part<W>(grad_bias + i, sum, rest);
      }
    }
    W product, shift;
    if (grad_weight) {
      dot_row<true>(grad_kept, x, factor, row, grad_weight, &product, &shift, width);
    } else {
      dot_row<false>(grad_kept, x, factor, row, grad_weight, &product, &shift, width);
    }
    product = mean_of(product, width);
    shift = centered ? mean_of(shift, width) : W{0};
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      const auto inner = load<W>(grad_kept + i) * load<W>(factor + i) -
                         (load<W>(x + i) - row.mean) * row.rstd * product - shift;
      store<W>(grad_residual + i, load<W>(grad_residual + i) + row.rstd * inner);
    }
    if (i < width) {
      const int64_t rest = width - i;
      const auto inner = load_part<W>(grad_kept + i, rest) * load_part<W>(factor + i, rest) -
                         (load_part<W>(x + i, rest) - row.mean) * row.rstd * product - shift;
      store_part<W>(grad_residual + i, load_part<W>(grad_residual + i, rest) + row.rstd * inner,
                    rest);
    }
  }

 private:
  // The sum of x - mean, or of its squares.
  template <bool kSquared, class R, class W>
  static DROPBP_INLINE W sum_row(const R* x, W mean, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> sums;
    int64_t i = 0;
    for (; i + kStep * sums.kCount <= width; i += kStep * sums.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < sums.kCount; ++j) {
        const auto value = load<W>(x + i + j * kStep) - mean;
        sums.values[j] += kSquared ? value * value : value;
      }
    }
    for (; i + kStep <= width; i += kStep) {
      const auto value = load<W>(x + i) - mean;
      sums.values[0] += kSquared ? value * value : value;
    }
    W rest = 0;  // one by one: beyond the row x - mean is not zero
    if (i < width) {
      const auto value = load_part<W>(x + i, width - i) - mean;
      for (int64_t lane = 0; lane < width - i; ++lane) {
        rest += kSquared ? value[lane] * value[lane] : value[lane];
      }
    }
    return sums.total() + rest;
  }

  template <bool kRoundsFirst, bool kBias, class R, class B, class W>
  static DROPBP_INLINE void normalize_row(const R* x, const W* factor, const W* bias, Row<W> row,
                                          B* normed, int64_t width) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      auto value = (load<W>(x + i) - row.mean) * row.rstd;
      if (kRoundsFirst) value = rounded_to<B, W>(value);
      value *= load<W>(factor + i);
      if (kBias) value += load<W>(bias + i);
      store<W>(normed + i, value);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto value = (load_part<W>(x + i, rest) - row.mean) * row.rstd;
      if (kRoundsFirst) value = rounded_to<B, W>(value);
      value *= load_part<W>(factor + i, rest);
      if (kBias) value += load_part<W>(bias + i, rest);
      store_part<W>(normed + i, value, rest);
    }
  }

  // product = the sum of g * n, shift = the sum of g; grad_weight gains grad_kept * n.
  template <bool kWeightGrad, class R, class B, class W>
  static DROPBP_INLINE void dot_row(const B* grad_kept, const R* x, const W* factor, Row<W> row,
                                    W* grad_weight, W* product, W* shift, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> products, shifts;
    int64_t i = 0;
    for (; i + kStep * products.kCount <= width; i += kStep * products.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < products.kCount; ++j) {
        const int64_t at = i + j * kStep;
        const auto grad = load<W>(grad_kept + at);
        const auto normalized = (load<W>(x + at) - row.mean) * row.rstd;
        const auto scaled = grad * load<W>(factor + at);
        if (kWeightGrad) {
          store<W>(grad_weight + at, load<W>(grad_weight + at) + grad * normalized);
        }
        products.values[j] += scaled * normalized;
        shifts.values[j] += scaled;
      }
    }
    for (; i < width; i += kStep) {  // beyond the row the gradient is zero
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto grad = load_part<W>(grad_kept + i, rest);
      const auto normalized = (load_part<W>(x + i, rest) - row.mean) * row.rstd;
      const auto scaled = grad * load_part<W>(factor + i, rest);
      if (kWeightGrad) {
        store_part<W>(grad_weight + i, load_part<W>(grad_weight + i, rest) + grad * normalized,
                      rest);
      }
      products.values[0] += scaled * normalized;
      shifts.values[0] += scaled;
    }
    *product = products.total();
    *shift = shifts.total();
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
