// Runs the device code of the norms at the boundary on the CPU: one fibre for each thread of a
// block, which waits at __syncthreads and shuffles as a GPU's thread does. Results are compared
// with plain loops in double. What this cannot show: races, memory spaces, speed.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cuda_fibres.h"
// The kernels, for which the above stands in.
#include "../csrc/cuda/gated_residual_layer_norm_kernel.cuh"
#include "../csrc/cuda/gated_residual_rms_norm_kernel.cuh"
#include "../csrc/cuda/permuted_norm_kernel.cuh"
#include "../csrc/cuda/permuted_residual_add_kernel.cuh"

// ---- The test.

using dropbp::ElementType;
using dropbp::narrow;
using dropbp::Weight;
using dropbp::widen;

template <class T>
std::vector<T> random_values(size_t count, double mean = 0) {
  static std::mt19937 generator(0);
  std::normal_distribution<double> normal(mean, 1);
  std::vector<T> values(count);
  for (T& value : values) value = narrow<T>(normal(generator));
  return values;
}

template <class W>
std::vector<W> unwritten(size_t count) {
  return std::vector<W>(count, std::numeric_limits<W>::quiet_NaN());
}

template <class T>
void expect(const char* what, int width, const std::vector<T>& actual,
            const std::vector<double>& exact, double tolerance) {
  for (size_t i = 0; i < actual.size(); ++i) {
    const double value = widen<double>(actual[i]);
    if (std::abs(value - exact[i]) <= tolerance * std::max(1.0, std::abs(exact[i]))) continue;
    std::printf("%s, width %d: expected %g at %zu, got %g\n", what, width, exact[i], i, value);
    ++num_failed;
    return;
  }
}

