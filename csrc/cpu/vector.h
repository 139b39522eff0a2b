// Vectors of DROPBP_VECTOR_BYTES in namespace DROPBP_ISA: loads and stores that convert. Included
// by each_isa.h for each instruction set, hence no guard. Arithmetic is that of GCC's vector
// extension, which clang has too, on every machine.
namespace dropbp::DROPBP_ISA {

#ifndef DROPBP_INLINE  // -DDROPBP_INLINE=inline compiles faster where speed does not matter
#define DROPBP_INLINE inline __attribute__((always_inline))
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

// How many elements of W, which is float or double, a kernel works on at once.
template <class W>
constexpr int kLanes = DROPBP_VECTOR_BYTES / sizeof(W);

template <class To, class From>
DROPBP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T>
DROPBP_INLINE V load_raw(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

// 16 bits to 32 and back, high halves zero. By hand where GCC would split the vector in two.
template <int N>
DROPBP_INLINE Vector<uint32_t, N> widen(Vector<uint16_t, N> narrow) {
#if DROPBP_VECTOR_BYTES > 16
  if constexpr (N == 8) {
    return bits_as<Vector<uint32_t, N>>(_mm256_cvtepu16_epi32(bits_as<__m128i>(narrow)));
  }
#endif
#if DROPBP_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    return bits_as<Vector<uint32_t, N>>(_mm512_cvtepu16_epi32(bits_as<__m256i>(narrow)));
  }
#endif
  return __builtin_convertvector(narrow, Vector<uint32_t, N>);
}

template <int N>
DROPBP_INLINE Vector<uint16_t, N> narrow(Vector<uint32_t, N> wide) {
#if DROPBP_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    return bits_as<Vector<uint16_t, N>>(_mm512_cvtepi32_epi16(bits_as<__m512i>(wide)));
  }
#endif
  return __builtin_convertvector(wide, Vector<uint16_t, N>);
}

// Half to float by its bits: what F16C does in one instruction.
template <int N>
DROPBP_INLINE Vector<float, N> from_half(Vector<uint16_t, N> half) {
  using Bits = Vector<uint32_t, N>;
  const Bits bits = widen<N>(half);
  const Bits magnitude = bits & 0x7fffu;
  const Bits normal = (magnitude << 13) + ((127u - 15u) << 23);
  const Bits infinite_or_nan = (magnitude << 13) | 0x7f800000u;
  using Floats = Vector<float, N>;
  using Ints = Vector<int32_t, N>;
  const Bits subnormal =
      bits_as<Bits>(__builtin_convertvector(bits_as<Ints>(magnitude), Floats) * 0x1p-24f);
  const Bits finite = magnitude < 0x0400u ? subnormal : normal;
  return bits_as<Floats>(((bits & 0x8000u) << 16) |
                         (magnitude >= 0x7c00u ? infinite_or_nan : finite));
}

template <int N>
DROPBP_INLINE Vector<uint16_t, N> to_half(Vector<float, N> value) {
  using Bits = Vector<uint32_t, N>;
  const Bits bits = bits_as<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits shifted =
      ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - ((127u - 15u) << 10);
  const Bits normal = shifted > 0x7c00u ? Bits{} + 0x7c00u : shifted;
  // The last bit of 0.5f is worth 2^-24, the smallest Half: the addition does the rounding.
  const Bits subnormal = bits_as<Bits>(bits_as<Vector<float, N>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits number = magnitude < 0x38800000u ? subnormal : normal;
  const Bits rounded = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : number;
  return __builtin_convertvector(((bits >> 16) & 0x8000u) | rounded, Vector<uint16_t, N>);
}

// N elements as floats, for the 16-bit types.
template <int N>
DROPBP_INLINE Vector<float, N> load_floats(const BFloat16* from) {
  return bits_as<Vector<float, N>>(widen<N>(load_raw<Vector<uint16_t, N>>(from)) << 16);
}

template <int N>
DROPBP_INLINE Vector<float, N> load_floats(const Half* from) {
#if DROPBP_VECTOR_BYTES > 16
  if constexpr (N == 8) {
    return bits_as<Vector<float, N>>(_mm256_cvtph_ps(load_raw<__m128i>(from)));
  }
#endif
#if DROPBP_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    return bits_as<Vector<float, N>>(_mm512_cvtph_ps(load_raw<__m256i>(from)));
  }
#endif
  return from_half<N>(load_raw<Vector<uint16_t, N>>(from));
}

