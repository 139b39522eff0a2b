// CPU kernels of glu on runs of contiguous elements. Included by each_isa.h for each instruction
// set, hence no guard.
#include "exponential.h"

namespace dropbp::DROPBP_ISA {
namespace {  // another file has other Kernels

// An activation and its derivative. gelu_tanh(x) = x / (1 + exp(-u)) with
// u = 2 sqrt(2 / pi) (x + 0.044715 x^3), because 1 + tanh(u / 2) = 2 / (1 + exp(-u)).
template <class V>
struct Activated {
  V value;
  V slope;
};

template <Activation kActivation, class T, class W = Wide<T>>
DROPBP_INLINE Activated<Vector<W, kLanes<W>>> activate(Vector<W, kLanes<W>> x) {
  constexpr int N = kLanes<W>;
  constexpr bool kIsShort = sizeof(T) == 2;
  if constexpr (kActivation == Activation::kGelu) {
    const auto normal = normal_of<kIsShort, N>(x);
    return {x * normal.below, normal.below + x * (normal.bell * W(0x1.9884533d43651p-2))};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr W kScale = W(0x1.9884533d43651p+0), kCube = W(0.044715);
    const auto s = W(1) / (exp_of<kIsShort, N>(x + x * x * x * kCube, -kScale) + W(1));
    // Where the curve is straight to the last bit, and before x * x overflows.
    const auto bent = clamped<N>(x, -20, 20);
    return {x * s, s + bent * (s * (W(1) - s)) * (bent * bent * (3 * kCube * kScale) + kScale)};
  } else {
    const auto s = W(1) / (exp_of<kIsShort, N>(x, W(-1)) + W(1));
    return {x * s, s + x * s * (W(1) - s)};
  }
}

struct Kernels {
  // output may be gate or up.
  template <Activation kActivation, class T>
  static void forward_run(T* output, const T* gate, const T* up, int64_t count) {
    using W = Wide<T>;
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      const auto value = activate<kActivation, T>(load<W>(gate + i)).value;
      store<W>(output + i, value * load<W>(up + i));
    }
    if (i < count) {
      const int64_t rest = count - i;
      const auto value = activate<kActivation, T>(load_part<W>(gate + i, rest)).value;
      store_part<W>(output + i, value * load_part<W>(up + i, rest), rest);
    }
  }

  // grad_gate and grad_up may be gate and up.
  template <Activation kActivation, class T>
  static void backward_run(T* grad_gate, T* grad_up, const T* grad, const T* gate, const T* up,
                           int64_t count) {
    using W = Wide<T>;
    constexpr int kStep = kLanes<W>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      const auto a = activate<kActivation, T>(load<W>(gate + i));
      const auto g = load<W>(grad + i), u = load<W>(up + i);
      store<W>(grad_gate + i, g * u * a.slope);
      store<W>(grad_up + i, g * a.value);
    }
    if (i < count) {
      const int64_t rest = count - i;
      const auto a = activate<kActivation, T>(load_part<W>(gate + i, rest));
      const auto g = load_part<W>(grad + i, rest), u = load_part<W>(up + i, rest);
      store_part<W>(grad_gate + i, g * u * a.slope, rest);
      store_part<W>(grad_up + i, g * a.value, rest);
    }
  }
};

}  // namespace
}  // namespace dropbp::DROPBP_ISA
