// CPU kernels of gated_residual_layer_norm on rows. Included by each_isa.h for each instruction
// set, hence no guard.
#include "norm_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : NormKernels {
  // bias may be null.
  template <class R, class B, class F, class W>
  static void forward_rows(const R* residual, const B* branch, const F* weight, const F* bias,
                           W eps, B* normed, R* new_residual, W* mean, W* rstd, int64_t num_rows,
                           int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      mean[row] = mean_of(add_row<false, W>(residual, branch, new_residual, width), width);
      const W squares = sum_row<true, W>(new_residual, mean[row], width);
      rstd[row] = reciprocal_sqrt(mean_of(squares, width) + eps);
      norm_of_row(new_residual, weight, bias, Centred<W>{mean[row], rstd[row]}, false, normed,
                  width, residual + width, branch + width);
      residual += width, branch += width, normed += width, new_residual += width;
    }
  }

  // grad_new_residual, grad_weight and grad_bias may be null.
  template <class R, class B, class F, class W>
  static void backward_rows(const B* grad_normed, const R* grad_new_residual, const R* x,
                            const F* weight, const W* mean, const W* rstd, R* grad_residual,
                            W* grad_weight, W* grad_bias, int64_t num_rows, int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      gradient_of_row(grad_normed, grad_new_residual, x, weight, Centred<W>{mean[row], rstd[row]},
                      grad_residual, grad_weight, grad_bias, width, grad_normed + width, x + width);
      grad_normed += width, x += width, grad_residual += width;
      if (grad_new_residual) grad_new_residual += width;
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
