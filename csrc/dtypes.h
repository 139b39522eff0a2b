// From the dtype of a tensor to the element type of a kernel. Shared by cpu/ and cuda/: include
// after elements.h or elements.cuh, where BFloat16, Half and holds are defined.
#pragma once

#include "checks.h"

namespace dropbp {

// Calls visitor with a value of dtype's element type.
template <class Visitor>
void visit_dtype(const char* name, ScalarType dtype, const Visitor& visitor) {
  switch (dtype) {
    case ScalarType::Float:
      return visitor(float{});
    case ScalarType::BFloat16:
      return visitor(BFloat16{});
    case ScalarType::Half:
      return visitor(Half{});
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

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace dropbp
