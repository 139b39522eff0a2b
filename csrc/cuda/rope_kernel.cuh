// Device code of rope. Raw pointers, no torch header.
#pragma once

#include "elements.cuh"

namespace dropbp {

// Where a token's heads lie; the channels of a head are contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t batch, seq, head;  // strides

  __device__ T* at(int64_t sample, int64_t position, int64_t h) const {
    return data + sample * batch + position * seq + h * head;
  }
};

// Pairs of channels (i, i + half) turned by their position's angle, kTranspose: turned back, N
// pairs at a time; the other channels copied unless output is x. N divides half and width.
template <bool kTranspose, class T, class C, int N>
__global__ void rope_kernel(Heads<T> output, Heads<const T> x, const C* cos, const C* sin,
                            int64_t table_stride, int64_t num_tokens, int64_t seq_len,
                            int64_t num_heads, int64_t half, int64_t width) {
  using W = Wide<T>;
  const int64_t pairs = half / N;
  const int64_t rest = output.data == x.data ? 0 : (width - 2 * half) / N;
  const int64_t per_head = pairs + rest, per_token = num_heads * per_head;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; index < num_tokens * per_token; index += step) {
    const int64_t token = index / per_token, in_token = index - token * per_token;
    const int64_t head = in_token / per_head, pack = in_token - head * per_head;
    const int64_t sample = token / seq_len, position = token - sample * seq_len;
    const T* from = x.at(sample, position, head);
    T* to = output.at(sample, position, head);
    if (pack >= pairs) {
      T values[N];
      const int64_t column = 2 * half + (pack - pairs) * N;
      load(values, from + column);
      store(to + column, values);
      continue;
    }
    const int64_t column = pack * N;
    const int64_t row = sample * table_stride + position * 2 * half + column;
    T a[N], b[N];
    C cos_a[N], cos_b[N], sin_a[N], sin_b[N];
    load(a, from + column);
    load(b, from + half + column);
    load(cos_a, cos + row);
    load(cos_b, cos + row + half);
    load(sin_a, sin + row);
    load(sin_b, sin + row + half);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W u = widen<W>(a[j]), v = widen<W>(b[j]);
      const W c = widen<W>(cos_a[j]), d = widen<W>(cos_b[j]);
      const W s = widen<W>(sin_a[j]), t = widen<W>(sin_b[j]);
      a[j] = narrow<T>(kTranspose ? u * c + v * t : u * c - v * s);
      b[j] = narrow<T>(kTranspose ? v * d - u * s : v * d + u * t);
    }
    store(to + column, a);
    store(to + half + column, b);
  }
}

}  // namespace dropbp
