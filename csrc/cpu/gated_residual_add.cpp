// CPU kernels of dropbp_kernels::gated_residual_add, its in-place form and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include "../gated_residual_add.h"

#include <algorithm>
#include <optional>

#define DROPBP_KERNELS "gated_residual_add_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "indices.h"
#include "row_add.h"
#include "rows.h"

namespace dropbp {
namespace {

// Rows chosen from all over an array start cold, and a second thread pays earlier than kGrain.
constexpr int64_t kRowsGrain = kGrain / 2;

template <class... Arguments>
void scale_run(Arguments... arguments) {
  with_kernels([&](auto kernels) { kernels.scale_run(arguments...); });
}

// residual and branch are contiguous and of one size; output may be residual.
void add_all(const Tensor& output_tensor, const Tensor& residual, const Tensor& branch) {
  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    R* out = output<R>(output_tensor);
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    torch::stable::parallel_for(0, residual.numel(), kGrain, [=](int64_t begin, int64_t end) {
      add_run(out + begin, res + begin, add + begin, end - begin);
    });
  });
}

Tensor gated_residual_add(Tensor residual, Tensor branch, std::optional<Tensor> rows) {
  check_pair(residual, branch, rows);
  residual = dense(residual);
  branch = dense(branch);
  Tensor result = new_like(residual, shim_dtype(residual));
  if (!rows) {
    add_all(result, residual, branch);
    return result;
  }
  const Tensor places = dense(*rows);
  const int64_t num_rows = residual.size(0), width = row_size(residual);
  const int64_t* place = checked_indices("rows", places, num_rows);
  const std::vector<int64_t> branch_row = places_in(place, places.numel(), num_rows);

  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    const B* add = input<B>(branch);
    add_rows<R, B>(result, residual, num_rows, width, [&](int64_t row) -> const B* {
      return branch_row[row] < 0 ? nullptr : add + branch_row[row] * width;
    });
  });
  return result;
}

void gated_residual_add_(Tensor residual, Tensor branch, std::optional<Tensor> rows) {
  check_pair(residual, branch, rows);
  Tensor target = dense(residual);
  branch = dense(branch);
  if (!rows) {
    add_all(target, target, branch);
  } else {
    const Tensor places = dense(*rows);
    const int64_t width = row_size(residual);
    const int64_t* place = checked_indices("rows", places, residual.size(0));
    visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
      using R = decltype(r);
      using B = decltype(b);
      R* out = output<R>(target);
      const B* add = input<B>(branch);
      const int64_t last = places.numel() - 1;
      torch::stable::parallel_for(0, branch.numel(), kRowsGrain, [=](int64_t begin, int64_t end) {
        for_each_row_part(begin, end, width, [=](int64_t k, int64_t column, int64_t count) {
          R* at = out + place[k] * width + column;
          const R* next = out + place[std::min(k + 1, last)] * width;
          add_run(at, at, add + k * width + column, count, next);
        });
      });
    });
  }
  if (!residual.is_contiguous()) torch::stable::copy_(residual, target);
}

Tensor gated_residual_add_backward(Tensor grad_output, std::optional<Tensor> rows,
                                   std::optional<Tensor> row_scale, double grad_scale,
                                   ScalarType dtype) {
  grad_output = dense(grad_output);
  const bool has_dim_0 = grad_output.dim() > 0;
  if (!has_dim_0 && (rows || row_scale))
    fail("grad_output: expected at least one dimension, got 0");
  int64_t num_rows = has_dim_0 ? grad_output.size(0) : 1;
  const int64_t width = row_size(grad_output);
  std::optional<Tensor> places;
  const int64_t* place = nullptr;
  if (rows) {
    check_dtype("rows", *rows, ScalarType::Long);
    places = dense(*rows);
    place = checked_indices("rows", *places, num_rows);
    num_rows = places->numel();
  }
  if (row_scale) check_numel("row_scale", *row_scale, num_rows);
  Tensor grad_branch = rows ? new_rows(grad_output, num_rows, shim_dtype(dtype))
                            : new_like(grad_output, shim_dtype(dtype));

  visit_dtype("grad_output", grad_output.scalar_type(), [&](auto g) {
    using G = decltype(g);
    visit_dtype("dtype", dtype, [&](auto b) {
      using B = decltype(b);
      using W = std::conditional_t<std::is_same_v<B, double>, double, Wide<G>>;
      std::optional<Widened<W>> factors;
      if (row_scale) factors.emplace(*row_scale);
      const W* factor = factors ? factors->data() : nullptr;
      const G* grad = input<G>(grad_output);
      B* out = output<B>(grad_branch);
      const W scale = static_cast<W>(grad_scale);
      if (!place && !factor) {
        torch::stable::parallel_for(0, grad_branch.numel(), kGrain,
                                    [=](int64_t begin, int64_t end) {
                                      scale_run(out + begin, grad + begin, scale, end - begin);
                                    });
        return;
      }
      torch::stable::parallel_for(
          0, grad_branch.numel(), kRowsGrain, [=](int64_t begin, int64_t end) {
            for_each_row_part(begin, end, width, [=](int64_t k, int64_t column, int64_t count) {
              B* to = out + k * width + column;
              if (factor && factor[k] == 0) {
                std::fill_n(to, count, B{});
                return;
              }
              const G* from = grad + (place ? place[k] : k) * width + column;
              scale_run(to, from, factor ? scale * factor[k] : scale, count);
            });
          });
    });
  });
  return grad_branch;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("gated_residual_add", TORCH_BOX(&gated_residual_add));
  library.impl("gated_residual_add_", TORCH_BOX(&gated_residual_add_));
  library.impl("gated_residual_add_backward", TORCH_BOX(&gated_residual_add_backward));
}

}  // namespace
}  // namespace dropbp
