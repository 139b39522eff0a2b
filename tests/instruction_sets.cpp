// Runs the CPU kernels of every instruction set that this machine has on the same numbers and
// compares them with plain scalar code. Built and run by test_instruction_sets.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#define DROPBP_KERNELS "gated_residual_add_kernels.h"
#include "../csrc/cpu/each_isa.h"

using dropbp::BFloat16;
using dropbp::Half;

namespace {

int num_failures = 0;

void expect(bool good, const char* isa, const char* what, uint32_t input) {
  if (good || ++num_failures > 20) return;
  std::printf("%s: %s is wrong for %08x\n", isa, what, input);
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : bits_of(a) == bits_of(b); }

// The value of a Half by the definition of the format.
float value_of(Half half) {
  const int sign = half.bits >> 15, exponent = half.bits >> 10 & 31, mantissa = half.bits & 1023;
  const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(mantissa, -24)
                                           : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(sign ? -magnitude : magnitude);
}
float value_of(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// Whether `rounded` is the nearest T to value; of two equally near, the even one.
template <class T>
bool is_nearest(T rounded, float value) {
  if (std::isnan(value)) return std::isnan(value_of(rounded));
  if (std::signbit(value) != (rounded.bits >> 15 != 0)) return false;
  const uint16_t infinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
  const uint16_t magnitude = rounded.bits & 0x7fff;
  if (magnitude > infinity) return false;
  // Beyond the largest finite number the format goes on, for rounding, with a step as the last one.
  const auto extended = [&](uint16_t m) -> double {
    if (m < infinity) return std::fabs(static_cast<double>(value_of(T{m})));
    const double last = value_of(T{static_cast<uint16_t>(infinity - 1)});
    return last + (m - infinity + 1) * (last - value_of(T{static_cast<uint16_t>(infinity - 2)}));
  };
  const double target = std::fabs(static_cast<double>(value)), here = extended(magnitude);
  if (magnitude == infinity && target >= here) return true;
  const double up = (here + extended(magnitude + 1)) / 2;
  const double down = magnitude ? (here + extended(magnitude - 1)) / 2 : -1;
  const bool even = magnitude % 2 == 0;
  return even ? down <= target && target <= up : down < target && target < up;
}

template <class Kernels, class T>
void check_conversions(const char* isa, const std::vector<float>& floats) {
  std::vector<T> all(65536);
  for (uint32_t i = 0; i < all.size(); ++i) all[i].bits = static_cast<uint16_t>(i);
  std::vector<float> widened(all.size());
  Kernels::scale_run(widened.data(), all.data(), 1.0f, all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    expect(same(widened[i], value_of(all[i])), isa, "widening", all[i].bits);
  }
  std::vector<T> narrowed(floats.size());
  Kernels::scale_run(narrowed.data(), floats.data(), 1.0f, floats.size());
  for (size_t i = 0; i < floats.size(); ++i) {
    expect(is_nearest(narrowed[i], floats[i]), isa, "rounding", bits_of(floats[i]));
  }
}

// Every length up to a few vectors: the loop, the rest and nothing beyond the end.
template <class Kernels, class R, class B>
void check_lengths(const char* isa) {
  for (int64_t count = 0; count < 150; ++count) {
    std::vector<R> residual(count + 1), output(count + 1);
    std::vector<B> branch(count + 1);
    for (int64_t i = 0; i <= count; ++i)
      residual[i] = R(3 * i), branch[i] = B(i), output[i] = R(-1);
    Kernels::add_run(output.data(), residual.data(), branch.data(), count);
    for (int64_t i = 0; i < count; ++i) expect(output[i] == R(4 * i), isa, "a sum", count);
    expect(output[count] == R(-1), isa, "the end of a run", count);
  }
}

template <class Kernels>
void check(const char* isa, const std::vector<float>& floats) {
  check_conversions<Kernels, Half>(isa, floats);
  check_conversions<Kernels, BFloat16>(isa, floats);
  check_lengths<Kernels, float, float>(isa);
  check_lengths<Kernels, double, double>(isa);
  check_lengths<Kernels, double, float>(isa);
  std::printf("%s checked\n", isa);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  std::vector<float> floats;
  for (int i = 0; i < 300000; ++i) floats.push_back(from_bits(random()));
  // Around every Half and BFloat16 and the middles between them.
  for (uint32_t i = 0; i < 65536; ++i) {
    const float half = value_of(Half{static_cast<uint16_t>(i)});
    const float next = value_of(Half{static_cast<uint16_t>(i + 1)});
    for (const float f : {half, (half + next) / 2}) {
      floats.insert(floats.end(), {f, std::nextafter(f, 0.0f), std::nextafter(f, 1e30f)});
    }
    for (const uint32_t low : {0x0000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      floats.push_back(from_bits(i << 16 | low));
    }
  }
  check<dropbp::baseline::Kernels>("baseline", floats);
#if DROPBP_X86
  if (__builtin_cpu_supports("avx2")) check<dropbp::avx2::Kernels>("avx2", floats);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    check<dropbp::avx512::Kernels>("avx512", floats);
  }
#endif
  return num_failures != 0;
}
