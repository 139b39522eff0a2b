// Elements of the CUDA kernels: widening, rounding, and packs of neighbours. No torch header.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Elements for one thread at a time: 16 bytes of the narrower type.
template <class A, class B>
constexpr int kPack = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
// The same of the wider type, for kernels that hold nothing between packs: then every access of a
// warp is to whole sectors of 32 bytes, where two accesses a pack would each be to half of them.
template <class A, class B>
constexpr int kFlatPack = 16 / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// What one instruction moves.
template <size_t kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, uint16_t>>>;

// Elements of N neighbours, aligned to all of them or to 16 bytes, that one instruction moves.
template <class T, int N>
constexpr int kAtOnce = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;

template <class T, int N>
__device__ void load(T (&values)[N], const T* from) {
  constexpr int kStep = kAtOnce<T, N>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const auto word = *reinterpret_cast<const Word<kStep * sizeof(T)>*>(from + i);
    memcpy(static_cast<void*>(values + i), &word, sizeof(word));
  }
}

// By itself nvcc 13 takes a store to global memory apart in some kernels for sm_80 and sm_90:
// rope's into eight of 16 bits (test_machine_code.py).
template <class W>
__device__ void store_global(W* to, W word) {
#ifdef __CUDA_ARCH__
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (sizeof(W) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof(W) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word.x), "r"(word.y)
                 : "memory");
  } else {
    *to = word;
  }
#else
  *to = word;
#endif
}

// kIsGlobal: not in shared memory.
template <bool kIsGlobal = true, class T, int N>
__device__ void store(T* to, const T (&values)[N]) {
  constexpr int kStep = kAtOnce<T, N>;
  using W = Word<kStep * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    W word;
    memcpy(&word, values + i, sizeof(word));
    if constexpr (kIsGlobal) {
      store_global(reinterpret_cast<W*>(to + i), word);
    } else {
      *reinterpret_cast<W*>(to + i) = word;
    }
  }
}

}  // namespace dropbp