// Both norms, forward and backward, of one kernel shape. T: residual, branch, weight. Backward in
// `num_blocks` blocks that stride over the rows.
template <class T, class W, int N, int kHeld>
void check(ElementType type, int width, dim3 block, double tolerance) {
  constexpr int kRows = 11;
  constexpr unsigned kBlocks = 2;
  constexpr double kEps = 0.5;
  const size_t count = static_cast<size_t>(kRows) * width;
  const auto residual = random_values<T>(count, 2), branch = random_values<T>(count);
  const auto weight = random_values<T>(width), bias = random_values<T>(width);
  const auto grad_normed = random_values<T>(count), grad_new = random_values<T>(count);
  const Weight factor{weight.data(), type}, shift{bias.data(), type}, none{nullptr, type};

  for (const int kind : {0, 1, 2}) {  // RMS of Llama, of Gemma, LayerNorm
    const bool is_layer = kind == 2, gemma = kind == 1;
    const char* name = is_layer ? "layer_norm" : gemma ? "rms_norm, gemma" : "rms_norm";
    std::vector<T> normed(count), sum(count), grad(count), frozen(count), alone(count);
    std::vector<W> mean(kRows), rstd(kRows);
    std::vector<W> partial = unwritten<W>(kBlocks * width), bias_partial = partial;
    std::vector<T> grad_weight(width), grad_bias(width);
    const T* added = grad_new.data();
    const auto backward = [&](auto column_sums, T* out, W* weights, W* biases,
                              bool in_shared = false) {
      constexpr bool kSums = decltype(column_sums)::value;
      const size_t num_sums = in_shared ? (weights != nullptr) + (is_layer && biases) : 0;
      const auto kernel = [&, out, weights, biases] {
        if (is_layer) {
          dropbp::gated_residual_layer_norm_backward_kernel<T, T, W, N, kHeld, kSums>(
              grad_normed.data(), added, sum.data(), factor, mean.data(), rstd.data(), out, weights,
              biases, in_shared, kRows, width);
        } else {
          dropbp::gated_residual_rms_norm_backward_kernel<T, T, W, N, kHeld, kSums>(
              grad_normed.data(), added, sum.data(), factor, gemma, rstd.data(), out, weights,
              in_shared, kRows, width);
        }
      };
      launch(kBlocks, block, kernel, num_sums * width * sizeof(W));
    };
    launch(kRows / 2, block, [&] {
      if (is_layer) {
        dropbp::gated_residual_layer_norm_kernel<T, T, W, N, kHeld>(
            residual.data(), branch.data(), factor, width % 2 ? none : shift, W{kEps},
            normed.data(), sum.data(), mean.data(), rstd.data(), kRows, width);
      } else {
        dropbp::gated_residual_rms_norm_kernel<T, T, W, N, kHeld>(
            residual.data(), branch.data(), factor, W{kEps}, gemma, normed.data(), sum.data(),
            rstd.data(), kRows, width);
      }
    });
    backward(std::true_type{}, grad.data(), partial.data(), bias_partial.data());
    backward(std::false_type{}, frozen.data(), nullptr, nullptr);
    added = nullptr;  // nothing reads the stream behind the norm
    backward(std::false_type{}, alone.data(), nullptr, nullptr);
    added = grad_new.data();
    if (kHeld == 0) {  // the same sums, taken in shared memory: of both, and of the bias alone
      std::vector<W> in_shared = unwritten<W>(partial.size()), biases = in_shared,
                     bias_alone = in_shared;
      backward(std::true_type{}, grad.data(), in_shared.data(), biases.data(), true);
      if (is_layer) backward(std::true_type{}, grad.data(), nullptr, bias_alone.data(), true);
      const bool is_same = !is_layer || (biases == bias_partial && bias_alone == bias_partial);
      if (in_shared != partial || !is_same) {
        std::printf("%s, width %d: other sums in shared memory\n", name, width);
        ++num_failed;
      }
    }
    const dim3 sum_block(dropbp::kColumns, dropbp::kParts);
    const unsigned sum_blocks = (width + dropbp::kColumns - 1) / dropbp::kColumns;
    for (auto [to, from] :
         {std::pair{&grad_weight, &partial}, std::pair{&grad_bias, &bias_partial}}) {
      launch(sum_blocks, sum_block, [&, to = to, from = from] {
        dropbp::sum_partials_kernel<T, W>(to->data(), from->data(), kBlocks, width);
      });
    }

    std::vector<double> x(count), out(count), grad_x(count), grad_alone(count), scale(kRows),
        weights(width), biases(width);
    for (int row = 0; row < kRows; ++row) {
      double centre = 0, squares = 0, dot = 0, mean_grad = 0;
      const size_t start = static_cast<size_t>(row) * width;
      for (int i = 0; i < width; ++i) {
        const size_t at = start + i;
        x[at] = widen<double>(narrow<T>(widen<W>(residual[at]) + widen<W>(branch[at])));
        if (is_layer) centre += x[at] / width;
      }
      for (int i = 0; i < width; ++i) squares += std::pow(x[start + i] - centre, 2);
      scale[row] = 1 / std::sqrt(squares / width + kEps);
      const auto n = [&](int i) { return (x[start + i] - centre) * scale[row]; };
      const auto w = [&](int i) { return widen<double>(weight[i]) + gemma; };
      for (int i = 0; i < width; ++i) {
        const double gradient = widen<double>(grad_normed[start + i]);
        out[start + i] = n(i) * w(i);
        if (is_layer && width % 2 == 0) out[start + i] += widen<double>(bias[i]);
        dot += gradient * w(i) * n(i) / width;
        if (is_layer) mean_grad += gradient * w(i) / width;
        weights[i] += gradient * n(i);
        biases[i] += gradient;
      }
      for (int i = 0; i < width; ++i) {
        const size_t at = start + i;
        const double gradient = widen<double>(grad_normed[at]) * w(i);
        grad_alone[at] = scale[row] * (gradient - mean_grad - n(i) * dot);
        grad_x[at] = grad_alone[at] + widen<double>(grad_new[at]);
      }
    }
    expect(name, width, sum, x, 0);
    expect(name, width, rstd, scale, 1e-5);
    expect(name, width, normed, out, tolerance);
    expect(name, width, grad, grad_x, tolerance);
    expect(name, width, alone, grad_alone, tolerance);
    expect(name, width, grad_weight, weights, tolerance);
    if (is_layer) expect(name, width, grad_bias, biases, tolerance);
    for (size_t i = 0; i < count; ++i) {
      if (widen<double>(grad[i]) == widen<double>(frozen[i])) continue;
      std::printf("%s, width %d: another gradient where weights are frozen\n", name, width);
      ++num_failed;
      break;
    }
  }
}

