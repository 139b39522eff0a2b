// CPU kernels of rope on the heads of one token. Included by each_isa.h for each instruction set,
// hence no guard.
namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

struct Kernels {
  // output may be x. C is the type of cos and sin.
  template <bool kTranspose, class T, class C>
  static void turn_heads(T* output, int64_t output_stride, const T* x, int64_t x_stride,
                         const C* cos, const C* sin, int64_t num_heads, int64_t half,
                         int64_t width) {
    using W = Wide<T>;
    constexpr int kStep = kLanes<W>;
    for (int64_t head = 0; head < num_heads; ++head) {
      int64_t i = 0;
      for (; i + kStep <= half; i += kStep) {
        const auto turned =
            turn<kTranspose, W>(load<W>(x + i), load<W>(x + half + i), load<W>(cos + i),
                                load<W>(cos + half + i), load<W>(sin + i), load<W>(sin + half + i));
        store<W>(output + i, turned.first);
        store<W>(output + half + i, turned.second);
      }
      if (i < half) {
        const int64_t rest = half - i;
        const auto turned =
            turn<kTranspose, W>(load_part<W>(x + i, rest), load_part<W>(x + half + i, rest),
                                load_part<W>(cos + i, rest), load_part<W>(cos + half + i, rest),
                                load_part<W>(sin + i, rest), load_part<W>(sin + half + i, rest));
        store_part<W>(output + i, turned.first, rest);
        store_part<W>(output + half + i, turned.second, rest);
      }
      if (output != x && width > 2 * half) {
        __builtin_memcpy(output + 2 * half, x + 2 * half, sizeof(T) * (width - 2 * half));
      }
      x += x_stride, output += output_stride;
    }
  }

 private:
  template <class V>
  struct Pair {
    V first, second;
  };

  template <bool kTranspose, class W, class V>
  static DROPBP_INLINE Pair<V> turn(V a, V b, V cos_a, V cos_b, V sin_a, V sin_b) {
    if (kTranspose) return {a * cos_a + b * sin_b, b * cos_b - a * sin_a};
    return {a * cos_a - b * sin_a, b * cos_b + a * sin_b};
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
