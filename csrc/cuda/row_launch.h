// Launches of norms over rows: how many threads share a row, how many blocks run, and the sums of
// their partial column sums.
#pragma once

#include <limits>
#include <optional>
#include <type_traits>

#include "../norms.h"
#include "launch.h"
#include "rows.cuh"

namespace dropbp {

// check_width, for kernels that count the columns of a row in 32 bits.
inline int64_t check_packed_width(const Tensor& rows_by_width, int64_t width) {
  // A pack beyond the row must not pass 2^31.
  constexpr int64_t kWidest = std::numeric_limits<int>::max() / 2;
  if (width > kWidest) fail("weight: expected at most ", kWidest, " elements, got ", width);
  return check_width(rows_by_width, width);
}

inline Tensor new_partial(int64_t num_blocks, int64_t width, ScalarType dtype, const Tensor& like) {
  const int64_t sizes[] = {num_blocks, width};
  return new_tensor(sizes, 2, shim_dtype(dtype), like);
}

// `tensor`, contiguous, must outlive the kernel's launch.
inline Weight weight_of(const Tensor& tensor) {
  Weight weight{tensor.const_data_ptr(), ElementType::kFloat};
  visit_dtype("weight", tensor.scalar_type(), [&](auto t) {
    using T = decltype(t);
    weight.type = std::is_same_v<T, float>           ? ElementType::kFloat
                  : std::is_same_v<T, __half>        ? ElementType::kHalf
                  : std::is_same_v<T, __nv_bfloat16> ? ElementType::kBFloat16
                                                     : ElementType::kDouble;
  });
  return weight;
}

// How a row is shared: by one warp, four rows a block, or by a whole block. Chosen by the count of
// packs; not yet measured on a GPU.
struct Team {
  Team(int64_t width, int pack, int held, int max_threads) {
    constexpr int64_t kWarp = 32;
    const int64_t packs = (width + pack - 1) / pack;
    const int64_t threads = held > 0 ? (packs + held - 1) / held : packs;
    const int64_t wanted = std::max<int64_t>((threads + kWarp - 1) / kWarp, 1) * kWarp;
    is_held = held > 0 && wanted <= max_threads;
    block = dim3(static_cast<unsigned>(std::min<int64_t>(wanted, kWideThreads)));
    if (is_held && wanted == kWarp) block.y = kTeamsOfWarps;
  }
  bool is_held;
  dim3 block;
};

// Calls visitor(pack size, packs held, block), the first two as integral constants. Packs are of 16
// bytes of the narrower type where alignment allows. Else, and for double, single elements, and no
// row is held: rare, and half the kernels to compile.
template <class R, class B, int kHeld, int kMaxThreads, class Visitor>
void visit_team(int64_t width, std::initializer_list<const void*> pointers,
                const Visitor& visitor) {
  using None = std::integral_constant<int, 0>;
  if constexpr (!std::is_same_v<R, double>) {
    if (packs_fit(kPack<R, B>, true, width, pointers)) {
      constexpr std::integral_constant<int, kPack<R, B>> pack;
      const Team team(width, pack.value, kHeld, kMaxThreads);
      if (team.is_held) return visitor(pack, std::integral_constant<int, kHeld>{}, team.block);
      return visitor(pack, None{}, team.block);
    }
  }
  visitor(std::integral_constant<int, 1>{}, None{}, Team(width, 1, 0, kMaxThreads).block);
}

struct Grid {
  int64_t blocks;
  dim3 block;
  size_t shared_bytes = 0;
};

// Blocks for all rows at once, as many as a grid can have.
inline Grid grid_for_all(int64_t num_rows, dim3 block) {
  return {std::min<int64_t>((num_rows + block.y - 1) / block.y, std::numeric_limits<int>::max()),
          block};
}

// Shared memory for `num_sums` sums of W over columns; none where a block cannot have so much.
template <class W, class... Parameters>
size_t shared_bytes_of(const char* name, void (*kernel)(Parameters...), int num_sums, int64_t width,
                       const Tensor& tensor) {
  constexpr int64_t kOfTeams = 2 * 32 * sizeof(double);  // what sum_over_team has at most
  const int64_t bytes = num_sums * width * static_cast<int64_t>(sizeof(W));
  int most;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    tensor.get_device_index()),
             name);
  if (bytes == 0 || bytes + kOfTeams > most) return 0;
  // Always the same: another thread may launch the kernel for another width in between.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(most - kOfTeams)),
             name);
  return static_cast<size_t>(bytes);
}

// Blocks that run at the same time and stride over the rows: each leaves a partial sum, so their
// number depends on the GPU and not on the number of rows. num_sums: sums of W over the columns of
// rows that are not held.
template <class W, class... Parameters>
Grid grid_at_once(const char* name, void (*kernel)(Parameters...), int64_t num_rows, int64_t width,
                  dim3 block, int num_sums, const Tensor& tensor) {
  // None where rows are empty: for_each_slot loads from each.
  Grid grid = grid_for_all(width > 0 ? num_rows : 0, block);
  if (num_sums > 0) grid.shared_bytes = shared_bytes_of<W>(name, kernel, num_sums, width, tensor);
  int per_multiprocessor = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &per_multiprocessor, kernel, static_cast<int>(block.x * block.y), grid.shared_bytes),
      name);
  const int64_t at_once =
      int64_t{num_multiprocessors(tensor, name)} * std::max(per_multiprocessor, 1);
  grid.blocks = std::min(at_once, grid.blocks);
  return grid;
}

template <class... Parameters, class... Arguments>
void launch_rows(const char* name, void (*kernel)(Parameters...), const Grid& grid,
                 const Tensor& tensor, Arguments... arguments) {
  if (grid.blocks == 0) return;
  kernel<<<static_cast<unsigned>(grid.blocks), grid.block, grid.shared_bytes,
           current_stream(tensor)>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

// sums (width) = partial (num_blocks, width) summed in order; zeros where there is no block.
template <class W>
void launch_sum_partials(const char* name, const Tensor& sums, const Tensor& partial) {
  const int64_t width = sums.numel();
  visit_dtype("weight", sums.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Grid grid{(width + kColumns - 1) / kColumns, dim3(kColumns, kParts)};
    launch_rows(name, sum_partials_kernel<T, W>, grid, sums, output<T>(sums), input<W>(partial),
                static_cast<int>(partial.size(0)), static_cast<int>(width));
  });
}

}  // namespace dropbp
