// What the vector code of the norms shares, on one row: its statistics, the norm and its gradient.
// Included by <op>_kernels.h for each instruction set, hence no guard.
//
// A row is read from memory once and then from the cache. W is the type of the arithmetic, F that
// of weight and bias. `next` are the rows that the following call reads first: the pass that works
// from the cache asks memory for them, since the processor's own prefetch stops at every page and
// knows no permutation. They may lie beyond the end: asking is no access.
#include "row_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {

// n of a layer norm.
template <class W>
struct Centred {
  W mean, rstd;
  static constexpr bool kHasMean = true;
  template <class V>
  DROPBP_INLINE V operator()(V x) const {
    return (x - mean) * rstd;
  }
};

// n of an RMS norm.
template <class W>
struct Uncentred {
  W rstd;
  static constexpr bool kHasMean = false;
  template <class V>
  DROPBP_INLINE V operator()(V x) const {
    return x * rstd;
  }
};

struct NormKernels : RowKernels {
 protected:
  // Stores the rounded sums of a row; the sum of those, or of their squares.
  template <bool kSquared, class W, class R, class B>
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
        sums.values[j] += kSquared ? x * x : x;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto x =
          rounded_to<R, W>(load_part<W>(residual + i, rest) + load_part<W>(branch + i, rest));
      store_part<W>(new_residual + i, x, rest);
      sums.values[0] += kSquared ? x * x : x;
    }
    return sums.total();
  }

  // The sum of x - mean over a row, or of its squares: around the mean, since the mean of squares
  // less the square of the mean would lose everything to a large mean.
  template <bool kSquared, class W, class R>
  static DROPBP_INLINE W sum_row(const R* x, W mean, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> sums;
    int64_t i = 0;
    for (; i + kStep * sums.kCount <= width; i += kStep * sums.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < sums.kCount; ++j) {
        const auto centred = load<W>(x + i + j * kStep) - mean;
        sums.values[j] += kSquared ? centred * centred : centred;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto centred = first_lanes<W>(load_part<W>(x + i, rest) - mean, rest);
      sums.values[0] += kSquared ? centred * centred : centred;
    }
    return sums.total();
  }

  // normed = n * weight + bias; is_rounded_first: n to B before that, as Llama's norm does. bias
  // may be null.
  template <class R, class B, class F, class Norm, class... Next>
  static DROPBP_INLINE void norm_of_row(const R* x, const F* weight, const F* bias, Norm norm,
                                        bool is_rounded_first, B* normed, int64_t width,
                                        const Next*... next) {
    if (is_rounded_first && bias) {
      normalize_row<true, true>(x, weight, bias, norm, normed, width, next...);
    } else if (is_rounded_first) {
      normalize_row<true, false>(x, weight, bias, norm, normed, width, next...);
    } else if (bias) {
      normalize_row<false, true>(x, weight, bias, norm, normed, width, next...);
    } else {
      normalize_row<false, false>(x, weight, bias, norm, normed, width, next...);
    }
  }

  // With g = grad_normed * weight: grad_residual = rstd * (g - n * mean(g * n) - mean(g)) +
  // grad_new_residual, the last mean for Centred; grad_weight gains grad_normed * n and grad_bias
  // grad_normed. These two and grad_new_residual may be null; grad_residual may be the last.
  template <class R, class B, class F, class Norm, class W, class... Next>
  static DROPBP_INLINE void gradient_of_row(const B* grad_normed, const R* grad_new_residual,
                                            const R* x, const F* weight, Norm norm,
                                            R* grad_residual, W* grad_weight, W* grad_bias,
                                            int64_t width, const Next*... next) {
    Means<W> means;
    if (grad_weight && grad_bias) {
      means = dot_row<true, true>(grad_normed, x, weight, norm, grad_weight, grad_bias, width);
    } else if (grad_weight) {
      means = dot_row<true, false>(grad_normed, x, weight, norm, grad_weight, grad_bias, width);
    } else if (grad_bias) {
      means = dot_row<false, true>(grad_normed, x, weight, norm, grad_weight, grad_bias, width);
    } else {
      means = dot_row<false, false>(grad_normed, x, weight, norm, grad_weight, grad_bias, width);
    }
    if (grad_new_residual) {
      grad_row<true>(grad_normed, grad_new_residual, x, weight, norm, means, grad_residual, width,
                     next...);
    } else {
      grad_row<false>(grad_normed, grad_new_residual, x, weight, norm, means, grad_residual, width,
                      next...);
    }
  }

 private:
  // Over a row, of g * n and, for Centred, of g.
  template <class W>
  struct Means {
    W product, grad;
  };

  // Zeros behind the first `count` lanes: beyond the row x - mean is not zero, and may be infinite.
  template <class W, class V>
  static DROPBP_INLINE V first_lanes(V vector, int64_t count) {
    W lanes[kLanes<W>];
    store<W>(lanes, vector);
    return load_part<W>(lanes, count);
  }

  template <bool kRoundsFirst, bool kBias, class R, class B, class F, class Norm, class... Next>
  static DROPBP_INLINE void normalize_row(const R* x, const F* weight, const F* bias, Norm norm,
                                          B* normed, int64_t width, const Next*... next) {
    using W = decltype(norm.rstd);
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      (__builtin_prefetch(next + i), ...);
      auto value = norm(load<W>(x + i));
      if constexpr (kRoundsFirst) value = rounded_to<B, W>(value);
      value *= load<W>(weight + i);
      if constexpr (kBias) value += load<W>(bias + i);
      store<W>(normed + i, value);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto value = norm(load_part<W>(x + i, rest));
      if constexpr (kRoundsFirst) value = rounded_to<B, W>(value);
      value *= load_part<W>(weight + i, rest);
      if constexpr (kBias) value += load_part<W>(bias + i, rest);
      store_part<W>(normed + i, value, rest);
    }
  }

  template <bool kWeightGrad, bool kBiasGrad, class R, class B, class F, class Norm, class W>
  static DROPBP_INLINE Means<W> dot_row(const B* grad_normed, const R* x, const F* weight,
                                        Norm norm, W* grad_weight, W* grad_bias, int64_t width) {
    constexpr int kStep = kLanes<W>;
    Sums<W> products, grads;
    int64_t i = 0;
    for (; i + kStep * products.kCount <= width; i += kStep * products.kCount) {
#pragma GCC unroll 4
      for (int j = 0; j < products.kCount; ++j) {
        const int64_t at = i + j * kStep;
        const auto grad = load<W>(grad_normed + at), factor = load<W>(weight + at);
        const auto product = grad * norm(load<W>(x + at));
        if constexpr (kWeightGrad) {
          store<W>(grad_weight + at, load<W>(grad_weight + at) + product);
        }
        if constexpr (kBiasGrad) store<W>(grad_bias + at, load<W>(grad_bias + at) + grad);
        products.values[j] += product * factor;
        if constexpr (Norm::kHasMean) grads.values[j] += grad * factor;
      }
    }
    for (; i < width; i += kStep) {
      const int64_t rest = width - i < kStep ? width - i : kStep;
      const auto grad = load_part<W>(grad_normed + i, rest);
      const auto factor = load_part<W>(weight + i, rest);
      const auto product = grad * first_lanes<W>(norm(load_part<W>(x + i, rest)), rest);
      if constexpr (kWeightGrad) {
        store_part<W>(grad_weight + i, load_part<W>(grad_weight + i, rest) + product, rest);
      }
      if constexpr (kBiasGrad) {
        store_part<W>(grad_bias + i, load_part<W>(grad_bias + i, rest) + grad, rest);
      }
      products.values[0] += product * factor;
      if constexpr (Norm::kHasMean) grads.values[0] += grad * factor;
    }
    return {mean_of(products.total(), width),
            Norm::kHasMean ? mean_of(grads.total(), width) : W{0}};
  }

  template <bool kGradNew, class R, class B, class F, class Norm, class W, class... Next>
  static DROPBP_INLINE void grad_row(const B* grad_normed, const R* grad_new_residual, const R* x,
                                     const F* weight, Norm norm, Means<W> means, R* grad_residual,
                                     int64_t width, const Next*... next) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= width; i += kStep) {
      (__builtin_prefetch(next + i), ...);
      auto inner = load<W>(grad_normed + i) * load<W>(weight + i);
      if constexpr (Norm::kHasMean) inner -= means.grad;
      auto grad = norm.rstd * (inner - norm(load<W>(x + i)) * means.product);
      if constexpr (kGradNew) grad += load<W>(grad_new_residual + i);
      store<W>(grad_residual + i, grad);
    }
    if (i < width) {
      const int64_t rest = width - i;
      auto inner = load_part<W>(grad_normed + i, rest) * load_part<W>(weight + i, rest);
      if constexpr (Norm::kHasMean) inner -= means.grad;
      auto grad = norm.rstd * (inner - norm(load_part<W>(x + i, rest)) * means.product);
      if constexpr (kGradNew) grad += load_part<W>(grad_new_residual + i, rest);
      store_part<W>(grad_residual + i, grad, rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
