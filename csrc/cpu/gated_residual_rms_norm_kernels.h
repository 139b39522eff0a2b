// CPU kernels of gated_residual_rms_norm on rows. Included by each_isa.h for each instruction set,
// hence no guard. weight is the factor that is applied: for Gemma 1 + weight.
#include "norm_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : NormKernels {
  template <class R, class B, class F, class W>
  static void forward_rows(const R* residual, const B* branch, const F* weight, W eps, bool gemma,
                           B* normed, R* new_residual, W* rstd, int64_t num_rows, int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const W squares = add_row<true, W>(residual, branch, new_residual, width);
      rstd[row] = reciprocal_sqrt(mean_of(squares, width) + eps);
      const F* no_bias = nullptr;
      norm_of_row(new_residual, weight, no_bias, Uncentred<W>{rstd[row]}, !gemma, normed, width,
                  residual + width, branch + width);
      residual += width, branch += width, normed += width, new_residual += width;
    }
  }

  // grad_new_residual and grad_weight may be null.
  template <class R, class B, class F, class W>
  static void backward_rows(const B* grad_normed, const R* grad_new_residual, const R* x,
                            const F* weight, const W* rstd, R* grad_residual, W* grad_weight,
                            int64_t num_rows, int64_t width) {
    for (int64_t row = 0; row < num_rows; ++row) {
      W* no_bias = nullptr;
      gradient_of_row(grad_normed, grad_new_residual, x, weight, Uncentred<W>{rstd[row]},
                      grad_residual, grad_weight, no_bias, width, grad_normed + width, x + width);
      grad_normed += width, x += width, grad_residual += width;
      if (grad_new_residual) grad_new_residual += width;
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
