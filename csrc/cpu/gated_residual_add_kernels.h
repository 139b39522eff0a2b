// CPU kernels of gated_residual_add on runs of contiguous elements. Included by each_isa.h for each
// instruction set, hence no guard.
#include "row_kernels.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels : RowKernels {
  // output may be residual. `next` is what the following call reads first, where that lies
  // elsewhere.
  template <class R, class B, class... Next>
  static void add_run(R* output, const R* residual, const B* branch, int64_t count,
                      const Next*... next) {
    using W = Wide<R>;
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
    for (; i + 4 * kStep <= count; i += 4 * kStep) {
      Vector<W, kStep> sums[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        (__builtin_prefetch(next + i + j * kStep), ...);
        sums[j] = load<W>(residual + i + j * kStep) + load<W>(branch + i + j * kStep);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store<W>(output + i + j * kStep, sums[j]);
    }
    for (; i + kStep <= count; i += kStep) {
      store<W>(output + i, load<W>(residual + i) + load<W>(branch + i));
    }
    if (i < count) {
      const int64_t rest = count - i;
      const auto sum = load_part<W>(residual + i, rest) + load_part<W>(branch + i, rest);
      store_part<W>(output + i, sum, rest);
    }
  }

  template <class G, class B, class W>
  static void scale_run(B* output, const G* grad, W scale, int64_t count) {
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + kStep <= count; i += kStep) {
      store<W>(output + i, load<W>(grad + i) * scale);
    }
    if (i < count) {
      const auto scaled = load_part<W>(grad + i, count - i) * scale;
      store_part<W>(output + i, scaled, count - i);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
