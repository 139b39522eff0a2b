// Device code of gated_residual_layer_norm. Raw pointers, no torch header.
//
// R, B: element types of residual and branch; W, the arithmetic's, is float or double. N columns a
// pack, of which a thread holds kHeld (rows.cuh) between a row's passes.
#pragma once

#include "rows.cuh"

namespace dropbp {

// I/O: read residual + branch, write new_residual + normed; weight and bias come from the cache.
template <class R, class B, class W, int N, int kHeld>
__global__ void __launch_bounds__(kForwardThreads)
    gated_residual_layer_norm_kernel(const R* residual,  // (num_rows, width)
                                     const B* branch,    // (num_rows, width)
                                     Weight weight,
                                     Weight bias,  // its values may be null
                                     W eps,
                                     B* normed,        // (num_rows, width)
                                     R* new_residual,  // (num_rows, width)
                                     W* mean,          // (num_rows)
                                     W* rstd,          // (num_rows)
                                     int64_t num_rows, int width) {
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    const int64_t start = row * width;
    R x[kSlots<kHeld>][N];
    W sum[1] = {}, squares[1] = {};
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      B h[N];
      load(x[slot], residual + start + column);
      load(h, branch + start + column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[slot][j] = narrow<R>(widen<W>(x[slot][j]) + widen<W>(h[j]));
        sum[0] += widen<W>(x[slot][j]);  // the norm reads the rounded sum
      }
      store(new_residual + start + column, x[slot]);
    });
    sum_over_team(sum);
    const W centre = mean_of(sum[0], width);
    // Around the mean: the mean of squares less the square of the mean would lose everything to a
    // large mean.
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if (kHeld == 0) load(x[slot], new_residual + start + column);  // stored by this very thread
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W centred = widen<W>(x[slot][j]) - centre;
        squares[0] += centred * centred;
      }
    });
    sum_over_team(squares);
    const W scale = reciprocal_sqrt(mean_of(squares[0], width) + eps);
    if (threadIdx.x == 0) {
      mean[row] = centre;
      rstd[row] = scale;
    }
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if (kHeld == 0) load(x[slot], new_residual + start + column);
      W factor[N], shift[N] = {};
      load_weight(factor, weight, column);
      if (bias.values) load_weight(shift, bias, column);
      B out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out[j] = narrow<B>((widen<W>(x[slot][j]) - centre) * scale * factor[j] + shift[j]);
      }
      store(normed + start + column, out);
    });
  }
}

// With n = (x - mean) * rstd and g = grad_normed * weight: grad_residual = rstd * (g - mean(g) -
// n * mean(g * n)) + grad_new_residual, which may be null. A block strides over the rows;
// kColumnSums: it leaves the sums of grad_normed * n and of grad_normed over its rows in
// weight_partial and bias_partial, each of which may be null all the same; sums_in_shared: of rows
// that are not held, by way of shared memory.
// I/O: read grad_normed + x + grad_new_residual, write grad_residual.
template <class R, class B, class W, int N, int kHeld, bool kColumnSums>
__global__ void __launch_bounds__(kHeld > 0 ? kBackwardThreads : kWideThreads)
    gated_residual_layer_norm_backward_kernel(const B* grad_normed,        // (num_rows, width)
                                              const R* grad_new_residual,  // (num_rows, width)
                                              const R* x,                  // (num_rows, width)
                                              Weight weight,
                                              const W* mean_of_row,  // (num_rows)
                                              const W* rstd,         // (num_rows)
                                              R* grad_residual,      // (num_rows, width)
                                              W* weight_partial,     // (gridDim.x, width)
                                              W* bias_partial,       // (gridDim.x, width)
                                              bool sums_in_shared, int64_t num_rows, int width) {
  const bool sums_weight = kColumnSums && weight_partial, sums_bias = kColumnSums && bias_partial;
  const int64_t at_block = static_cast<int64_t>(blockIdx.x) * width;
  W* wide_weights = wide_sums(weight_partial + at_block, sums_in_shared, 0, width);
  W* wide_biases = wide_sums(bias_partial + at_block, sums_in_shared, sums_weight, width);
  W weight_sums[kColumnSums ? kSlots<kHeld> : 1][N] = {};
  W bias_sums[kColumnSums ? kSlots<kHeld> : 1][N] = {};
  for (int64_t row = first_row(); row < num_rows; row += row_stride()) {
    const int64_t start = row * width;
    const W centre = mean_of_row[row], scale = rstd[row];
    R value[kSlots<kHeld>][N], added[kSlots<kHeld>][N];
    B grad[kSlots<kHeld>][N];
    W sums[2] = {};  // of g, of g * n
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
      load_weight(factor, weight, column);
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
    const W mean_grad = mean_of(sums[0], width), mean_dot = mean_of(sums[1], width);
    for_each_pack<N, kHeld>(width, [&](int slot, int column) {
      if constexpr (kHeld == 0) load_pack(slot, column);
      W factor[N], gradient[N], product[N], out[N];
      load_weight(factor, weight, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        gradient[j] = widen<W>(grad[slot][j]);
        const W normalized = (widen<W>(value[slot][j]) - centre) * scale;
        product[j] = gradient[j] * normalized;
        out[j] = scale * (gradient[j] * factor[j] - mean_grad - normalized * mean_dot);
      }
      if constexpr (kColumnSums && kHeld == 0) {
        const bool is_first = row == first_row();
        if (sums_weight) add_to_sums(wide_weights, product, column, is_first);
        if (sums_bias) add_to_sums(wide_biases, gradient, column, is_first);
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
  if constexpr (kColumnSums && kHeld > 0) {
    if (sums_weight) store_sums<N, kHeld>(weight_partial + at_block, weight_sums, width);
    if (sums_bias) store_sums<N, kHeld>(bias_partial + at_block, bias_sums, width);
  } else if constexpr (kColumnSums) {
    if (sums_weight) store_wide_sums<N>(weight_partial + at_block, wide_weights, width);
    if (sums_bias) store_wide_sums<N>(bias_partial + at_block, wide_biases, width);
  }
}

}  // namespace dropbp