// To the nearest BFloat16, as float.
template <int N>
DROPBP_INLINE Vector<float, N> round_to_bfloat16(Vector<float, N> value) {
  using Bits = Vector<uint32_t, N>;
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return bits_as<Vector<float, N>>(value != value ? Bits{} + 0x7fc00000u : rounded);
}

// Stores floats that are BFloat16 already.
template <int N>
DROPBP_INLINE void store_exact(BFloat16* to, Vector<float, N> value) {
  const auto raw = narrow<N>(bits_as<Vector<uint32_t, N>>(value) >> 16);
  __builtin_memcpy(to, &raw, sizeof(raw));
}

template <int N>
DROPBP_INLINE void store_floats(BFloat16* to, Vector<float, N> value) {
  store_exact<N>(to, round_to_bfloat16<N>(value));
}

template <int N>
DROPBP_INLINE void store_floats(Half* to, Vector<float, N> value) {
#if DROPBP_VECTOR_BYTES > 16
  if constexpr (N == 8) {
    const __m128i raw = _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(to, &raw, sizeof(raw));
    return;
  }
#endif
#if DROPBP_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m256i raw = _mm512_cvtps_ph(bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(to, &raw, sizeof(raw));
    return;
  }
#endif
  const auto raw = to_half<N>(value);
  __builtin_memcpy(to, &raw, sizeof(raw));
}

// kLanes<W> elements of T as W.
template <class W, class T>
DROPBP_INLINE Vector<W, kLanes<W>> load(const T* from) {
  constexpr int N = kLanes<W>;
  if constexpr (std::is_same_v<T, W>) {
    return load_raw<Vector<W, N>>(from);
  } else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return __builtin_convertvector((load_raw<Vector<T, N>>(from)), Vector<W, N>);
  } else if constexpr (std::is_same_v<W, float>) {
    return load_floats<N>(from);
  } else {
    return __builtin_convertvector(load_floats<N>(from), Vector<W, N>);
  }
}

// Rounds to T, to nearest with ties to even; NaN stays NaN. From double to 16 bits by way of float,
// as PyTorch does.
template <class W, class T>
DROPBP_INLINE void store(T* to, Vector<W, kLanes<W>> value) {
  constexpr int N = kLanes<W>;
  if constexpr (std::is_same_v<T, W>) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    const auto raw = __builtin_convertvector(value, Vector<T, N>);
    __builtin_memcpy(to, &raw, sizeof(raw));
  } else if constexpr (std::is_same_v<W, float>) {
    store_floats<N>(to, value);
  } else {
    store_floats<N>(to, __builtin_convertvector(value, Vector<float, N>));
  }
}

// The same for the first `count` elements, at most kLanes<W>; the others are zeros.
template <class W, class T>
DROPBP_INLINE Vector<W, kLanes<W>> load_part(const T* from, int64_t count) {
  if (count == kLanes<W>) return load<W>(from);
  T buffer[kLanes<W>] = {};
  __builtin_memcpy(buffer, from, count * sizeof(T));
  return load<W>(buffer);
}

template <class W, class T>
DROPBP_INLINE void store_part(T* to, Vector<W, kLanes<W>> value, int64_t count) {
  if (count == kLanes<W>) return store<W>(to, value);
  T buffer[kLanes<W>];
  store<W>(buffer, value);
  __builtin_memcpy(to, buffer, count * sizeof(T));
}

// value rounded to T, as W.
template <class T, class W, class V>
DROPBP_INLINE V rounded_to(V value) {
  if constexpr (std::is_same_v<T, W>) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<W, float>) {
    return round_to_bfloat16<kLanes<W>>(value);
  } else {
    T buffer[kLanes<W>];
    store<W>(buffer, value);
    return load<W>(buffer);
  }
}

// Stores what rounded_to<T> returned.
template <class W, class T>
DROPBP_INLINE void store_rounded(T* to, Vector<W, kLanes<W>> value) {
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<W, float>) {
    store_exact<kLanes<W>>(to, value);
  } else {
    store<W>(to, value);
  }
}

// By halves: one after the other, the additions of 16 lanes would take as long as a short row.
template <class W, int N = kLanes<W>>
DROPBP_INLINE W sum_of(Vector<W, N> vector) {
  if constexpr (N == 2) {
    return vector[0] + vector[1];
  } else {
    struct Halves {
      Vector<W, N / 2> low, high;
    };
    const auto halves = bits_as<Halves>(vector);
    return sum_of<W, N / 2>(halves.low + halves.high);
  }
}

}  // namespace dropbp::DROPBP_ISA
