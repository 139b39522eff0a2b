// Element types of the CPU kernels and their conversions. No torch header.
//
// The kernels are plain loops. Everything here is free of branches, so that the compiler turns such
// a loop into vector instructions; DROPBP_CLONES makes it do so once for each x86-64 generation and
// pick when the library is loaded, so that one build serves every machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Only GCC clones templates. Elsewhere the baseline of the target serves, which on aarch64 has
// vectors.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__ELF__)
#define DROPBP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DROPBP_CLONES
#endif

namespace dropbp {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Sums and statistics of T are taken in this type.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether every value of From is a value of To.
template <class To, class From>
inline constexpr bool holds = std::is_same_v<To, From> || std::is_same_v<To, double> ||
                              (std::is_same_v<To, float> && !std::is_same_v<From, double>);

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline double to_native(double value) { return value; }
inline float to_native(float value) { return value; }
inline float to_native(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_native(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
  const uint32_t infinite_or_nan = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_from_bits(sign | (magnitude >= 0x7c00u ? infinite_or_nan : finite));
}

template <class W, class T>
inline W widen(T value) {
  return static_cast<W>(to_native(value));
}

// Rounds to the nearest value of T, ties to even; NaN stays NaN. From double to 16 bits by way of
// float, as PyTorch does.
template <class T, class W>
inline T narrow(W value) {
  if constexpr (std::is_same_v<T, double> || std::is_same_v<T, float>) {
    return static_cast<T>(value);
  } else {
    const uint32_t bits = bits_of(static_cast<float>(value));
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = (bits ^ magnitude) >> 16;
    const bool is_nan = magnitude > 0x7f800000u;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
      return {static_cast<uint16_t>(sign | (is_nan ? 0x7fc0u : rounded))};
    } else {
      const uint32_t rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      const uint32_t shifted = rounded - ((127u - 15u) << 10);
      const uint32_t normal = shifted > 0x7c00u ? 0x7c00u : shifted;
      // The last bit of 0.5f is worth 2^-24, the smallest Half: the addition does the rounding.
      const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
      const uint32_t number = magnitude < 0x38800000u ? subnormal : normal;
      return {static_cast<uint16_t>(sign | (is_nan ? 0x7e00u : number))};
    }
  }
}

}  // namespace dropbp
