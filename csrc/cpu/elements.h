// Element types of the CPU kernels. No torch header.
#pragma once

#include <cstdint>

#include "../element_types.h"

namespace dropbp {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace dropbp
