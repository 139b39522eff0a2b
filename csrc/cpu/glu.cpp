// CPU kernels of dropbp_kernels::glu, its backward and their in-place forms.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <string>
#include <tuple>

#include "../rows.h"
#include "dispatch.h"

namespace dropbp {
enum class Activation { kSilu, kGelu, kGeluTanh };
}  // namespace dropbp

#define DROPBP_KERNELS "glu_kernels.h"
#include "each_isa.h"

namespace dropbp {
namespace {

template <Activation kValue>
using ActivationConstant = std::integral_constant<Activation, kValue>;

template <class Visitor>
void visit_activation(const std::string& name, const Visitor& visitor) {
  if (name == "silu") return visitor(ActivationConstant<Activation::kSilu>{});
  if (name == "gelu") return visitor(ActivationConstant<Activation::kGelu>{});
  if (name == "gelu_tanh") return visitor(ActivationConstant<Activation::kGeluTanh>{});
  fail("activation: expected silu, gelu or gelu_tanh, got ", name);
}

// A tensor of T that is walked along with others of its sizes.
template <class T>
struct Operand {
  T* data;
  int64_t stride;
};

template <class T>
Operand<const T> read_of(const Tensor& tensor) {
  return {input<T>(tensor), row_stride(tensor)};
}

template <class T>
Operand<T> written(const Tensor& tensor) {
  return {output<T>(tensor), row_stride(tensor)};
}

// Calls run(count, pointers...) on pieces of contiguous elements of all operands, in many threads.
template <class Run, class... T>
void for_each_run(const Tensor& like, const Run& run, Operand<T>... operands) {
  const int64_t numel = like.numel();
  const int64_t row = like.dim() > 0 ? like.size(like.dim() - 1) : 1;
  const int64_t width = ((operands.stride == row) && ...) ? numel : row;  // one long row if dense
  torch::stable::parallel_for(0, numel, kGrain, [=](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t index = begin / width, column = begin % width;
      const int64_t count = std::min(width - column, end - begin);
      run(count, (operands.data + index * operands.stride + column)...);
      begin += count;
    }
  });
}

// `target` has gate's sizes and may be gate or up.
void forward_into(const Tensor& target, const Tensor& gate, const Tensor& up,
                  const std::string& activation) {
  visit_activation(activation, [&](auto act) {
    visit_dtype("gate", gate.scalar_type(), [&](auto element) {
      using T = decltype(element);
      for_each_run(
          gate,
          [](int64_t count, T* to, const T* g, const T* u) {
            with_kernels([=](auto kernels) {
              kernels.template forward_run<decltype(act)::value>(to, g, u, count);
            });
          },
          written<T>(target), read_of<T>(gate), read_of<T>(up));
    });
  });
}

// The targets have gate's sizes and may be gate and up.
void backward_into(const Tensor& grad_gate, const Tensor& grad_up, const Tensor& grad_output,
                   const Tensor& gate, const Tensor& up, const std::string& activation) {
  visit_activation(activation, [&](auto act) {
    visit_dtype("gate", gate.scalar_type(), [&](auto element) {
      using T = decltype(element);
      for_each_run(
          gate,
          [](int64_t count, T* to_gate, T* to_up, const T* grad, const T* g, const T* u) {
            with_kernels([=](auto kernels) {
              kernels.template backward_run<decltype(act)::value>(to_gate, to_up, grad, g, u,
                                                                  count);
            });
          },
          written<T>(grad_gate), written<T>(grad_up), read_of<T>(grad_output), read_of<T>(gate),
          read_of<T>(up));
    });
  });
}

Tensor glu(Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  Tensor result = new_like(gate, shim_dtype(gate));
  forward_into(result, as_rows(gate), as_rows(up), activation);
  return result;
}

void glu_(Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  const Tensor target = as_own_rows("gate", gate);
  forward_into(target, target, as_rows(up), activation);
  copy_back(gate, target);
}

std::tuple<Tensor, Tensor> glu_backward(Tensor grad_output, Tensor gate, Tensor up,
                                        std::string activation) {
  check_alike("up", up, "gate", gate);
  check_alike("grad_output", grad_output, "gate", gate);
  Tensor grad_gate = new_like(gate, shim_dtype(gate)), grad_up = new_like(gate, shim_dtype(gate));
  backward_into(grad_gate, grad_up, as_rows(grad_output), as_rows(gate), as_rows(up), activation);
  return {grad_gate, grad_up};
}

void glu_backward_(Tensor grad_output, Tensor gate, Tensor up, std::string activation) {
  check_alike("up", up, "gate", gate);
  check_alike("grad_output", grad_output, "gate", gate);
  const Tensor grad_gate = as_own_rows("gate", gate), grad_up = as_own_rows("up", up);
  backward_into(grad_gate, grad_up, as_rows(grad_output), grad_gate, grad_up, activation);
  copy_back(gate, grad_gate);
  copy_back(up, grad_up);
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("glu", TORCH_BOX(&glu));
  library.impl("glu_", TORCH_BOX(&glu_));
  library.impl("glu_backward", TORCH_BOX(&glu_backward));
  library.impl("glu_backward_", TORCH_BOX(&glu_backward_));
}

}  // namespace
}  // namespace dropbp
