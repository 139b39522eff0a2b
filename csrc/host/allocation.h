// Drop rates from sensitivities and FLOPs. Plain C++17: knows neither torch nor Python.
#pragma once

#include <vector>

namespace dropbp {

// The greedy of the published package (arXiv 2402.17812, section 3.3), bit for bit.
//
// All rates start at min_rate. The branch with the smallest sensitivity * (rate + 0.1) is raised by
// 0.1, again and again, until at most target_flops of the backward FLOPs are left on average. A
// branch of rate 0.9 or more is not raised further. Throws std::runtime_error when no branch is
// left to raise, and std::invalid_argument when the two lists differ in length.
std::vector<float> allocate_published(const std::vector<float>& sensitivities,
                                      const std::vector<float>& flops, double target_flops,
                                      double min_rate);

}  // namespace dropbp
