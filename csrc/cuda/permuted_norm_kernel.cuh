// Device code of permuted_norm. Raw pointers, no torch header.
//
// R, B: element types of residual and result; W, the arithmetic's, is float or double. N columns a
// pack, of which a thread holds kHeld (rows.cuh) between a row's passes. An entry of the
// permutation names rows_per_entry consecutive rows of `width` elements.
#pragma once

#include "indices.cuh"
#include "rows.cuh"

namespace dropbp {

struct Permutation {
  const int64_t* entries;  // (num_entries)
  int64_t num_entries, rows_per_entry;
};

// Where row `row` in permuted order stands in the residual.
__device__ inline int64_t row_in_residual(const Permutation& permutation, int64_t row) {
  const int64_t place = row / permutation.rows_per_entry;
  const int64_t entry =
      checked_index("permutation", permutation.entries, place, permutation.num_entries);
  return entry * permutation.rows_per_entry + (row - place * permutation.rows_per_entry);
}

// I/O: read residual, write kept + dropped, and of kept rows x, rstd and mean; weight and bias come
// from the cache.
template <class R, class B, class W, int N, int kHeld>
__global__ void __launch_bounds__(kForwardThreads)
    permuted_norm_kernel(const R* residual,  // (num_entries * rows_per_entry, width)
                         Weight weight,
                         Weight bias,  // its values may be null
                         Permutation permutation, W eps, bool centered, bool gemma,
                         B* kept,     // (num_kept, width)
                         B* dropped,  // (the other rows, width)
                         R* kept_x,   // (num_kept, width)
                         W* mean,     // (num_kept)
                         W* rstd,     // (num_kept)
                         int64_t num_kept, int width) {
  const int64_t num_rows = permutation.num_entries * permutation.rows_per_entry;
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    const R* from = residual + row_in_residual(permutation, row) * width;
    const bool is_kept = row < num_kept;
    R x[kSlots<kHeld>][N];
    W sum[1] = {}, squares[1] = {};
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      load(x[slot], from + column);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[0] += widen<W>(x[slot][j]);
      if (is_kept) store(kept_x + row * width + column, x[slot]);
    });
    W centre = 0;
    if (centered) {  // alike for all threads
      sum_over_team(sum);
      centre = mean_of(sum[0], width);
    }
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if (kHeld == 0) load(x[slot], from + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W value = widen<W>(x[slot][j]) - centre;
        squares[0] += value * value;
      }
    });
    sum_over_team(squares);
    const W scale = reciprocal_sqrt(mean_of(squares[0], width) + eps);
    if (is_kept && threadIdx.x == 0) {
      rstd[row] = scale;
      if (centered) mean[row] = centre;
    }
    B* normed = is_kept ? kept + row * width : dropped + (row - num_kept) * width;
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if (kHeld == 0) load(x[slot], from + column);
      W factor[N], shift[N] = {};
      load_factor(factor, weight, gemma, column);
      if (bias.values) load_weight(shift, bias, column);
      B out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        W normalized = (widen<W>(x[slot][j]) - centre) * scale;
        if (!centered && !gemma) normalized = widen<W>(narrow<B>(normalized));
        out[j] = narrow<B>(normalized * factor[j] + shift[j]);
      }
      store(normed + column, out);
    });
  }
}

