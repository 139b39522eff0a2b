// What launches of CUDA kernels share: the current stream, errors, and the size of a grid.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "../checks.h"
#include "elements.cuh"
// After elements.cuh:
#include "../dtypes.h"

namespace dropbp {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const bool is_of_another_build = error == cudaErrorNoKernelImageForDevice ||
                                   error == cudaErrorInsufficientDriver ||
                                   error == cudaErrorUnsupportedPtxVersion;
  fail<std::runtime_error>(what, ": ", cudaGetErrorString(error),
                           is_of_another_build
                               ? "; _C_cuda was built for other GPUs or for a newer driver, and "
                                 "DROPBP_KERNELS_BACKEND=triton does without it"
                               : "");
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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Threads of a block, and blocks of a grid, of a kernel that strides over `count` elements or
// packs: one for each thread, as far as a grid goes. As many blocks as run at the same time would
// not be the same for all: 8 fit at 32 registers a thread, 5 or 6 at the 40 to 48 of glu and rope,
// whose last blocks would run by themselves, with too few loads in flight.
inline constexpr int kThreads = 256;

inline unsigned strided_blocks(int64_t count) {
  return static_cast<unsigned>(
      std::min<int64_t>((count + kThreads - 1) / kThreads, std::numeric_limits<int>::max()));
}

// Runs a kernel that strides over `count` elements or packs on the current stream of the current
// device.
template <class... Parameters, class... Arguments>
void launch_strided(const char* what, void (*kernel)(Parameters...), int64_t count,
                    const Tensor& tensor, Arguments... arguments) {
  if (count == 0) return;
  kernel<<<strided_blocks(count), kThreads, 0, current_stream(tensor)>>>(arguments...);
  check_cuda(cudaGetLastError(), what);
}

// Of `pack` elements each, the last one perhaps of fewer.
inline int64_t packs_of(int64_t count, int pack) { return (count + pack - 1) / pack; }

// Whether packs of N may be used: every pointer on a 16-byte boundary and no pack across two rows.
inline bool packs_fit(int n, bool by_row, int64_t width,
                      std::initializer_list<const void*> pointers) {
  if (by_row && width % n != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace dropbp
