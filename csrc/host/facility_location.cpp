#include "facility_location.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace dropbp {
namespace {

struct Candidate {
  int64_t gain;
  int64_t element;
  int64_t turn;  // when the gain was computed

  // Order of std::priority_queue: the largest gain on top and, of equals, the smallest index.
  bool operator<(const Candidate& other) const {
    return gain != other.gain ? gain < other.gain : element > other.element;
  }
};

// Compiled for each x86-64 generation: the baseline has no vector of int64 to compare.
#if defined(__x86_64__) && defined(__GNUC__)
#define DROPBP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DROPBP_CLONES
#endif

// What picking an element would add to the sum, given how well each element is covered already.
DROPBP_CLONES int64_t gain_of(const int64_t* row, const int64_t* covered, int64_t num_elements) {
  int64_t gain = 0;
  for (int64_t i = 0; i < num_elements; ++i) {
    const int64_t more = row[i] - covered[i];
    gain += more > 0 ? more : 0;
  }
  return gain;
}

class Greedy {
 public:
  Greedy(const int64_t* similarity, int64_t num_elements)
      : similarity_(similarity), covered_(num_elements), cluster_(num_elements) {}

  int64_t gain(int64_t element) const {
    return gain_of(row(element), covered_.data(), static_cast<int64_t>(covered_.size()));
  }

  void pick(int64_t element) {
    const int64_t place = static_cast<int64_t>(picks_.size());
    const int64_t* values = row(element);
    for (size_t i = 0; i < covered_.size(); ++i) {
      // The first pick also takes what it is not similar to at all.
      if (place == 0 || values[i] > covered_[i]) cluster_[i] = place;
      covered_[i] = std::max(values[i], covered_[i]);
    }
    picks_.push_back(element);
  }

  Representatives finish() {
    for (size_t place = 0; place < picks_.size(); ++place) {
      cluster_[picks_[place]] = static_cast<int64_t>(place);
    }
    std::vector<int64_t> weights(picks_.size());
    if (!picks_.empty()) {
      for (const int64_t place : cluster_) ++weights[place];
    }
    return {std::move(picks_), std::move(weights)};
  }

 private:
  const int64_t* row(int64_t element) const {
    return similarity_ + element * static_cast<int64_t>(covered_.size());
  }

  const int64_t* similarity_;
  std::vector<int64_t> covered_;  // the similarity of each element to its pick, 0 before the first
  std::vector<int64_t> cluster_;  // the place of that pick
  std::vector<int64_t> picks_;
};

// All gains anew for each pick: the definition, and what lazy is tested against.
void pick_naively(Greedy& greedy, int64_t num_elements, int64_t num_picks) {
  std::vector<bool> is_picked(num_elements);
  for (int64_t turn = 0; turn < num_picks; ++turn) {
    Candidate best{-1, num_elements, turn};
    for (int64_t element = 0; element < num_elements; ++element) {
      if (is_picked[element]) continue;
      const Candidate candidate{greedy.gain(element), element, turn};
      if (best < candidate) best = candidate;
    }
    greedy.pick(best.element);
    is_picked[best.element] = true;
  }
}

// A gain never grows, so the last one that was computed bounds it. What is on top with a gain of
// this turn is what the naive greedy picks: whatever has the same bound and a smaller index was on
// top before it.
void pick_lazily(Greedy& greedy, int64_t num_elements, int64_t num_picks) {
  std::vector<Candidate> first(num_elements);
  for (int64_t element = 0; element < num_elements; ++element) {
    first[element] = {greedy.gain(element), element, 0};
  }
  std::priority_queue<Candidate> candidates(std::less<Candidate>(), std::move(first));
  for (int64_t turn = 0; turn < num_picks; ++turn) {
    Candidate top = candidates.top();
    candidates.pop();
    while (top.turn != turn) {
      candidates.push({greedy.gain(top.element), top.element, turn});
      top = candidates.top();
      candidates.pop();
    }
    greedy.pick(top.element);
  }
}

}  // namespace

Representatives facility_location(const int64_t* similarity, int64_t num_elements,
                                  int64_t num_picks, bool lazy) {
  if (num_picks < 0 || num_picks > num_elements) {
    throw std::invalid_argument("num_picks: expected 0 to " + std::to_string(num_elements) +
                                ", got " + std::to_string(num_picks));
  }
  Greedy greedy(similarity, num_elements);
  (lazy ? pick_lazily : pick_naively)(greedy, num_elements, num_picks);
  return greedy.finish();
}

}  // namespace dropbp
