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

template <Activation kActivation, class T>
__device__ T gated(T gate, T up) {
  using W = Wide<T>;
  W value, slope;
  activate<kActivation>(widen<W>(gate), value, slope);
  return narrow<T>(value * widen<W>(up));
}

// output = activation(gate) * up, N elements at a time; width is a multiple of N unless there is
// one row. output may be gate.
template <Activation kActivation, class T, int N>
__global__ void glu_kernel(Rows<T> output, Rows<const T> gate, Rows<const T> up, int64_t width,
                           int64_t count) {  // each (count / width, width)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i + N <= count; i += stride) {
    const int64_t row = i / width, column = i - row * width;
    T g[N], u[N];
    load(g, gate.at(row, column));
    load(u, up.at(row, column));
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = gated<kActivation>(g[j], u[j]);
    store(output.at(row, column), g);
  }
  // The tail, fewer than N elements, only of one row.
  if (N > 1) {
    for (; i < count; ++i) output.data[i] = gated<kActivation>(gate.data[i], up.data[i]);
  }
}

// gate and up become their gradients: grad * up * activation'(gate) and grad * activation(gate).
template <Activation kActivation, class T>
__device__ void gradients(T grad, T& gate, T& up) {
  using W = Wide<T>;
  W value, slope;
  activate<kActivation>(widen<W>(gate), value, slope);
  const W wide = widen<W>(grad);
  gate = narrow<T>(wide * widen<W>(up) * slope);
  up = narrow<T>(wide * value);
}

// grad_gate may be gate and grad_up up.
template <Activation kActivation, class T, int N>
__global__ void glu_backward_kernel(Rows<T> grad_gate, Rows<T> grad_up, Rows<const T> grad,
                                    Rows<const T> gate, Rows<const T> up, int64_t width,
                                    int64_t count) {  // each (count / width, width)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; i + N <= count; i += stride) {
    const int64_t row = i / width, column = i - row * width;
    T d[N], g[N], u[N];
    load(d, grad.at(row, column));
    load(g, gate.at(row, column));
    load(u, up.at(row, column));
#pragma unroll
    for (int j = 0; j < N; ++j) gradients<kActivation>(d[j], g[j], u[j]);
    store(grad_gate.at(row, column), g);
    store(grad_up.at(row, column), u);
  }
  if (N > 1) {
    for (; i < count; ++i) {
      T g = gate.data[i], u = up.data[i];
      gradients<kActivation>(grad.data[i], g, u);
      grad_gate.data[i] = g;
      grad_up.data[i] = u;
    }
  }
}

}  // namespace dropbp
