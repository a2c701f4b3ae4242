// The table of this instruction set's kernels. Included last.
#pragma once

#include "codes_inl.h"
#include "conv_inl.h"
#include "depthwise_inl.h"
#include "float_inl.h"

namespace fewbit {
namespace {

constexpr Kernels table(const char* name) {
  return {name,
          kColumns,
          kRowsAtMost,
          quantize,
          code_bytes,
          starts,
          gemv,
          panel_bytes,
          pack,
          multiply,
          kFloatRows,
          kFloatColumns,
          linear_float,
          float_scratch,
          finish_row,
          rows,
          convert_to_float,
          lstm,
          gru,
          Codes::kLanes,
          pack_filter,
          conv_tasks,
          conv,
          quantize_codes,
          quantize_planes,
          dequantize_codes,
          add_codes,
          average,
          max_pool,
          lookup};
}

} // namespace
} // namespace fewbit
