// CPU kernels of permuted_norm on one row. Included by each_isa.h for each instruction set, hence
// no guard. weight is the factor that is applied: for Gemma 1 + weight. mean is null for an RMS
// norm.
#include "norm_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : NormKernels {
  // bias may be null. next_x is the row that the next call reads.
  template <class R, class B, class F, class W>
  static void forward_row(const R* x, const F* weight, const F* bias, W eps, bool gemma, B* normed,
                          W* mean, W* rstd, int64_t width, const R* next_x) {
    if (mean) {
      *mean = mean_of(sum_row<false, W>(x, W{0}, width), width);
      *rstd = reciprocal_sqrt(mean_of(sum_row<true, W>(x, *mean, width), width) + eps);
      norm_of_row(x, weight, bias, Centred<W>{*mean, *rstd}, false, normed, width, next_x);
    } else {
      *rstd = reciprocal_sqrt(mean_of(sum_row<true, W>(x, W{0}, width), width) + eps);
      norm_of_row(x, weight, bias, Uncentred<W>{*rstd}, !gemma, normed, width, next_x);
    }
  }

  // grad_residual gains the gradient. grad_weight and grad_bias may be null. next_residual is the
  // row that the next call adds to.
  template <class R, class B, class F, class W>
  static void backward_row(const B* grad_kept, const R* x, const F* weight, const W* mean, W rstd,
                           R* grad_residual, W* grad_weight, W* grad_bias, int64_t width,
                           const R* next_residual) {
    if (mean) {
      gradient_of_row(grad_kept, grad_residual, x, weight, Centred<W>{*mean, rstd}, grad_residual,
                      grad_weight, grad_bias, width, grad_kept + width, x + width, next_residual);
    } else {
      gradient_of_row(grad_kept, grad_residual, x, weight, Uncentred<W>{rstd}, grad_residual,
                      grad_weight, grad_bias, width, grad_kept + width, x + width, next_residual);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
