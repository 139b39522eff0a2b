// exp of vectors, and the normal distribution. Included by <op>_kernels.h for each instruction set,
// after vector.h, hence no guard.
//
// Of floats by polynomials (fitted here, by weighted least squares towards the smallest largest
// error), of doubles, which are there for gradcheck, one by one through libm. kIsShort: for results
// that are rounded to 16 bits, whose last place is 100 times the error of the shorter polynomials.
namespace dropbp::DROPBP_ISA {

// NaN stays NaN.
template <int N>
DROPBP_INLINE Vector<float, N> clamped(Vector<float, N> x, float low, float high) {
  using Floats = Vector<float, N>;
#if DROPBP_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m512 value = bits_as<__m512>(x);
    return bits_as<Floats>(
        _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), value)));
  }
#elif DROPBP_VECTOR_BYTES == 32
  if constexpr (N == 8) {
    const __m256 value = bits_as<__m256>(x);
    return bits_as<Floats>(
        _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), value)));
  }
#endif
  x = x < low ? Floats{} + low : x;
  return x > high ? Floats{} + high : x;
}

template <int N>
DROPBP_INLINE Vector<double, N> clamped(Vector<double, N> x, double low, double high) {
  using Doubles = Vector<double, N>;
  x = x < low ? Doubles{} + low : x;
  return x > high ? Doubles{} + high : x;
}

// exp(scale * x) for every x: 0 below 2^-126, infinite from 2^127.5 on, NaN for NaN. The product is
// rounded, so the relative error grows to 6e-8 * |scale * x|, as a rounding of x itself would do.
template <bool kIsShort, int N>
DROPBP_INLINE Vector<float, N> exp_of(Vector<float, N> x, float scale) {
  using Floats = Vector<float, N>;
  using Bits = Vector<uint32_t, N>;
  const Floats y = clamped<N>(x * (scale * 0x1.715476p+0f), -127.0f, 128.0f);  // log2(e)
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
  const Floats shifted = y + 0x1.8p+23f;
  const Floats f = y - (shifted - 0x1.8p+23f);
  // 2^f for |f| <= 1/2, to 3e-6 or 9e-8.
  Floats power;
  if constexpr (kIsShort) {
    power = ((f * 9.58285171e-3f + 5.59064266e-2f) * f + 2.40240987e-1f) * f + 6.93124193e-1f;
  } else {
    power =
        (((f * 1.32647253e-3f + 9.67151277e-3f) * f + 5.55073375e-2f) * f + 2.40222421e-1f) * f +
        6.93146978e-1f;
  }
  power = power * f + 1.0f;
  // 2^n: n = -127 gives 0 and n = 128 infinity.
  return power * bits_as<Floats>((bits_as<Bits>(shifted) + 127u) << 23);
}

template <bool kIsShort, int N>
DROPBP_INLINE Vector<double, N> exp_of(Vector<double, N> x, double scale) {
  for (int lane = 0; lane < N; ++lane) x[lane] = __builtin_exp(x[lane] * scale);
  return x;
}

// exp(-x^2 / 2) and the normal distribution function at x.
template <class V>
struct Normal {
  V bell;
  V below;
};

template <bool kIsShort, int N>
DROPBP_INLINE Normal<Vector<float, N>> normal_of(Vector<float, N> x) {
  using Floats = Vector<float, N>;
  const Floats bell = exp_of<kIsShort, N>(x * x, -0.5f);
  const Floats distance = bits_as<Floats>(bits_as<Vector<uint32_t, N>>(x) & 0x7fffffffu);
  // What lies beyond |x|, over bell: a polynomial in t, to 5e-6 or 1.5e-7 of it for |x| <= 14.
  Floats t, tail;
  if constexpr (kIsShort) {
    t = 1.0f / (distance * 0.31f + 1.0f);
    tail = t * -7.39293582e-2f + 1.80450983e-1f;
    tail = tail * t + 1.57440131e-2f;
    tail = tail * t + 1.33430133e-1f;
    tail = tail * t + 1.204412e-1f;
    tail = tail * t + 1.23860708e-1f;
  } else {
    t = 1.0f / (distance * 0.3f + 1.0f);
    tail = t * 3.56748758e-2f + -1.57203495e-1f;
    tail = tail * t + 2.0635419e-1f;
    tail = tail * t + -5.36842408e-2f;
    tail = tail * t + 1.28561922e-1f;
    tail = tail * t + 9.99134093e-2f;
    tail = tail * t + 1.20753968e-1f;
    tail = tail * t + 1.19629298e-1f;
  }
  tail = tail * (t * bell);
  return {bell, x < 0.0f ? tail : 1.0f - tail};
}

template <bool kIsShort, int N>
DROPBP_INLINE Normal<Vector<double, N>> normal_of(Vector<double, N> x) {
  Vector<double, N> below;
  for (int lane = 0; lane < N; ++lane) {
    below[lane] = 0.5 * (1 + __builtin_erf(x[lane] * 0x1.6a09e667f3bcdp-1));
  }
  return {exp_of<kIsShort, N>(x * x, -0.5), below};
}

}  // namespace dropbp::DROPBP_ISA
