// What every CPU kernel needs: element types by dtype, and when a second thread pays.
#pragma once

#include "../checks.h"
#include "elements.h"
// After elements.h:
#include "../dtypes.h"

namespace dropbp {

// As many elements for one thread as make waking it worthwhile; PyTorch's own kernels use the same.
inline constexpr int64_t kGrain = 32768;

}  // namespace dropbp
