// Checks that protect memory. The public Python functions have already said everything friendlier.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <stdexcept>
#include <string>

// One message form everywhere: "op: rule; got value".
#define FA_CHECK(condition, op, rule, value) STD_TORCH_CHECK(condition, op, ": ", rule, "; got ", value)

// The same for a value that only the kernel sees, which is the caller's mistake: ValueError in Python.
#define FA_CHECK_VALUE(condition, op, rule, value)     \
  do {                                                 \
    if (!(condition)) {                                \
      std::ostringstream text;                         \
      text << op << ": " << rule << "; got " << value; \
      throw std::invalid_argument(text.str());         \
    }                                                  \
  } while (0)

namespace flowattn {

// "(2, 3)", as Python prints a shape.
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

}  // namespace flowattn
