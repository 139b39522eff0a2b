// A greedy choice of elements that stand for all. Plain C++17: knows neither torch nor Python.
#pragma once

#include <cstdint>
#include <vector>

namespace dropbp {

struct Representatives {
  std::vector<int64_t> picks;  // in the order of the greedy
  std::vector<int64_t>
      weights;  // the number of elements that each pick stands for, itself included
};

// The greedy maximiser of the facility location sum_i max_{j in picks} similarity[j, i].
//
// similarity (num_elements, num_elements) by rows, numbers >= 0 whose sums over a row fit int64.
// Each turn picks the element that raises the sum most; of equals, the one with the smallest index.
// An element belongs to the pick that is most similar to it, of equals to the earliest one; a pick
// belongs to itself. lazy computes a gain again only where its last value, which bounds it, could
// still be the largest; the picks are the same. Sums of integers are exact, so that equal gains
// compare equal in whatever order they were added. Throws std::invalid_argument unless
// 0 <= num_picks <= num_elements.
Representatives facility_location(const int64_t* similarity, int64_t num_elements,
                                  int64_t num_picks, bool lazy);

}  // namespace dropbp
