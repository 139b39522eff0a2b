// The CUDA kernels of flat arrays, compiled for the host: the threads of a launch run one after
// another, so that sanitizers see each access. Results are compared with plain loops in double.
// What this cannot show: races, memory spaces, speed. Built and run by test_cuda_rows.py.
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_threads.h"
// After it:
#include "../csrc/cuda/column_update_kernel.cuh"
#include "../csrc/cuda/gated_residual_add_kernel.cuh"
#include "../csrc/cuda/glu_kernel.cuh"
#include "../csrc/cuda/partial_gather_kernel.cuh"
#include "../csrc/cuda/rope_kernel.cuh"

namespace {

using dropbp::Activation;
using dropbp::BFloat16;
using dropbp::Half;
using dropbp::Heads;
using dropbp::narrow;
using dropbp::Rows;
using dropbp::Wide;
using dropbp::widen;

int num_failed = 0;

// Few threads: each takes several packs.
template <class Kernel>
void launch(const Kernel& kernel) {
  gridDim = {2}, blockDim = {3};
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
  }
}

template <class T>
std::vector<T> random_values(int64_t count) {
  static std::mt19937 generator(0);
  std::normal_distribution<double> normal(0, 1);
  std::vector<T> values(count);
  for (T& value : values) value = narrow<T>(normal(generator));
  return values;
}

// What nobody has written yet.
template <class T>
std::vector<T> unwritten(int64_t count) {
  return std::vector<T>(count, narrow<T>(NAN));
}

template <class T>
double value_of(T value) {
  return static_cast<double>(widen<Wide<T>>(value));
}

template <class T, class Exact>
void expect(const char* what, const std::vector<T>& actual, const Exact& exact,
            double tolerance = 0) {
  for (int64_t i = 0; i < static_cast<int64_t>(actual.size()); ++i) {
    const double value = value_of(actual[i]), wanted = exact(i);
    if (fabs(value - wanted) <= tolerance * fmax(1.0, fabs(wanted))) continue;
    std::printf("%s: expected %g at %lld, got %g\n", what, wanted, static_cast<long long>(i),
                value);
    ++num_failed;
    return;
  }
}

// Half a unit in the last place of a result that was rounded once, and what float adds to it.
template <class T>
constexpr double kRounding = std::is_same_v<T, double>     ? 1e-14
                             : std::is_same_v<T, float>    ? 1e-6
                             : std::is_same_v<T, BFloat16> ? 4.5e-3
                                                           : 6e-4;

template <class R, class B, int N>
void check_add() {
  using W = Wide<R>;
  constexpr int64_t kRows = 7, kWidth = 3 * N, kChosen = 3;
  const auto sum = [](R a, B b) { return value_of(narrow<R>(widen<W>(a) + widen<W>(b))); };
  const int64_t odd = kRows * kWidth - (N > 1);  // the last pack is not full
  const auto residual = random_values<R>(odd);
  const auto branch = random_values<B>(odd);
  auto output = unwritten<R>(odd);
  launch([&] {
    dropbp::gated_residual_add_kernel<R, B, N>(output.data(), residual.data(), branch.data(),
                                               nullptr, 0, kWidth, odd);
  });
  expect("add", output, [&](int64_t i) { return sum(residual[i], branch[i]); });

  const int64_t rows[kChosen] = {5, 0, 6};
  const auto before = random_values<R>(kRows * kWidth);
  auto stream = before;
  launch([&] {
    dropbp::gated_residual_add_kernel<R, B, N>(stream.data(), stream.data(), branch.data(), rows,
                                               kRows, kWidth, kChosen * kWidth);
  });
  expect("add by rows, in place", stream, [&](int64_t i) {
    for (int64_t k = 0; k < kChosen; ++k) {
      if (rows[k] == i / kWidth) return sum(before[i], branch[k * kWidth + i % kWidth]);
    }
    return value_of(before[i]);
  });

  using F = std::conditional_t<std::is_same_v<B, double>, double, W>;
  const F factors[kChosen] = {2, 0, 0.5}, scale = 1.5;
  auto gradient = before;
  for (int64_t i = 0; i < kWidth; ++i) gradient[i] = narrow<R>(NAN);  // row 0, which nobody reads
  auto by_rows = unwritten<B>(kChosen * kWidth), whole = unwritten<B>(odd);
  launch([&] {
    dropbp::gated_residual_add_backward_kernel<R, B, F, N>(
        by_rows.data(), gradient.data(), rows, factors, scale, kRows, kWidth, kChosen * kWidth);
  });
  expect("add backward by rows", by_rows, [&](int64_t i) {
    const F factor = factors[i / kWidth];
    if (factor == 0) return 0.0;
    const R grad = gradient[rows[i / kWidth] * kWidth + i % kWidth];
    return value_of(narrow<B>(widen<F>(grad) * scale * factor));
  });
  launch([&] {
    dropbp::gated_residual_add_backward_kernel<R, B, F, N>(whole.data(), residual.data(), nullptr,
                                                           nullptr, scale, 0, kWidth, odd);
  });
  expect("add backward", whole,
         [&](int64_t i) { return value_of(narrow<B>(widen<F>(residual[i]) * scale)); });
}

