// CPU kernels of dropbp_kernels::column_update_ and column_restore_.
// Signatures: dropbp_kernels/ops/schema.py; meaning: dropbp_kernels/reference.py.
#define DROPBP_KERNELS "column_update_kernels.h"
#include "channels.h"
#include "dispatch.h"
#include "each_isa.h"

namespace dropbp {
namespace {

// The columns that are changed of a weight (num_rows, width) of any strides, and on how many
// threads.
struct Columns {
  Columns(const Tensor& weight, Tensor index_tensor) : index(dense(index_tensor)) {
    check_dtype("index", index, ScalarType::Long);
    if (weight.dim() != 2) fail("weight: expected 2 dimensions, got ", weight.dim());
    check_own_elements("weight", weight);
    num_rows = weight.size(0), count = index.numel();
    row_stride = weight.stride(0), column_stride = weight.stride(1);
    entries = checked_own_indices("index", index, weight.size(1));
  }

  template <class Visitor>
  void for_each_row(const Visitor& visitor) const {
    torch::stable::parallel_for(0, num_rows, channel_grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) visitor(row);
    });
  }

  Tensor index;
  const int64_t* entries;
  int64_t num_rows, count, row_stride, column_stride;
};

Tensor column_update_(Tensor weight, Tensor delta, Tensor index, double scale) {
  const Columns columns(weight, index);
  check_numel("delta", delta, columns.num_rows * columns.count);
  delta = dense(delta);
  const int64_t sizes[] = {columns.num_rows, columns.count};
  Tensor original = new_tensor(sizes, 2, shim_dtype(weight), weight);
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    visit_dtype("delta", delta.scalar_type(), [&](auto d) {
      using T = decltype(t);
      using D = decltype(d);
      using W = std::conditional_t<std::is_same_v<D, double>, double, Wide<T>>;
      T* to = output<T>(weight);
      T* kept = output<T>(original);
      const D* change = input<D>(delta);
      columns.for_each_row([&](int64_t row) {
        constexpr int64_t kRun = 256;
        T sums[kRun];
        T* values = to + row * columns.row_stride;
        for (int64_t begin = 0; begin < columns.count; begin += kRun) {
          const int64_t count = std::min(kRun, columns.count - begin);
          const int64_t* places = columns.entries + begin;
          T* olds = kept + row * columns.count + begin;
          for (int64_t k = 0; k < count; ++k) olds[k] = values[places[k] * columns.column_stride];
          with_kernels([&](auto kernels) {
            kernels.template update_run<W>(sums, olds, change + row * columns.count + begin,
                                           static_cast<W>(scale), count);
          });
          for (int64_t k = 0; k < count; ++k) values[places[k] * columns.column_stride] = sums[k];
        }
      });
    });
  });
  return original;
}

void column_restore_(Tensor weight, Tensor original, Tensor index) {
  const Columns columns(weight, index);
  check_numel("original", original, columns.num_rows * columns.count);
  check_dtype("original", original, weight.scalar_type());
  original = dense(original);
  visit_dtype("weight", weight.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* to = output<T>(weight);
    const T* kept = input<T>(original);
    columns.for_each_row([&](int64_t row) {
      T* values = to + row * columns.row_stride;
      for (int64_t k = 0; k < columns.count; ++k) {
        values[columns.entries[k] * columns.column_stride] = kept[row * columns.count + k];
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(dropbp_kernels, CPU, library) {
  library.impl("column_update_", TORCH_BOX(&column_update_));
  library.impl("column_restore_", TORCH_BOX(&column_restore_));
}

}  // namespace
}  // namespace dropbp
