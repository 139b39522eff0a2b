// CUDA launches of dropbp_kernels::gated_residual_add, its in-place form and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "gated_residual_add_kernel.cuh"
#include "launch.h"

namespace dropbp {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads, all that fit

// Runs a kernel over `count` elements, `pack` per thread at a time, on the current stream of the
// current device.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Tensor& tensor, int64_t count,
            int pack, Arguments... arguments) {
  if (count == 0) return;
  const int64_t packs = (count + pack - 1) / pack;
  const int64_t blocks =
      std::min<int64_t>((packs + kThreads - 1) / kThreads,
                        int64_t{num_multiprocessors(tensor, name)} * kBlocksPerMultiprocessor);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(tensor)>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

int64_t row_width(const Tensor& tensor) {
  int64_t width = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) width *= tensor.size(d);
  return width;
}

const int64_t* row_pointer(const std::optional<Tensor>& rows) {
  return rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
}

// target[rows] = residual[rows] + branch; all contiguous. target may be residual, and is where rows
// are given.
void add_into(const Tensor& target, const Tensor& residual, const Tensor& branch,
              const std::optional<Tensor>& rows) {
  const int64_t num_rows = rows ? residual.size(0) : 0, width = row_width(residual);
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    R* to = static_cast<R*>(target.mutable_data_ptr());
    const R* from = static_cast<const R*>(residual.const_data_ptr());
    const B* add = static_cast<const B*>(branch.const_data_ptr());
    const auto run = [&](auto pack) {
      constexpr int kN = decltype(pack)::value;
      launch("gated_residual_add", gated_residual_add_kernel<R, B, kN>, residual, branch.numel(),
             kN, to, from, add, row_pointer(rows), num_rows, width, branch.numel());
    };
    if (packs_fit(kPack<R, B>, rows.has_value(), width, {to, from, add})) {
      run(std::integral_constant<int, kPack<R, B>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

void check_pair(const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& rows) {
  if (rows) {
    check_rows(*rows, residual, branch);
  } else {
    check_numel("branch", branch, residual.numel());
  }
}

Tensor gated_residual_add(Tensor residual, Tensor branch, std::optional<Tensor> rows) {
  check_pair(residual, branch, rows);
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  residual = dense(residual);
  branch = dense(branch);
  Tensor result = new_like(residual, shim_dtype(residual));
  if (!rows) {
    add_into(result, residual, branch, rows);
  } else {
    torch::stable::copy_(result, residual);
    add_into(result, result, branch, dense(*rows));
  }
  return result;
}

void gated_residual_add_(Tensor residual, Tensor branch, std::optional<Tensor> rows) {
  check_pair(residual, branch, rows);
  const torch::stable::accelerator::DeviceGuard guard(residual.get_device_index());
  const Tensor target = dense(residual);
  if (rows) rows = dense(*rows);
  add_into(target, target, dense(branch), rows);
  if (!residual.is_contiguous()) torch::stable::copy_(residual, target);
}

Tensor gated_residual_add_backward(Tensor grad_output, std::optional<Tensor> rows,
                                   std::optional<Tensor> row_scale, double grad_scale,
                                   ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(grad_output.get_device_index());
  grad_output = dense(grad_output);
  const bool has_dim_0 = grad_output.dim() > 0;
  if (!has_dim_0 && (rows || row_scale))
    fail("grad_output: expected at least one dimension, got 0");
  const int64_t num_rows = has_dim_0 ? grad_output.size(0) : 1, width = row_width(grad_output);
  if (rows) {
    check_dtype("rows", *rows, ScalarType::Long);
    rows = dense(*rows);
  }
  if (row_scale) check_numel("row_scale", *row_scale, rows ? rows->numel() : num_rows);
  Tensor grad_branch = rows ? new_rows(grad_output, rows->numel(), shim_dtype(dtype))
                            : new_like(grad_output, shim_dtype(dtype));

  visit_dtype("grad_output", grad_output.scalar_type(), [&](auto g) {
    using G = decltype(g);
    visit_dtype("dtype", dtype, [&](auto b) {
      using B = decltype(b);
      using W = std::conditional_t<std::is_same_v<B, double>, double, Wide<G>>;
      const W* factor = nullptr;
      if (row_scale) {
        constexpr auto kWide = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
        row_scale = dense(torch::stable::to(*row_scale, kWide));
        factor = static_cast<const W*>(row_scale->const_data_ptr());
      }
      B* to = static_cast<B*>(grad_branch.mutable_data_ptr());
      const G* from = static_cast<const G*>(grad_output.const_data_ptr());
      const auto run = [&](auto pack) {
        constexpr int kN = decltype(pack)::value;
        launch("gated_residual_add_backward", gated_residual_add_backward_kernel<G, B, W, kN>,
               grad_output, grad_branch.numel(), kN, to, from, row_pointer(rows), factor,
               static_cast<W>(grad_scale), num_rows, width, grad_branch.numel());
      };
      if (packs_fit(kPack<G, B>, rows || row_scale, width, {to, from})) {
        run(std::integral_constant<int, kPack<G, B>>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    });
  });
  return grad_branch;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CUDA, library) {
  library.impl("gated_residual_add", TORCH_BOX(&gated_residual_add));
  library.impl("gated_residual_add_", TORCH_BOX(&gated_residual_add_));
  library.impl("gated_residual_add_backward", TORCH_BOX(&gated_residual_add_backward));
}

}  // namespace
}  // namespace dropbp
