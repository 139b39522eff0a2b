// CPU kernel of l1_distances on a block of pairs. Included by each_isa.h for each instruction set,
// hence no guard.
namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels {
  // Rows of a tile: kTile * kTile sums and kTile values are held in registers.
  static constexpr int kTile = 4;

  // distances[i * distance_stride + j] = the L1 distance of row i of a and row j of b, rows of
  // `width` elements at `stride`, for a tile of kRows by kColumns. Each load serves several pairs.
  template <int kRows, int kColumns, class W, class T>
  static void distance_tile(W* distances, int64_t distance_stride, const T* a, const T* b,
                            int64_t stride, int64_t width) {
    constexpr int kStep = kLanes<W>;
    using V = Vector<W, kStep>;
    V sums[kRows][kColumns] = {};
    for (int64_t at = 0; at < width; at += kStep) {
      const int64_t rest = width - at < kStep ? width - at : kStep;
      V left[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) left[i] = load_part<W>(a + i * stride + at, rest);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        const V right = load_part<W>(b + j * stride + at, rest);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sums[i][j] += magnitude<W>(left[i] - right);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        distances[i * distance_stride + j] = sum_of<W>(sums[i][j]);
      }
    }
  }

 private:
  template <class W>
  static DROPBP_INLINE Vector<W, kLanes<W>> magnitude(Vector<W, kLanes<W>> value) {
    using Word = std::conditional_t<std::is_same_v<W, double>, uint64_t, uint32_t>;
    using Bits = Vector<Word, kLanes<W>>;
    return bits_as<Vector<W, kLanes<W>>>(bits_as<Bits>(value) & (~Word{0} >> 1));
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
