// Elements of the CUDA kernels: widening, rounding, and packs of neighbours. No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../element_types.h"

namespace dropbp {

using BFloat16 = __nv_bfloat16;
using Half = __half;

template <class W, class T>
__device__ W widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

// Rounds to nearest, ties to even.
template <class T, class W>
__device__ T narrow(W value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// N neighbours, moved by as few and as wide accesses as their alignment allows.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// Elements for one thread at a time: 16 bytes of the narrower type.
template <class A, class B>
constexpr int kPack = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
// The same of the wider type, for kernels that hold nothing between packs: then every access of a
// warp is to whole sectors of 32 bytes, where two accesses a pack would each be to half of them.
template <class A, class B>
constexpr int kFlatPack = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// The loads and stores of a Pack larger than 16 bytes are several of 16 bytes.
template <class T, int N>
__device__ void load(T (&values)[N], const T* from) {
  constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const auto pack = *reinterpret_cast<const Pack<T, kStep>*>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) values[i + j] = pack.values[j];
  }
}

template <class T, int N>
__device__ void store(T* to, const T (&values)[N]) {
  constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Pack<T, kStep> pack;
#pragma unroll
    for (int j = 0; j < kStep; ++j) pack.values[j] = values[i + j];
    *reinterpret_cast<Pack<T, kStep>*>(to + i) = pack;
  }
}

}  // namespace dropbp
