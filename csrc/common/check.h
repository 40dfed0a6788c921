// Checks that protect memory. The public Python functions have already said everything friendlier.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// One message form everywhere: "op: rule; got value".
#define FA_CHECK(condition, op, rule, value) STD_TORCH_CHECK(condition, op, ": ", rule, "; got ", value)
