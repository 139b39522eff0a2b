// What the CPU and the CUDA kernels know of element types. No torch header.
#pragma once

#include <type_traits>

namespace dropbp {

// Sums and statistics of T are taken in this type.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether every value of From is a value of To.
template <class To, class From>
inline constexpr bool holds = std::is_same_v<To, From> || std::is_same_v<To, double> ||
                              (std::is_same_v<To, float> && !std::is_same_v<From, double>);

}  // namespace dropbp
