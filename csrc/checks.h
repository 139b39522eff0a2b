// Tensors of libtorch's stable ABI: checks that speak, allocation, contiguity. Shared by cpu/ and
// cuda/.
//
// Python (ops/) validates what users pass. What is checked here protects memory only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

// From torch 2.13 on: what PyTorch said of the last call that failed on this thread; null before.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace dropbp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which exception decides what Python sees: std::invalid_argument a ValueError (under torch 2.15 a
// RuntimeError with the same words), std::out_of_range an IndexError, std::runtime_error a
// RuntimeError.
template <class Exception = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Exception(message.str());
}

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int32_t shim_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// In PyTorch's words: who runs a smaller batch then (accelerate, Lightning) looks for them. An
// error code has lost them, and that PyTorch's error was an OutOfMemoryError.
[[noreturn]] inline void fail_to_allocate(int64_t numel, int32_t device_type) {
  if (torch_exception_get_what_without_backtrace) {
    fail<std::runtime_error>(torch_exception_get_what_without_backtrace());
  }
  const bool is_cpu = device_type == aoti_torch_device_type_cpu();
  fail<std::runtime_error>(
      is_cpu ? "DefaultCPUAllocator: can't allocate memory." : "CUDA out of memory.", " Asked for ",
      numel, " elements; what PyTorch said stands on stderr");
}

// A fresh contiguous tensor on the device of `like`. A direct call of the C interface: the
// dispatcher that torch::stable::empty goes through costs as much as a kernel over thousands of
// elements.
inline Tensor new_tensor(const int64_t* sizes, int64_t dim, int32_t dtype, const Tensor& like) {
  constexpr int64_t kMaxDim = 64;  // PyTorch's own limit
  if (dim > kMaxDim) fail("expected at most ", kMaxDim, " dimensions, got ", dim);
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  const bool is_there =
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle) == 0;
  if (!is_there) fail_to_allocate(stride, device_type);
  return Tensor(handle);
}

// Of the sizes and device of `tensor`.
inline Tensor new_like(const Tensor& tensor, int32_t dtype) {
  return new_tensor(tensor.sizes().data(), tensor.dim(), dtype, tensor);
}

// torch::stable::contiguous of a tensor that is not, but for its words where there is no memory.
inline Tensor dense_copy(const Tensor& tensor) {
  Tensor copy = new_like(tensor, shim_dtype(tensor));
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : dense_copy(tensor);
}

inline void check_numel(const char* name, const Tensor& tensor, int64_t expected) {
  if (tensor.numel() != expected) {
    fail(name, ": expected ", expected, " elements, got ", tensor.numel());
  }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(name, ": expected dtype ", dtype_name(expected), ", got ",
         dtype_name(tensor.scalar_type()));
  }
}

// Before `tensor` is written in place: elements that share memory would be written twice.
inline void check_own_elements(const char* name, const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) {
      fail<std::runtime_error>(name, ": expected elements with memory of their own, got stride 0 ",
                               "in dimension ", d);
    }
  }
}

}  // namespace dropbp
