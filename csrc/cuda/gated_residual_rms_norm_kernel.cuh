// Device code of gated_residual_rms_norm. Raw pointers, no torch header.
//
// R, B: element types of residual and branch; W, the arithmetic's, is float or double. N columns a
// pack, of which a thread holds kHeld (rows.cuh) between a row's two passes.
#pragma once

#include "rows.cuh"

namespace dropbp {

// I/O: read residual + branch, write new_residual + normed; the weight comes from the cache.
template <class R, class B, class W, int N, int kHeld>
__global__ void __launch_bounds__(kForwardThreads)
    gated_residual_rms_norm_kernel(const R* residual,  // (num_rows, width)
                                   const B* branch,    // (num_rows, width)
                                   Weight weight, W eps, bool gemma,
                                   B* normed,        // (num_rows, width)
                                   R* new_residual,  // (num_rows, width)
                                   W* rstd,          // (num_rows)
                                   int64_t num_rows, int width) {
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    const int64_t start = row * width;
    R x[kSlots<kHeld>][N];
    W squares[1] = {};
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      B h[N];
      load(x[slot], residual + start + column);
      load(h, branch + start + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[slot][j] = narrow<R>(widen<W>(x[slot][j]) + widen<W>(h[j]));
        const W rounded = widen<W>(x[slot][j]);  // the norm reads the rounded sum
        squares[0] += rounded * rounded;
      }
      store(new_residual + start + column, x[slot]);
    });
    sum_over_team(squares);
    const W scale = reciprocal_sqrt(mean_of(squares[0], width) + eps);
    if (threadIdx.x == 0) rstd[row] = scale;
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if (kHeld == 0) load(x[slot], new_residual + start + column);  // stored by this very thread
      W factor[N];
      load_factor(factor, weight, gemma, column);
      B out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        W normalized = widen<W>(x[slot][j]) * scale;
        if (!gemma) normalized = widen<W>(narrow<B>(normalized));
        out[j] = narrow<B>(normalized * factor[j]);
      }
      store(normed + start + column, out);
    });
  }
}

// With n = x * rstd and g = grad_normed * factor: grad_residual = rstd * (g - n * mean(g * n)) +
// grad_new_residual, which may be null. A block strides over the rows; kWeightGrad: it leaves the
// sum of grad_normed * n over its rows in partial, which may be null all the same; sums_in_shared:
// of rows that are not held, by way of shared memory.
// I/O: read grad_normed + x + grad_new_residual, write grad_residual.
template <class R, class B, class W, int N, int kHeld, bool kWeightGrad>
__global__ void __launch_bounds__(kHeld > 0 ? kBackwardThreads : kWideThreads)
    gated_residual_rms_norm_backward_kernel(const B* grad_normed,        // (num_rows, width)
                                            const R* grad_new_residual,  // (num_rows, width)
                                            const R* x,                  // (num_rows, width)
                                            Weight weight, bool gemma,
                                            const W* rstd,     // (num_rows)
                                            R* grad_residual,  // (num_rows, width)
                                            W* partial,        // (gridDim.x, width)
                                            bool sums_in_shared, int64_t num_rows, int width) {
  const bool sums_weight = kWeightGrad && partial;
  W* block_sums = partial + static_cast<int64_t>(blockIdx.x) * width;
  W* wide = wide_sums(block_sums, sums_in_shared, 0, width);
  W sums[kWeightGrad ? kSlots<kHeld> : 1][N] = {};
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    const int64_t start = row * width;
    const W scale = rstd[row];
    R value[kSlots<kHeld>][N], added[kSlots<kHeld>][N];
    B grad[kSlots<kHeld>][N];
    W dot[1] = {};
    const auto load_pack = [&](int slot, int column) {
      load(value[slot], x + start + column);
      load(grad[slot], grad_normed + start + column);
    };
    const auto load_added = [&](int slot, int column) {
      load(added[slot], (grad_new_residual ? grad_new_residual : x) + start + column);
    };
    if constexpr (kHeld > 0) {
      for_each_slot<N, kHeld>(width, [&](int slot, int column) {
        load_pack(slot, column);
        load_added(slot, column);
      });
    }
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if constexpr (kHeld == 0) load_pack(slot, column);
      W factor[N];
      load_factor(factor, weight, gemma, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W product = widen<W>(grad[slot][j]) * (widen<W>(value[slot][j]) * scale);
        dot[0] += product * factor[j];
        if constexpr (kWeightGrad && kHeld > 0) {
          if (sums_weight) sums[slot][j] += product;
        }
      }
    });
    sum_over_team(dot);
    const W mean = mean_of(dot[0], width);
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if constexpr (kHeld == 0) load_pack(slot, column);
      W factor[N], out[N];
      load_factor(factor, weight, gemma, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W normalized = widen<W>(value[slot][j]) * scale;
        out[j] = scale * (widen<W>(grad[slot][j]) * factor[j] - normalized * mean);
      }
      if constexpr (kWeightGrad && kHeld == 0) {
        if (sums_weight) {
          W product[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            product[j] = widen<W>(grad[slot][j]) * (widen<W>(value[slot][j]) * scale);
          }
          add_to_sums(wide, product, column, row == first_row());
        }
      }
      if (grad_new_residual) {
        if constexpr (kHeld == 0) load_added(slot, column);
#pragma unroll
        for (int j = 0; j < N; ++j) out[j] += widen<W>(added[slot][j]);
      }
      R result[N];
#pragma unroll
      for (int j = 0; j < N; ++j) result[j] = narrow<R>(out[j]);
      store(grad_residual + start + column, result);
    });
  }
  if constexpr (kWeightGrad && kHeld > 0) {
    if (sums_weight) store_sums<N, kHeld>(block_sums, sums, width);
  } else if constexpr (kWeightGrad) {
    if (sums_weight) store_wide_sums<N>(block_sums, wide, width);
  }
}

}  // namespace dropbp
