// Compiles the kernels of the file DROPBP_KERNELS once for each x86-64 generation and picks at run
// time, so that one build serves every machine. To be included once, by <op>.cpp.
//
// That file defines `struct Kernels` of static templates inside namespace DROPBP_ISA. It uses no
// lambda and no function of the standard library: what is compiled for a newer machine must not be
// shared with code that runs on an older one.
#include "elements.h"

#ifndef DROPBP_X86  // -DDROPBP_X86=0 leaves all but the baseline out, for a quick build
#if defined(__x86_64__) && defined(__GNUC__)
#define DROPBP_X86 1
#else
#define DROPBP_X86 0
#endif
#endif
#if DROPBP_X86
#include <immintrin.h>
#endif

#define DROPBP_ISA baseline
#define DROPBP_VECTOR_BYTES 16
#include "vector.h"
#include DROPBP_KERNELS
#undef DROPBP_ISA
#undef DROPBP_VECTOR_BYTES

#if DROPBP_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define DROPBP_ISA avx2
#define DROPBP_VECTOR_BYTES 32
#include "vector.h"
#include DROPBP_KERNELS
#undef DROPBP_ISA
#undef DROPBP_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif
#define DROPBP_ISA avx512
#define DROPBP_VECTOR_BYTES 64
#include "vector.h"
#include DROPBP_KERNELS
#undef DROPBP_ISA
#undef DROPBP_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace dropbp {

// Calls visitor with the Kernels of the best instruction set of this machine, its vectors no wider
// than kMaxVectorBytes.
template <int kMaxVectorBytes = 64, class Visitor>
void with_kernels(const Visitor& visitor) {
#if DROPBP_X86
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2");  // F16C is older than AVX2
  if (kMaxVectorBytes >= 64 && has_avx512) return visitor(avx512::Kernels{});
  if (has_avx2) return visitor(avx2::Kernels{});
#endif
  visitor(baseline::Kernels{});
}

}  // namespace dropbp
