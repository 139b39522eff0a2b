// Python module dropbp_kernels._host: algorithms on plain numbers. The only file that needs Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "allocation.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host algorithms of dropbp_kernels in C++; each has a twin in plain Python.";
  module.def("allocate_published", &dropbp::allocate_published, pybind11::arg("sensitivities"),
             pybind11::arg("flops"), pybind11::arg("target_flops"), pybind11::arg("min_rate"),
             "Drop rates by the published greedy. RuntimeError when target_flops is out of reach.");
}