// The permuted norms and the permuted add on four entries of three rows each, two of them kept,
// against the kernels above on the rows that were gathered beforehand: the same values, but for the
// order of two products in a gradient.
template <class T, class W, int N, int kHeld>
void check_permuted(ElementType type, int width, dim3 block) {
  constexpr int kRowsPerEntry = 3, kRows = 4 * kRowsPerEntry, kKept = 2 * kRowsPerEntry;
  constexpr unsigned kBlocks = 2;
  constexpr double kEps = 0.5;
  const std::vector<int64_t> entries = {2, 0, 3, 1};
  const dropbp::Permutation permutation{entries.data(), 4, kRowsPerEntry};
  const size_t count = static_cast<size_t>(kRows) * width, kept_count = count / 2;
  const auto residual = random_values<T>(count, 2), grad_residual = random_values<T>(count);
  const auto grad_kept = random_values<T>(kept_count);
  const auto weight = random_values<T>(width), bias = random_values<T>(width);
  const Weight factor{weight.data(), type}, shift{bias.data(), type};
  const auto gathered = [&](const std::vector<T>& from) {
    std::vector<T> rows(count);
    for (size_t i = 0; i < count; ++i) {
      const size_t row = i / width, entry = entries[row / kRowsPerEntry];
      rows[i] = from[(entry * kRowsPerEntry + row % kRowsPerEntry) * width + i % width];
    }
    return rows;
  };
  const auto same = [&](const char* what, const auto& actual, const auto& wanted, size_t size,
                        double tolerance = 0) {
    for (size_t i = 0; i < size; ++i) {
      const double value = widen<double>(actual[i]), other = widen<double>(wanted[i]);
      if (std::abs(value - other) <= tolerance * std::max(1.0, std::abs(other))) continue;
      std::printf("%s, width %d: another value at %zu\n", what, width, i);
      ++num_failed;
      return;
    }
  };
  const std::vector<T> x = gathered(residual), zeros(count), grad_x = gathered(grad_residual);
  for (const int kind : {0, 1, 2}) {  // RMS of Llama, of Gemma, LayerNorm
    const bool is_layer = kind == 2, gemma = kind == 1;
    std::vector<T> normed(count), sum(count), kept(kept_count), dropped(kept_count), kept_x(count);
    std::vector<T> wanted_grad(kept_count), grad = grad_residual;
    std::vector<W> mean(kRows), rstd(kRows), kept_mean = unwritten<W>(kKept), kept_rstd(kKept);
    const size_t size = kBlocks * width;
    std::vector<W> weights = unwritten<W>(size), biases = weights, wanted_weights = weights,
                   wanted_biases = weights;
    launch(kRows / 2, block, [&] {
      if (is_layer) {
        dropbp::gated_residual_layer_norm_kernel<T, T, W, N, kHeld>(
            x.data(), zeros.data(), factor, shift, W{kEps}, normed.data(), sum.data(), mean.data(),
            rstd.data(), kRows, width);
      } else {
        dropbp::gated_residual_rms_norm_kernel<T, T, W, N, kHeld>(
            x.data(), zeros.data(), factor, W{kEps}, gemma, normed.data(), sum.data(), rstd.data(),
            kRows, width);
      }
    });
    launch(kRows / 2, block, [&] {
      dropbp::permuted_norm_kernel<T, T, W, N, kHeld>(
          residual.data(), factor, is_layer ? shift : Weight{nullptr, type}, permutation, W{kEps},
          is_layer, gemma, kept.data(), dropped.data(), kept_x.data(), kept_mean.data(),
          kept_rstd.data(), kKept, width);
    });
    same("kept", kept, normed, kept_count);
    same("dropped", dropped, std::vector<T>(normed.begin() + kept_count, normed.end()), kept_count);
    same("kept rows", kept_x, x, kept_count);
    same("rstd", kept_rstd, rstd, kKept);
    launch(kBlocks, block, [&] {
      if (is_layer) {
        dropbp::gated_residual_layer_norm_backward_kernel<T, T, W, N, kHeld, true>(
            grad_kept.data(), grad_x.data(), x.data(), factor, mean.data(), rstd.data(),
            wanted_grad.data(), wanted_weights.data(), wanted_biases.data(), false, kKept, width);
      } else {
        dropbp::gated_residual_rms_norm_backward_kernel<T, T, W, N, kHeld, true>(
            grad_kept.data(), grad_x.data(), x.data(), factor, gemma, rstd.data(),
            wanted_grad.data(), wanted_weights.data(), false, kKept, width);
      }
    });
    const bool in_shared = kHeld == 0;
    const auto permuted = [&] {
      dropbp::permuted_norm_backward_kernel<T, T, W, N, kHeld, true>(
          grad_kept.data(), kept_x.data(), factor, kept_mean.data(), kept_rstd.data(), permutation,
          is_layer, gemma, grad.data(), weights.data(), is_layer ? biases.data() : nullptr,
          in_shared, kKept, width);
    };
    launch(kBlocks, block, permuted, in_shared ? (1 + is_layer) * width * sizeof(W) : 0);
    const std::vector<T> moved = gathered(grad);
    same("grad of kept rows", moved, wanted_grad, kept_count, 1e-5);
    same("grad of dropped rows", std::vector<T>(moved.begin() + kept_count, moved.end()),
         std::vector<T>(grad_x.begin() + kept_count, grad_x.end()), kept_count);
    same("grad_weight", weights, wanted_weights, size);
    if (is_layer) same("grad_bias", biases, wanted_biases, size);
  }
  std::vector<T> sum(count);
  const auto branch = random_values<T>(count);
  const std::vector<T> rest(branch.begin() + kept_count, branch.end());
  launch(2, dim3(64), [&] {
    dropbp::permuted_residual_add_kernel<T, T, N>(sum.data(), residual.data(), branch.data(),
                                                  rest.data(), entries.data(), 4, 2,
                                                  int64_t{kRowsPerEntry} * width, count);
  });
  std::vector<T> wanted(count);
  for (size_t i = 0; i < count; ++i) {
    wanted[i] = narrow<T>(widen<W>(x[i]) + widen<W>(branch[i]));
  }
  same("permuted add", gathered(sum), wanted, count);
}

