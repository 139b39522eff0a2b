// Rows read through a permutation: the check that it is one, and the rows of a tensor.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace dropbp {

// Each of 0 ... N - 1 once: an entry out of range would reach outside of the tensors, and one that
// is given twice would leave a row of the result unwritten.
inline const int64_t* checked_permutation(const Tensor& permutation) {
  const int64_t num_rows = permutation.numel();
  const int64_t* entries = input<int64_t>(permutation);
  std::vector<bool> is_seen(num_rows);
  for (int64_t k = 0; k < num_rows; ++k) {
    if (entries[k] < 0 || entries[k] >= num_rows || is_seen[entries[k]]) {
      fail<std::out_of_range>("permutation: expected each number from 0 to ", num_rows - 1,
                              " once, got ", entries[k], " at place ", k);
    }
    is_seen[entries[k]] = true;
  }
  return entries;
}

// Elements in each of num_rows rows of the tensor.
inline int64_t checked_row_size(const char* name, const Tensor& tensor, int64_t num_rows) {
  const int64_t row_size = num_rows > 0 ? tensor.numel() / num_rows : 0;
  if (row_size * num_rows != tensor.numel()) {
    fail("permutation: expected its ", num_rows, " entries to divide the ", tensor.numel(),
         " elements of ", name);
  }
  return row_size;
}

// Cuts elements [begin, end) of an array (num_rows, row_size) at the ends of its rows.
template <class Visitor>
void for_each_part(int64_t begin, int64_t end, int64_t row_size, const Visitor& visitor) {
  while (begin < end) {
    const int64_t column = begin % row_size;
    const int64_t count = std::min(row_size - column, end - begin);
    visitor(begin / row_size, column, count);
    begin += count;
  }
}

}  // namespace dropbp
