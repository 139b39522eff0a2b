// CPU kernels of dropbp_kernels::gated_residual_add, its in-place form and its backward.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#include <algorithm>
#include <optional>

#define DROPBP_KERNELS "gated_residual_add_kernels.h"
#include "dispatch.h"
#include "each_isa.h"
#include "rows.h"

namespace dropbp {
namespace {

// Rows chosen from all over an array start cold, and a second thread pays earlier than kGrain.
constexpr int64_t kRowsGrain = kGrain / 2;

// Where nothing is converted, memory is the limit and 32-byte vectors reach it best: beyond the L2
// cache 5 to 25 % faster than 64-byte ones (Zen 4, November 2026).
template <class R, class B>
void add_run(R* output, const R* residual, const B* branch, int64_t count) {
  constexpr int kMaxVectorBytes = std::is_same_v<R, B> && sizeof(R) >= 4 ? 32 : 64;
  with_kernels<kMaxVectorBytes>(
      [&](auto kernels) { kernels.add_run(output, residual, branch, count); });
}

template <class... Arguments>
void scale_run(Arguments... arguments) {
  with_kernels([&](auto kernels) { kernels.scale_run(arguments...); });
}

// Cuts elements [begin, end) of an array (num_rows, width) at the ends of its rows.
template <class Visitor>
void for_each_row_part(int64_t begin, int64_t end, int64_t width, const Visitor& visitor) {
  while (begin < end) {
    const int64_t column = begin % width;
    const int64_t count = std::min(width - column, end - begin);
    visitor(begin / width, column, count);
    begin += count;
  }
}

int64_t row_width(const Tensor& tensor) {
  int64_t width = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) width *= tensor.size(d);
  return width;
}

const int64_t* checked_rows(const Tensor& rows, int64_t num_rows) {
  const int64_t* begin = input<int64_t>(rows);
  for (int64_t k = 0; k < rows.numel(); ++k) {
    if (begin[k] < 0 || begin[k] >= num_rows) {
      fail<std::out_of_range>("rows: expected numbers from 0 to ", num_rows - 1, ", got ", begin[k],
                              " at place ", k);
    }
  }
  return begin;
}

void check_pair(const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& rows) {
  if (rows) {
    check_rows(*rows, residual, branch);
  } else {
    check_numel("branch", branch, residual.numel());
  }
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
  const int64_t num_rows = residual.size(0), width = row_width(residual);
  const int64_t* place = checked_rows(places, num_rows);
  std::vector<int64_t> branch_row(num_rows, -1);  // where each row of residual finds its branch
  for (int64_t k = 0; k < places.numel(); ++k) branch_row[place[k]] = k;

  visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
    using R = decltype(r);
    using B = decltype(b);
    R* out = output<R>(result);
    const R* res = input<R>(residual);
    const B* add = input<B>(branch);
    torch::stable::parallel_for(0, residual.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_each_row_part(begin, end, width, [&](int64_t row, int64_t column, int64_t count) {
        const int64_t at = row * width + column;
        if (branch_row[row] < 0) {
          std::copy_n(res + at, count, out + at);
        } else {
          add_run(out + at, res + at, add + branch_row[row] * width + column, count);
        }
      });
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
    const int64_t width = row_width(residual);
    const int64_t* place = checked_rows(places, residual.size(0));
    visit_residual_and_branch(residual.scalar_type(), branch.scalar_type(), [&](auto r, auto b) {
      using R = decltype(r);
      using B = decltype(b);
      R* out = output<R>(target);
      const B* add = input<B>(branch);
      torch::stable::parallel_for(0, branch.numel(), kRowsGrain, [=](int64_t begin, int64_t end) {
        for_each_row_part(begin, end, width, [=](int64_t k, int64_t column, int64_t count) {
          R* at = out + place[k] * width + column;
          add_run(at, at, add + k * width + column, count);
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
  const int64_t width = row_width(grad_output);
  std::optional<Tensor> places;
  const int64_t* place = nullptr;
  if (rows) {
    check_dtype("rows", *rows, ScalarType::Long);
    places = dense(*rows);
    place = checked_rows(*places, num_rows);
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
        torch::stable::parallel_for(
            0, grad_branch.numel(), kGrain, [=](int64_t begin, int64_t end) {
              scale_run(out + begin, grad + begin, scale, W{1}, end - begin);
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
              scale_run(to, from, scale, factor ? factor[k] : W{1}, count);
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
