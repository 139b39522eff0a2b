#include "allocation.h"

#include <cstddef>
#include <queue>
#include <stdexcept>
#include <string>

namespace dropbp {
namespace {

constexpr double kStep = 0.1;
constexpr double kCap = 0.9;

struct Candidate {
  float cost;  // sensitivity * (rate after the raise), the quantity to keep small
  size_t branch;

  // Order of std::priority_queue: the cheapest on top and, of equals, the last branch.
  bool operator<(const Candidate& other) const {
    return cost != other.cost ? cost > other.cost : branch < other.branch;
  }
};

}  // namespace

// Which numbers are float and which double is part of the published result: rates and costs are
// stored as float after each step, the remaining FLOPs stay in double.
std::vector<float> allocate_published(const std::vector<float>& sensitivities,
                                      const std::vector<float>& flops, double target_flops,
                                      double min_rate) {
  if (sensitivities.size() != flops.size()) {
    throw std::invalid_argument("flops: expected one for each of the " +
                                std::to_string(sensitivities.size()) + " sensitivities, got " +
                                std::to_string(flops.size()));
  }
  std::vector<float> rates(flops.size(), static_cast<float>(min_rate));
  std::priority_queue<Candidate> candidates;
  double remaining = 0;
  for (size_t branch = 0; branch < flops.size(); ++branch) {
    candidates.push({static_cast<float>(sensitivities[branch] * (kStep + min_rate)), branch});
    remaining += flops[branch];
  }
  remaining *= 1 - min_rate;

  while (remaining > target_flops) {
    if (candidates.empty()) {
      throw std::runtime_error(
          "target_flops: expected a value that rates up to 0.9 can reach, got " +
          std::to_string(target_flops) + " with " + std::to_string(remaining) + " left");
    }
    const Candidate cheapest = candidates.top();
    candidates.pop();
    float& rate = rates[cheapest.branch];
    rate = static_cast<float>(rate + kStep);
    remaining -= flops[cheapest.branch] * kStep;
    if (rate < kCap) {
      const double cost = cheapest.cost + kStep * sensitivities[cheapest.branch];
      candidates.push({static_cast<float>(cost), cheapest.branch});
    }
  }
  return rates;
}

}  // namespace dropbp
