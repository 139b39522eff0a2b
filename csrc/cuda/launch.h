// What launches of CUDA kernels share: the current stream, errors, and from a dtype to an element
// type.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../checks.h"
#include "elements.cuh"

namespace dropbp {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail<std::runtime_error>(what, ": ", cudaGetErrorString(error));
}

inline int num_multiprocessors(const Tensor& tensor, const char* what) {
  int count;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()),
      what);
  return count;
}

// PyTorch's current stream of the tensor's device, which must be the current one (DeviceGuard).
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls visitor with a value of dtype's element type.
template <class Visitor>
void visit_dtype(const char* name, ScalarType dtype, const Visitor& visitor) {
  switch (dtype) {
    case ScalarType::Float:
      return visitor(float{});
    case ScalarType::BFloat16:
      return visitor(__nv_bfloat16{});
    case ScalarType::Half:
      return visitor(__half{});
    case ScalarType::Double:
      return visitor(double{});
    default:
      fail<std::runtime_error>(name, ": expected dtype Float, Half, BFloat16 or Double, got ",
                               dtype_name(dtype));
  }
}

// Calls visitor with a value of each element type, where residual's holds branch's.
template <class Visitor>
void visit_residual_and_branch(ScalarType residual, ScalarType branch, const Visitor& visitor) {
  visit_dtype("residual", residual, [&](auto r) {
    using R = decltype(r);
    visit_dtype("branch", branch, [&](auto b) {
      if constexpr (holds<R, decltype(b)>) {
        visitor(R{}, b);
      } else {
        fail<std::runtime_error>("residual: expected a dtype that holds branch's ",
                                 dtype_name(branch), ", got ", dtype_name(residual));
      }
    });
  });
}

// Whether packs of N may be used: every pointer on a 16-byte boundary and no pack across two rows.
inline bool packs_fit(int n, bool by_row, int64_t width,
                      std::initializer_list<const void*> pointers) {
  if (by_row && width % n != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace dropbp
