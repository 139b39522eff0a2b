// Python module dropbp_kernels._host: algorithms on plain numbers. The only file that needs Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "allocation.h"
#include "facility_location.h"

namespace {

namespace py = pybind11;

// similarity: an object with a buffer of int64 (ctypes calls it "<l", others "l" or "q"), by rows.
std::pair<std::vector<int64_t>, std::vector<int64_t>> facility_location(
    const py::buffer& similarity, int64_t num_elements, int64_t num_picks, bool lazy) {
  const py::buffer_info info = similarity.request();
  if (info.itemsize != sizeof(int64_t) || info.size != num_elements * num_elements) {
    throw py::value_error("similarity: expected num_elements * num_elements values of int64");
  }
  const py::gil_scoped_release others_may_run;
  dropbp::Representatives found = dropbp::facility_location(static_cast<const int64_t*>(info.ptr),
                                                            num_elements, num_picks, lazy);
  return {std::move(found.picks), std::move(found.weights)};
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host algorithms of dropbp_kernels in C++; each has a twin in plain Python.";
  module.def("allocate_published", &dropbp::allocate_published, py::arg("sensitivities"),
             py::arg("flops"), py::arg("target_flops"), py::arg("min_rate"),
             "Drop rates by the published greedy. RuntimeError when target_flops is out of reach.");
  module.def("facility_location", &facility_location, py::arg("similarity"),
             py::arg("num_elements"), py::arg("num_picks"), py::arg("lazy"),
             "Picks and weights of the greedy facility location.");
}
