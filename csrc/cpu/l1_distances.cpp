// CPU kernel of dropbp_kernels::l1_distances.
// Signature: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
//
// The distances above the diagonal are computed, in tiles of pairs that share what they load, and
// written to both sides. A distance is summed in the same order whatever the tile and the number of
// threads: the result is symmetric and repeats bit for bit.
#include <algorithm>

#define DROPBP_KERNELS "l1_distances_kernels.h"
#include "dispatch.h"
#include "each_isa.h"

namespace dropbp {
namespace {

constexpr int64_t kTile = 4;

// distances[first .. first + kTile] x [column .. column + kTile], and mirrored; fewer at the end.
template <class W, class T, class Kernels>
void run_tile(Kernels kernels, W* distances, const T* features, int64_t num_rows, int64_t width,
              int64_t row, int64_t column) {
  W tile[kTile * kTile];
  const int64_t rows = std::min(kTile, num_rows - row),
                columns = std::min(kTile, num_rows - column);
  const T* a = features + row * width;
  const T* b = features + column * width;
  if (rows == kTile && columns == kTile) {
    kernels.template distance_tile<kTile, kTile, W>(tile, kTile, a, b, width, width);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        kernels.template distance_tile<1, 1, W>(tile + i * kTile + j, kTile, a + i * width,
                                                b + j * width, width, width);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      distances[(row + i) * num_rows + column + j] = tile[i * kTile + j];
      distances[(column + j) * num_rows + row + i] = tile[i * kTile + j];
    }
  }
}

Tensor l1_distances(Tensor features) {
  if (features.dim() != 2) fail("features: expected 2 dimensions, got ", features.dim());
  const int64_t num_rows = features.size(0), width = features.size(1);
  features = dense(features);
  const auto wide =
      features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t sizes[] = {num_rows, num_rows};
  Tensor result = new_tensor(sizes, 2, shim_dtype(wide), features);
  const int64_t num_blocks = (num_rows + kTile - 1) / kTile;
  visit_dtype("features", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const T* from = input<T>(features);
    W* distances = output<W>(result);
    // Row block k has num_blocks - k tiles: paired with the block as far from the other end, each
    // task has as many as the next.
    const int64_t num_tasks = (num_blocks + 1) / 2;
    const int64_t work = std::max<int64_t>(width * kTile * num_rows, 1);
    torch::stable::parallel_for(
        0, num_tasks, std::max<int64_t>(1, kGrain / work), [=](int64_t begin, int64_t end) {
          with_kernels([=](auto kernels) {
            const auto run_row = [=](int64_t block) {
              for (int64_t other = block; other < num_blocks; ++other) {
                run_tile(kernels, distances, from, num_rows, width, block * kTile, other * kTile);
              }
            };
            for (int64_t task = begin; task < end; ++task) {
              run_row(task);
              if (num_blocks - 1 - task != task) run_row(num_blocks - 1 - task);
            }
          });
        });
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("l1_distances", TORCH_BOX(&l1_distances));
}

}  // namespace
}  // namespace dropbp
