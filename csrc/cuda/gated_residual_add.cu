// CUDA launches of dropbp_kernels::gated_residual_add, its in-place form and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <optional>

#include "../gated_residual_add.h"
#include "gated_residual_add_kernel.cuh"
#include "launch.h"

namespace dropbp {
namespace {

const int64_t* row_pointer(const std::optional<Tensor>& rows) {
  return rows ? input<int64_t>(*rows) : nullptr;
}

// target[rows] = residual[rows] + branch; all contiguous. target may be residual, and is where rows
// are given.
void add_into(const Tensor& target, const Tensor& residual, const Tensor& branch,
              const std::optional<Tensor>& rows) {
  const int64_t num_rows = rows ? residual.size(0) : 0, width = row_size(residual);
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    R* to = output<R>(target);
    const R* from = input<R>(residual);
    const B* add = input<B>(branch);
    const auto run = [&](auto pack) {
      constexpr int kN = decltype(pack)::value;
      launch_strided("gated_residual_add", gated_residual_add_kernel<R, B, kN>,
                     packs_of(branch.numel(), kN), residual, to, from, add, row_pointer(rows),
                     num_rows, width, branch.numel());
    };
    if (packs_fit(kFlatPack<R, B>, rows.has_value(), width, {to, from, add})) {
      run(std::integral_constant<int, kFlatPack<R, B>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
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
  const int64_t num_rows = has_dim_0 ? grad_output.size(0) : 1, width = row_size(grad_output);
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
        factor = input<W>(*row_scale);
      }
      B* to = output<B>(grad_branch);
      const G* from = input<G>(grad_output);
      const auto run = [&](auto pack) {
        constexpr int kN = decltype(pack)::value;
        launch_strided("gated_residual_add_backward",
                       gated_residual_add_backward_kernel<G, B, W, kN>,
                       packs_of(grad_branch.numel(), kN), grad_output, to, from, row_pointer(rows),
                       factor, static_cast<W>(grad_scale), num_rows, width, grad_branch.numel());
      };
      if (packs_fit(kFlatPack<G, B>, rows || row_scale, width, {to, from})) {
        run(std::integral_constant<int, kFlatPack<G, B>>{});
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
