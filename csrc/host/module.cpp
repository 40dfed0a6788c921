// flowattn._host: work on numpy arrays before tensors exist. No torch here.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free helpers of flowattn";
  m.def(
      "cpu_isa", [] { return std::string(flowattn::isa_name()); },
      "Instruction set of the kernels chosen on this CPU.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built the native modules.");
}