template <Activation kActivation>
double activation_of(double x) {
  if (kActivation == Activation::kSilu) return x / (1 + exp(-x));
  if (kActivation == Activation::kGelu) return 0.5 * x * (1 + erf(x / sqrt(2.0)));
  return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

// A dense tensor whose last pack is not full, and the halves of a packed one, in place too.
template <Activation kActivation, class T, int N>
void check_glu() {
  constexpr int64_t kRows = 5, kWidth = 2 * N, kCount = kRows * kWidth;
  constexpr double kStep = 1e-5;
  const auto value = [](double x) { return activation_of<kActivation>(x); };
  const auto slope = [&](double x) {
    if (fabs(x) > 1e3) return x > 0 ? 1.0 : 0.0;  // straight
    return (value(x + kStep) - value(x - kStep)) / (2 * kStep);
  };
  const double forward = 2 * kRounding<T>, backward = 4 * kRounding<T> + 1e-8;

  const int64_t odd = kCount - (N > 1);
  auto gates_of_each_size = random_values<T>(odd);
  const double large = std::is_same_v<T, Half> ? 1e4 : 1e25;  // float cannot hold its square
  gates_of_each_size[0] = narrow<T>(large), gates_of_each_size[1] = narrow<T>(-large);
  const auto gate = gates_of_each_size, up = random_values<T>(odd), grad = random_values<T>(odd);
  auto output = unwritten<T>(odd), grad_gate = output, grad_up = output;
  const auto dense = [odd](auto& values) {
    return Rows<std::remove_pointer_t<decltype(values.data())>>{values.data(), odd};
  };
  const auto product = [&](int64_t i) { return value(value_of(gate[i])) * value_of(up[i]); };
  const auto of_gate = [&](int64_t i) {
    return value_of(grad[i]) * value_of(up[i]) * slope(value_of(gate[i]));
  };
  const auto of_up = [&](int64_t i) { return value_of(grad[i]) * value(value_of(gate[i])); };
  launch([&] {
    dropbp::glu_kernel<kActivation, T, N>(dense(output), dense(gate), dense(up), odd, odd);
  });
  expect("glu", output, product, forward);
  launch([&] {
    dropbp::glu_backward_kernel<kActivation, T, N>(dense(grad_gate), dense(grad_up), dense(grad),
                                                   dense(gate), dense(up), odd, odd);
  });
  expect("glu backward, gate", grad_gate, of_gate, backward);
  expect("glu backward, up", grad_up, of_up, backward);

  const auto packed = random_values<T>(2 * kCount), outer = random_values<T>(kCount);
  const auto half = [&](int64_t i, int64_t which) {
    return value_of(packed[(i / kWidth * 2 + which) * kWidth + i % kWidth]);
  };
  auto written = packed;
  launch([&] {
    const Rows<T> first{written.data(), 2 * kWidth};
    const Rows<const T> read{first.data, 2 * kWidth}, second{first.data + kWidth, 2 * kWidth};
    dropbp::glu_kernel<kActivation, T, N>(first, read, second, kWidth, kCount);
  });
  expect(
      "glu in place", written,
      [&](int64_t i) {
        const int64_t at = i / (2 * kWidth) * kWidth + i % kWidth;
        return i / kWidth % 2 ? half(at, 1) : value(half(at, 0)) * half(at, 1);
      },
      forward);
  written = packed;
  launch([&] {
    const Rows<T> first{written.data(), 2 * kWidth}, second{first.data + kWidth, 2 * kWidth};
    const Rows<const T> gates{first.data, 2 * kWidth}, ups{second.data, 2 * kWidth};
    const Rows<const T> grads{outer.data(), kWidth};
    dropbp::glu_backward_kernel<kActivation, T, N>(first, second, grads, gates, ups, kWidth,
                                                   kCount);
  });
  expect(
      "glu backward in place", written,
      [&](int64_t i) {
        const int64_t at = i / (2 * kWidth) * kWidth + i % kWidth;
        const double gradient = value_of(outer[at]);
        return gradient * (i / kWidth % 2 ? value(half(at, 0)) : half(at, 1) * slope(half(at, 0)));
      },
      backward);
}

// x lies as (batch, head, seq, channel); the last 2 N channels are not turned.
template <class T, class C, int N, bool kTranspose>
void check_rope(bool is_shared) {
  constexpr int64_t kBatch = 2, kSeq = 3, kNumHeads = 2, kHalf = 2 * N, kWidth = 6 * N;
  constexpr int64_t kTokens = kBatch * kSeq, kCount = kTokens * kNumHeads * kWidth;
  const int64_t table_stride = is_shared ? 0 : kSeq * 2 * kHalf;
  const auto x = random_values<T>(kCount);
  const auto cos = random_values<C>((is_shared ? 1 : kBatch) * kSeq * 2 * kHalf);
  const auto sin = random_values<C>(cos.size());
  const int64_t of_x[] = {kNumHeads * kSeq * kWidth, kWidth, kSeq * kWidth};
  const auto exact = [&](int64_t batch, int64_t seq, int64_t head, int64_t channel) {
    const T* from = x.data() + batch * of_x[0] + seq * of_x[1] + head * of_x[2];
    if (channel >= 2 * kHalf) return value_of(from[channel]);
    const bool is_first = channel < kHalf;
    const int64_t other = is_first ? channel + kHalf : channel - kHalf;
    const int64_t row = batch * table_stride + seq * 2 * kHalf;
    // y = x cos + rotated(x) sin; its transpose takes the other half's sine, and the other sign.
    const double turned =
        value_of(from[other]) * value_of(sin[row + (kTranspose ? other : channel)]);
    const double sign = is_first == kTranspose ? 1 : -1;
    return value_of(from[channel]) * value_of(cos[row + channel]) + sign * turned;
  };
  auto output = unwritten<T>(kCount), written = x;
  const auto turn = [&](const Heads<T>& to, const T* from) {
    const Heads<const T> heads{from, of_x[0], of_x[1], of_x[2]};
    launch([&] {
      dropbp::rope_kernel<kTranspose, T, C, N>(to, heads, cos.data(), sin.data(), table_stride,
                                               kTokens, kSeq, kNumHeads, kHalf, kWidth);
    });
  };
  turn({output.data(), kSeq * kNumHeads * kWidth, kNumHeads * kWidth, kWidth}, x.data());
  expect(
      "rope", output,
      [&](int64_t i) {
        const int64_t channel = i % kWidth, head = i / kWidth % kNumHeads;
        const int64_t token = i / kWidth / kNumHeads;
        return exact(token / kSeq, token % kSeq, head, channel);
      },
      4 * kRounding<T>);
  turn({written.data(), of_x[0], of_x[1], of_x[2]}, written.data());
  expect(
      "rope in place", written,
      [&](int64_t i) {
        const int64_t channel = i % kWidth, seq = i / kWidth % kSeq;
        const int64_t head = i / kWidth / kSeq % kNumHeads;
        return exact(i / of_x[0], seq, head, channel);
      },
      4 * kRounding<T>);
}

template <class T>
void check_channels() {
  constexpr int64_t kRows = 5, kWidth = 9, kStride = 11, kChannels = 3;
  const int64_t twice[kChannels] = {8, 0, 8};
  const auto input = random_values<T>(kRows * kStride);
  auto gathered = unwritten<T>(kRows * kChannels);
  launch([&] {
    dropbp::partial_gather_kernel<T>(gathered.data(), input.data(), twice, kStride, kWidth,
                                     kChannels, kRows * kChannels);
  });
  expect("partial_gather", gathered, [&](int64_t i) {
    return value_of(input[i / kChannels * kStride + twice[i % kChannels]]);
  });

  const int64_t index[kChannels] = {8, 0, 3};
  for (const bool by_column : {false, true}) {  // how the weight (kRows, kWidth) lies
    const dropbp::Columns columns{
        index, kRows, kChannels, kWidth, by_column ? 1 : kStride, by_column ? kRows : 1};
    const auto place = [&](int64_t i) {
      return i / kChannels * columns.row_stride + index[i % kChannels] * columns.column_stride;
    };
    const auto delta = random_values<float>(kRows * kChannels);
    auto weight = input;
    auto original = unwritten<T>(kRows * kChannels);
    launch([&] {
      dropbp::column_update_kernel<Wide<T>, T, float>(weight.data(), original.data(), delta.data(),
                                                      columns, 2, kRows * kChannels);
    });
    expect("column_update, what was there", original,
           [&](int64_t i) { return value_of(input[place(i)]); });
    auto wanted = input;
    for (int64_t i = 0; i < kRows * kChannels; ++i) {
      wanted[place(i)] = narrow<T>(widen<Wide<T>>(input[place(i)]) + 2 * widen<Wide<T>>(delta[i]));
    }
    expect("column_update", weight, [&](int64_t i) { return value_of(wanted[i]); });
    launch([&] {
      dropbp::column_restore_kernel<T>(weight.data(), original.data(), columns, kRows * kChannels);
    });
    expect("column_restore", weight, [&](int64_t i) { return value_of(input[i]); });
  }
}

// Whether `run`, in a process of its own, is stopped by a failed assertion.
template <class Run>
bool is_stopped(const Run& run) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    fclose(stdout), fclose(stderr);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

void check_wrong_indices() {
  constexpr int64_t kWidth = 9;
  const std::vector<float> input(kWidth);
  for (const int64_t wrong : {int64_t{-1}, kWidth}) {
    float output;
    const bool stopped = is_stopped([&] {
      launch([&] {
        dropbp::partial_gather_kernel<float>(&output, input.data(), &wrong, kWidth, kWidth, 1, 1);
      });
    });
    if (stopped) continue;
    std::printf("index %lld of %lld: nothing stopped\n", static_cast<long long>(wrong),
                static_cast<long long>(kWidth));
    ++num_failed;
  }
}

template <class T, int N>
void check_activations() {
  check_glu<Activation::kSilu, T, N>();
  check_glu<Activation::kGelu, T, N>();
  check_glu<Activation::kGeluTanh, T, N>();
}

template <class T, class C, int N>
void check_turns() {
  for (const bool is_shared : {true, false}) {
    check_rope<T, C, N, false>(is_shared);
    check_rope<T, C, N, true>(is_shared);
  }
}

}  // namespace

int main() {
  check_add<BFloat16, BFloat16, 8>();
  check_add<float, BFloat16, 8>();
  check_add<float, Half, 1>();
  check_add<double, float, 4>();
  check_activations<BFloat16, 8>();
  check_activations<Half, 1>();
  check_activations<float, 4>();
  check_activations<double, 2>();
  check_turns<BFloat16, BFloat16, 8>();
  check_turns<Half, float, 8>();
  check_turns<float, float, 4>();
  check_turns<double, double, 1>();
  check_channels<BFloat16>();
  check_channels<float>();
  check_channels<double>();
  check_wrong_indices();
  std::printf(num_failed ? "%d failed\n" : "checked\n", num_failed);
  return num_failed > 0;
}