// More partial sums than threads of a column, and a last block of columns that is not full.
static void check_sum_of_partials() {
  constexpr int kPartials = 2 * dropbp::kParts + 3, kWidth = dropbp::kColumns + 8;
  const auto partial = random_values<float>(kPartials * kWidth);
  std::vector<float> sums = unwritten<float>(kWidth);
  launch(2, dim3(dropbp::kColumns, dropbp::kParts), [&] {
    dropbp::sum_partials_kernel<float, float>(sums.data(), partial.data(), kPartials, kWidth);
  });
  std::vector<double> wanted(kWidth);
  for (size_t i = 0; i < partial.size(); ++i) wanted[i % kWidth] += partial[i];
  expect("sum of partials", kWidth, sums, wanted, 1e-5);
}

int main() {
  check_sum_of_partials();
  constexpr auto kBFloat16 = ElementType::kBFloat16;
  check<__nv_bfloat16, float, 8, 2>(kBFloat16, 64, dim3(32, 4), 0.02);   // a warp a row, not full
  check<__nv_bfloat16, float, 8, 2>(kBFloat16, 512, dim3(32, 4), 0.02);  // a warp a row, full
  check<__nv_bfloat16, float, 8, 4>(kBFloat16, 1096, dim3(64), 0.02);    // a block a row
  check<__nv_bfloat16, float, 8, 0>(kBFloat16, 3000, dim3(96), 0.02);    // rows that are not held
  check<__half, float, 8, 2>(ElementType::kHalf, 776, dim3(64), 0.003);
  check<float, float, 4, 4>(ElementType::kFloat, 36, dim3(32, 4), 1e-5);
  check<float, float, 4, 2>(ElementType::kFloat, 1000, dim3(128), 1e-5);
  check<float, float, 1, 0>(ElementType::kFloat, 33, dim3(64), 1e-5);  // single elements
  check<double, double, 1, 0>(ElementType::kDouble, 71, dim3(32), 1e-6);
  check_permuted<__nv_bfloat16, float, 8, 2>(kBFloat16, 64, dim3(32, 4));
  check_permuted<__nv_bfloat16, float, 8, 4>(kBFloat16, 1096, dim3(64));
  check_permuted<__half, float, 8, 0>(ElementType::kHalf, 776, dim3(64));
  check_permuted<float, float, 1, 0>(ElementType::kFloat, 33, dim3(64));
  check_permuted<double, double, 1, 0>(ElementType::kDouble, 71, dim3(32));
  std::printf(num_failed ? "%d failed\n" : "checked\n", num_failed);
  return num_failed > 0;
}
