// Device code of glu. Raw pointers, no torch header.
#pragma once

#include "elements.cuh"

namespace dropbp {

enum class Activation { kSilu, kGelu, kGeluTanh };

// activation(x) and its derivative. With s = 1 / (1 + exp(-u)): 1 + tanh(u / 2) = 2 s.
template <Activation kActivation, class W>
__device__ void activate(W x, W& value, W& slope) {
  if constexpr (kActivation == Activation::kGelu) {
    const W below = W(0.5) * (1 + erf(x * W(0.7071067811865476)));
    value = x * below;
    slope = below + x * exp(W(-0.5) * x * x) * W(0.3989422804014327);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr W kScale = W(1.5957691216057308), kCube = W(0.044715);
    const W s = 1 / (1 + exp(-kScale * (x + kCube * x * x * x)));
    const W bent = fabs(x) > 20 ? 0 : x;  // straight beyond, where x * x may overflow
    value = x * s;
    slope = s + bent * (s * (1 - s)) * kScale * (1 + 3 * kCube * bent * bent);
  } else {
    const W s = 1 / (1 + exp(-x));
    value = x * s;
    slope = s + x * s * (1 - s);
  }
}

// Rows of a tensor that is walked along with others of its sizes.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  __device__ T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// output = activation(gate) * up, N elements at a time; width is a multiple of N unless there is
// one row. output may be gate.
template <Activation kActivation, class T, int N>
__global__ void glu_kernel(Rows<T> output, Rows<const T> gate, Rows<const T> up, int64_t width,
                           int64_t count) {  // each (count / width, width)
  using W = Wide<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i < count; i += stride) {
    const int64_t row = i / width, column = i - row * width;
    T g[N], u[N];
    const int64_t rest = count - i;
    if (rest >= N) {
      load(g, gate.at(row, column));
      load(u, up.at(row, column));
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (rest < N) {
        if (j >= rest) break;
        g[j] = gate.at(row, column)[j];
        u[j] = up.at(row, column)[j];
      }
      W value, slope;
      activate<kActivation>(widen<W>(g[j]), value, slope);
      g[j] = narrow<T>(value * widen<W>(u[j]));
      if (rest < N) output.at(row, column)[j] = g[j];
    }
    if (rest >= N) store(output.at(row, column), g);
  }
}

// grad_gate = grad * up * activation'(gate), grad_up = grad * activation(gate). grad_gate may be
// gate and grad_up up.
template <Activation kActivation, class T, int N>
__global__ void glu_backward_kernel(Rows<T> grad_gate, Rows<T> grad_up, Rows<const T> grad,
                                    Rows<const T> gate, Rows<const T> up, int64_t width,
                                    int64_t count) {  // each (count / width, width)
  using W = Wide<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i < count; i += stride) {
    const int64_t row = i / width, column = i - row * width;
    T d[N], g[N], u[N];
    const int64_t rest = count - i;
    if (rest >= N) {
      load(d, grad.at(row, column));
      load(g, gate.at(row, column));
      load(u, up.at(row, column));
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (rest < N) {
        if (j >= rest) break;
        d[j] = grad.at(row, column)[j];
        g[j] = gate.at(row, column)[j];
        u[j] = up.at(row, column)[j];
      }
      W value, slope;
      activate<kActivation>(widen<W>(g[j]), value, slope);
      const W wide = widen<W>(d[j]);
      g[j] = narrow<T>(wide * widen<W>(u[j]) * slope);
      u[j] = narrow<T>(wide * value);
      if (rest < N) {
        grad_gate.at(row, column)[j] = g[j];
        grad_up.at(row, column)[j] = u[j];
      }
    }
    if (rest >= N) {
      store(grad_gate.at(row, column), g);
      store(grad_up.at(row, column), u);
    }
  }
}

}  // namespace dropbp
