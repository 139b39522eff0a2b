// CUDA launches of dropbp_kernels::glu, its backward and their in-place forms.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <string>
#include <tuple>

#include "../rows.h"
#include "glu_kernel.cuh"
#include "launch.h"

namespace dropbp {
namespace {

// Calls visitor with values of the activation and of the element type.
template <class Visitor>
void visit(const std::string& activation, ScalarType dtype, const Visitor& visitor) {
  visit_dtype("gate", dtype, [&](auto element) {
    if (activation == "silu") {
      visitor(std::integral_constant<Activation, Activation::kSilu>{}, element);
    } else if (activation == "gelu") {
      visitor(std::integral_constant<Activation, Activation::kGelu>{}, element);
    } else if (activation == "gelu_tanh") {
      visitor(std::integral_constant<Activation, Activation::kGeluTanh>{}, element);
    } else {
      fail("activation: expected silu, gelu or gelu_tanh, got ", activation);
    }
  });
}

template <class T>
Rows<const T> read_of(const Tensor& tensor) {
  return {input<T>(tensor), row_stride(tensor)};
}

template <class T>
Rows<T> written(const Tensor& tensor) {
  return {output<T>(tensor), row_stride(tensor)};
}

// Runs packed, or single where packs do not fit the rows of all operands, on the current stream.
template <class Kernel, class... T>
void launch(const char* name, Kernel packed, Kernel single, int pack, const Tensor& like,
            Rows<T>... operands) {
  const int64_t count = like.numel();
  if (count == 0) return;
  const int64_t row = like.dim() > 0 ? like.size(like.dim() - 1) : 1;
  const bool is_dense = ((operands.stride == row) && ...);
  const int64_t width = is_dense ? count : row;  // one long row
  const bool fits = packs_fit(pack, !is_dense, width, {operands.data...}) &&
                    (is_dense || ((operands.stride % pack == 0) && ...));
  launch_strided(name, fits ? packed : single, packs_of(count, fits ? pack : 1), like, operands...,
                 width, count);
}

// `target` has gate's sizes and may be gate.
void forward_into(const Tensor& target, const Tensor& gate, const Tensor& up,
                  const std::string& activation) {
  visit(activation, gate.scalar_type(), [&](auto act, auto element) {
    using T = decltype(element);
    constexpr Activation kActivation = decltype(act)::value;
    launch("glu", glu_kernel<kActivation, T, kPack<T, T>>, glu_kernel<kActivation, T, 1>,
           kPack<T, T>, gate, written<T>(target), read_of<T>(gate), read_of<T>(up));
  });
}

// The targets have gate's sizes and may be gate and up.
void backward_into(const Tensor& grad_gate, const Tensor& grad_up, const Tensor& grad_output,
                   const Tensor& gate, const Tensor& up, const std::string& activation) {
  visit(activation, gate.scalar_type(), [&](auto act, auto element) {
    using T = decltype(element);
    constexpr Activation kActivation = decltype(act)::value;
    launch("glu_backward", glu_backward_kernel<kActivation, T, kPack<T, T>>,
           glu_backward_kernel<kActivation, T, 1>, kPack<T, T>, gate, written<T>(grad_gate),
           written<T>(grad_up), read_of<T>(grad_output), read_of<T>(gate), read_of<T>(up));
  });
}

Tensor glu(Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  Tensor result = new_like(gate, shim_dtype(gate));
  forward_into(result, as_rows(gate), as_rows(up), activation);
  return result;
}

void glu_(Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor target = as_own_rows("gate", gate);
  forward_into(target, target, as_rows(up), activation);
  copy_back(gate, target);
}

std::tuple<Tensor, Tensor> glu_backward(Tensor grad_output, Tensor gate, Tensor up,
                                        std::string activation) {
  check_alike("up", up, "gate", gate);
  check_alike("grad_output", grad_output, "gate", gate);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  Tensor grad_gate = new_like(gate, shim_dtype(gate)), grad_up = new_like(gate, shim_dtype(gate));
  backward_into(grad_gate, grad_up, as_rows(grad_output), as_rows(gate), as_rows(up), activation);
  return {grad_gate, grad_up};
}

void glu_backward_(Tensor grad_output, Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  check_alike("grad_output", grad_output, "gate", gate);
  const torch::stable::accelerator::DeviceGuard guard(gate.get_device_index());
  const Tensor grad_gate = as_own_rows("gate", gate), grad_up = as_own_rows("up", up);
  backward_into(grad_gate, grad_up, as_rows(grad_output), grad_gate, grad_up, activation);
  copy_back(gate, grad_gate);
  copy_back(up, grad_up);
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("glu", TORCH_BOX(&glu));
  library.impl("glu_", TORCH_BOX(&glu_));
  library.impl("glu_backward", TORCH_BOX(&glu_backward));
  library.impl("glu_backward_", TORCH_BOX(&glu_backward_));
}

}  // namespace
}  // namespace dropbp
