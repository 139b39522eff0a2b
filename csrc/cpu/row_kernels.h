// What vector code over rows shares. Included by <op>_kernels.h for each instruction set,
// hence no guard. W is the type of the arithmetic.
namespace dropbp::DROPBP_ISA {
namespace {

// Several sums at once, because each waits for its own last addition only.
template <class W>
struct Sums {
  static constexpr int kCount = 4;
  Vector<W, kLanes<W>> values[kCount] = {};

  DROPBP_INLINE W total() const {
    return sum_of<W>((values[0] + values[1]) + (values[2] + values[3]));
  }
};

DROPBP_INLINE float reciprocal_sqrt(float value) { return 1 / __builtin_sqrtf(value); }
DROPBP_INLINE double reciprocal_sqrt(double value) { return 1 / __builtin_sqrt(value); }

template <class W>
DROPBP_INLINE W mean_of(W sum, int64_t width) {
  return sum / static_cast<W>(width > 0 ? width : 1);
}

struct RowKernels {
  // output[i] = values[i] + offset.
  template <class W, class T>
  static void widen_run(W* output, const T* values, W offset, int64_t count) {
    constexpr int kStep = kLanes<W>;
    for (int64_t i = 0; i < count; i += kStep) {
      const int64_t rest = count - i < kStep ? count - i : kStep;
      store_part<W>(output + i, load_part<W>(values + i, rest) + offset, rest);
    }
  }

  // output[i] = the sum of partial (num_blocks, width) over blocks, in order, for `count` columns.
  template <class T, class W>
  static void sum_blocks(T* output, const W* partial, int64_t num_blocks, int64_t width,
                         int64_t count) {
    constexpr int kStep = kLanes<W>;
    for (int64_t i = 0; i < count; i += kStep) {
      const int64_t rest = count - i < kStep ? count - i : kStep;
      auto sum = load_part<W>(partial + i, rest);
      for (int64_t block = 1; block < num_blocks; ++block) {
        sum += load_part<W>(partial + block * width + i, rest);
      }
      store_part<W>(output + i, sum, rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
