// The table of this instruction set's kernels. Included last.
#pragma once

#include "float_inl.h"

namespace fewbit {
namespace {

constexpr Kernels table(const char* name) {
  return {name,       kColumns,      kRowsAtMost,  quantize,      code_bytes, starts, gemv,             panel_bytes, pack, multiply,
          kFloatRows, kFloatColumns, linear_float, float_scratch, finish_row, rows,   convert_to_float, lstm,        gru};
}

} // namespace
} // namespace fewbit
