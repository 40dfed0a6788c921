// flowattn._host: work on numpy arrays before tensors exist. No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "packing.h"

namespace py = pybind11;

using Int64Array = py::array_t<int64_t, py::array::c_style>;

static py::tuple pack_sequences(const Int64Array& lengths, int64_t capacity) {
  Int64Array order(lengths.size());
  std::vector<int64_t> offsets;
  {
    const int64_t *from = lengths.data(), n = lengths.size();
    int64_t* to = order.mutable_data();
    py::gil_scoped_release release;
    offsets = flowattn::host::pack_sequences(from, n, capacity, to);
  }
  return py::make_tuple(order, Int64Array(static_cast<py::ssize_t>(offsets.size()), offsets.data()));
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free helpers of flowattn";
  m.def(
      "cpu_isa", [] { return std::string(flowattn::isa_name()); },
      "Instruction set of the kernels chosen on this CPU.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built the native modules.");
  m.def("pack_sequences", &pack_sequences, py::arg("lengths").noconvert(), py::arg("capacity"),
        "(order, offsets) of a best-fit decreasing packing of int64 lengths; see flowattn.pack_sequences.");
}