// With n = (x - mean) * rstd and g = grad_kept * factor: the kept rows of grad_residual gain
// rstd * (g - n * mean(g * n) - mean(g)), the last term if centered. A block strides over the kept
// rows; kColumnSums: it leaves the sums of grad_kept * n and of grad_kept over its rows in
// weight_partial and bias_partial, each of which may be null all the same; sums_in_shared: of rows
// that are not held, by way of shared memory.
// I/O, of kept rows: read grad_kept + x + grad_residual, write grad_residual.
template <class R, class B, class W, int N, int kHeld, bool kColumnSums>
__global__ void __launch_bounds__(kHeld > 0 ? kBackwardThreads : kWideThreads)
    permuted_norm_backward_kernel(const B* grad_kept,  // (num_kept, width)
                                  const R* kept_x,     // (num_kept, width)
                                  Weight weight,
                                  const W* mean,  // (num_kept), read if centered
                                  const W* rstd,  // (num_kept)
                                  Permutation permutation, bool centered, bool gemma,
                                  R* grad_residual,   // (num_entries * rows_per_entry, width)
                                  W* weight_partial,  // (gridDim.x, width)
                                  W* bias_partial,    // (gridDim.x, width)
                                  bool sums_in_shared, int64_t num_kept, int width) {
  const bool sums_weight = kColumnSums && weight_partial, sums_bias = kColumnSums && bias_partial;
  const int64_t at_block = static_cast<int64_t>(blockIdx.x) * width;
  W* wide_weights = wide_sums(weight_partial + at_block, sums_in_shared, 0, width);
  W* wide_biases = wide_sums(bias_partial + at_block, sums_in_shared, sums_weight, width);
  W weight_sums[kColumnSums ? kSlots<kHeld> : 1][N] = {};
  W bias_sums[kColumnSums ? kSlots<kHeld> : 1][N] = {};
  for (int64_t row = first_row(); row < num_kept; row += row_stride()) {
    const int64_t start = row * width;
    R* target = grad_residual + row_in_residual(permutation, row) * width;
    const W centre = centered ? mean[row] : W{0}, scale = rstd[row];
    R value[kSlots<kHeld>][N], added[kSlots<kHeld>][N];
    B grad[kSlots<kHeld>][N];
    W sums[2] = {};  // of g, of g * n
    const auto load_pack = [&](int slot, int column) {
      load(value[slot], kept_x + start + column);
      load(grad[slot], grad_kept + start + column);
    };
    const auto load_added = [&](int slot, int column) { load(added[slot], target + column); };
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
        const W gradient = widen<W>(grad[slot][j]);
        const W normalized = (widen<W>(value[slot][j]) - centre) * scale;
        sums[0] += gradient * factor[j];
        sums[1] += gradient * factor[j] * normalized;
        if constexpr (kColumnSums && kHeld > 0) {
          if (sums_weight) weight_sums[slot][j] += gradient * normalized;
          if (sums_bias) bias_sums[slot][j] += gradient;
        }
      }
    });
    sum_over_team(sums);
    const W mean_grad = centered ? mean_of(sums[0], width) : W{0};
    const W mean_dot = mean_of(sums[1], width);
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if constexpr (kHeld == 0) load_pack(slot, column);
      W factor[N], gradient[N], product[N];
      load_factor(factor, weight, gemma, column);
      if constexpr (kHeld == 0) load_added(slot, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        gradient[j] = widen<W>(grad[slot][j]);
        const W normalized = (widen<W>(value[slot][j]) - centre) * scale;
        product[j] = gradient[j] * normalized;
        const W inner = gradient[j] * factor[j] - mean_grad - normalized * mean_dot;
        added[slot][j] = narrow<R>(widen<W>(added[slot][j]) + scale * inner);
      }
      if constexpr (kColumnSums && kHeld == 0) {
        const bool is_first = row == first_row();
        if (sums_weight) add_to_sums(wide_weights, product, column, is_first);
        if (sums_bias) add_to_sums(wide_biases, gradient, column, is_first);
      }
      store(target + column, added[slot]);
    });
  }
  if constexpr (kColumnSums && kHeld > 0) {
    if (sums_weight) store_sums<N, kHeld>(weight_partial + at_block, weight_sums, width);
    if (sums_bias) store_sums<N, kHeld>(bias_partial + at_block, bias_sums, width);
  } else if constexpr (kColumnSums) {
    if (sums_weight) store_wide_sums<N>(weight_partial + at_block, wide_weights, width);
    if (sums_bias) store_wide_sums<N>(bias_partial + at_block, wide_biases, width);
  }
}

}  // namespace dropbp
