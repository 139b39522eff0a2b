// Runs the norms of every instruction set that this machine has on rows of every width up to a few
// vectors and compares them with plain loops in double. Each row has memory of its own, so that
// sanitizers see an access beyond it. Built and run by test_instruction_sets.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#define DROPBP_KERNELS "permuted_norm_kernels.h"
#include "../csrc/cpu/each_isa.h"

using dropbp::BFloat16;
using dropbp::Wide;

namespace {

constexpr int64_t kWidest = 150;
int num_failures = 0;

double value_of(double value) { return value; }
double value_of(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Eighths, which every type holds.
template <class T>
std::vector<T> random_row(int64_t width) {
  static std::mt19937 generator(0);
  std::uniform_int_distribution<int> eighths(-32, 32);
  std::vector<T> row(width);
  for (T& element : row) {
    const float value = eighths(generator) / 8.0f;
    if constexpr (std::is_same_v<T, BFloat16>) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      element.bits = static_cast<uint16_t>(bits >> 16);
    } else {
      element = value;
    }
  }
  return row;
}

template <class T>
void expect(const char* isa, const char* what, int64_t width, const std::vector<T>& actual,
            const std::vector<double>& exact) {
  const double tolerance = std::is_same_v<T, double>  ? 1e-12
                           : std::is_same_v<T, float> ? 2e-5
                                                      : 8e-3;
  for (int64_t i = 0; i < width; ++i) {
    const double value = value_of(actual[i]);
    if (std::fabs(value - exact[i]) <= tolerance * std::fmax(1, std::fabs(exact[i]))) continue;
    if (++num_failures <= 20) {
      std::printf("%s, %s, width %lld: expected %g at %lld, got %g\n", isa, what,
                  static_cast<long long>(width), exact[i], static_cast<long long>(i), value);
    }
    return;
  }
}

template <class Kernels, class R, class B, class F>
void check_width(const char* isa, int64_t width, bool is_layer, bool has_bias) {
  using W = Wide<R>;
  constexpr W kEps = 0.5;
  const auto x = random_row<R>(width), stream = random_row<R>(width);
  const auto grad = random_row<B>(width);
  const auto weight = random_row<F>(width), bias = random_row<F>(width);
  std::vector<B> normed(width);
  std::vector<W> grad_weight(width, 1), grad_bias(width, 2);
  W mean = 0, rstd = 0;
  auto grad_residual = stream;
  // gemma: rounded once, as this test's own loop.
  Kernels::forward_row(x.data(), weight.data(), has_bias ? bias.data() : nullptr, kEps, true,
                       normed.data(), is_layer ? &mean : nullptr, &rstd, width, x.data());
  Kernels::backward_row(grad.data(), x.data(), weight.data(), is_layer ? &mean : nullptr, rstd,
                        grad_residual.data(), grad_weight.data(),
                        has_bias ? grad_bias.data() : nullptr, width, stream.data());

  double centre = 0, squares = 0, mean_grad = 0, mean_product = 0;
  for (int64_t i = 0; i < width; ++i) centre += is_layer ? value_of(x[i]) / width : 0;
  for (int64_t i = 0; i < width; ++i) squares += std::pow(value_of(x[i]) - centre, 2) / width;
  const double scale = 1 / std::sqrt(squares + kEps);
  std::vector<double> exact(width), exact_grad(width), weights(width), biases(width);
  const auto n = [&](int64_t i) { return (value_of(x[i]) - centre) * scale; };
  const auto g = [&](int64_t i) { return value_of(grad[i]) * value_of(weight[i]); };
  for (int64_t i = 0; i < width; ++i) {
    exact[i] = n(i) * value_of(weight[i]) + (has_bias ? value_of(bias[i]) : 0);
    weights[i] = 1 + value_of(grad[i]) * n(i);
    biases[i] = 2 + value_of(grad[i]);
    mean_product += g(i) * n(i) / width;
    if (is_layer) mean_grad += g(i) / width;
  }
  for (int64_t i = 0; i < width; ++i) {
    exact_grad[i] = value_of(stream[i]) + scale * (g(i) - mean_grad - n(i) * mean_product);
  }
  expect(isa, "norm", width, normed, exact);
  expect(isa, "gradient", width, grad_residual, exact_grad);
  expect(isa, "weight gradient", width, grad_weight, weights);
  if (has_bias) expect(isa, "bias gradient", width, grad_bias, biases);
}

template <class Kernels>
void check(const char* isa) {
  for (int64_t width = 1; width <= kWidest; ++width) {
    for (const bool is_layer : {false, true}) {
      for (const bool has_bias : {false, true}) {
        check_width<Kernels, float, float, float>(isa, width, is_layer, has_bias);
        check_width<Kernels, float, BFloat16, BFloat16>(isa, width, is_layer, has_bias);
        check_width<Kernels, BFloat16, BFloat16, float>(isa, width, is_layer, has_bias);
        check_width<Kernels, double, float, double>(isa, width, is_layer, has_bias);
      }
    }
  }
  std::printf("%s checked\n", isa);
}

}  // namespace

int main() {
  check<dropbp::baseline::Kernels>("baseline");
#if DROPBP_X86
  if (__builtin_cpu_supports("avx2")) check<dropbp::avx2::Kernels>("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    check<dropbp::avx512::Kernels>("avx512");
  }
#endif
  return num_failures != 0;
}
