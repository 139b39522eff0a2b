// Device code of column_update_ and column_restore_. Raw pointers, no torch header.
#pragma once

#include "elements.cuh"
#include "indices.cuh"

namespace dropbp {

// Chosen columns of a weight (num_rows, width) of any strides.
struct Columns {
  const int64_t* index;  // (num_columns), all different
  int64_t num_rows, num_columns, width;
  int64_t row_stride, column_stride;

  // The place of element i in the weight and, returned, in a compact (num_rows, num_columns).
  // Neighbouring threads take neighbours of the weight where it has any: of one column, if columns
  // are contiguous.
  __device__ int64_t place(int64_t i, int64_t& in_weight) const {
    const bool by_column = row_stride == 1;
    const int64_t row = by_column ? i % num_rows : i / num_columns;
    const int64_t k = by_column ? i / num_rows : i % num_columns;
    in_weight = row * row_stride + checked_index("index", index, k, width) * column_stride;
    return row * num_columns + k;
  }
};

// original = the columns of weight; weight's columns = original + scale * delta in W, rounded once.
template <class W, class T, class D>
__global__ void column_update_kernel(T* weight, T* original, const D* delta, Columns columns,
                                     W scale, int64_t count) {  // num_rows * num_columns
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < count; i += step) {
    int64_t in_weight;
    const int64_t compact = columns.place(i, in_weight);
    const T old = weight[in_weight];
    original[compact] = old;
    const W sum = widen<W>(old) + scale * widen<W>(delta[compact]);
    weight[in_weight] = narrow<T>(sum);
  }
}

template <class T>
__global__ void column_restore_kernel(T* weight, const T* original, Columns columns,
                                      int64_t count) {  // num_rows * num_columns
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < count; i += step) {
    int64_t in_weight;
    const int64_t compact = columns.place(i, in_weight);
    weight[in_weight] = original[compact];
  }
}

}  // namespace dropbp
