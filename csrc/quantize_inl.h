// Activations to int8 codes, to the bit as fewbit.qtensor rounds them. Plain loops that compilers turn into vectors.
#pragma once

#include <cstring>

#include "kernels.h"

namespace fewbit {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void convert_to_float(const void* x, Type type, int64_t count, float* out) {
  if (type == Type::f32) {
    std::memcpy(out, x, count * sizeof(float));
  } else if (type == Type::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
  } else {
    const _Float16* in = static_cast<const _Float16*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  }
}

// The largest |x|; a NaN if there is one, since its bits are above those of infinity.
inline float largest(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return float_of(most);
}

inline bool finite(float x) { return x - x == 0; }

// Scale of a block whose largest magnitude is `most`: fewbit.qtensor.qparams for symmetric int8.
inline float scale_of(float most) {
  if (most == 0) return 1;
  double exact = static_cast<double>(most) / 127;
  return static_cast<float>(exact < 1.17549435082228750797e-38 ? 1.17549435082228750797e-38 : exact);
}

// Codes of up to kBlock activations; the rest of the block becomes zeros.
inline void encode(const float* x, int64_t count, float scale, int8_t* codes) {
  float r[kBlock];
  if (count == kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) r[i] = __builtin_rintf(x[i] / scale);
  } else {
    for (int64_t i = 0; i < kBlock; ++i) r[i] = i < count ? __builtin_rintf(x[i] / scale) : 0.0f;
  }
  int32_t q[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) q[i] = static_cast<int32_t>(r[i] > 127 ? 127.0f : r[i] < -127 ? -127.0f : r[i]);
  for (int64_t i = 0; i < kBlock; ++i) codes[i] = static_cast<int8_t>(q[i]);
}

inline int32_t sum_of(const int8_t* codes) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) sum += codes[i];
  return sum;
}

// 4-bit codes lie two in a byte. So that bytes meet their activations without being interleaved, the activations are
// put in the order of the low halves, then the high halves, of `half` bytes.
inline void split_even_odd(int8_t* codes, int64_t count, int64_t half) {
  int8_t even[64], odd[64];
  for (int64_t begin = 0; begin < count; begin += 2 * half) {
    int8_t* block = codes + begin;
    for (int64_t i = 0; i < half; ++i) {
      even[i] = block[2 * i];
      odd[i] = block[2 * i + 1];
    }
    std::memcpy(block, even, half);
    std::memcpy(block + half, odd, half);
  }
}

// One row: codes in natural order, a scale and a sum for each group of `group` columns of the weight. The scales are
// those of `input_group` columns (0: of the whole row), repeated where the weight's groups are finer.
inline void quantize_row(const float* x, int64_t columns, int64_t input_group, int64_t group, int64_t groups, int8_t* codes,
                         int64_t stride, float* scale, int32_t* sums) {
  const float row_scale = input_group == 0 ? scale_of(largest(x, columns)) : 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * group, end = begin + group < columns ? begin + group : columns;
    float s = input_group == 0 ? row_scale : scale_of(largest(x + begin, end - begin));
    scale[g] = s;
    sums[g] = 0;
    for (int64_t k = begin; k < end; k += kBlock) {
      if (finite(s)) {
        encode(x + k, end - k < kBlock ? end - k : kBlock, s, codes + k);
        sums[g] += sum_of(codes + k);
      } else { // the scale is infinite or NaN, and with it this row of the output
        std::memset(codes + k, 0, kBlock);
        scale[g] = __builtin_nanf("");
      }
    }
  }
  const int64_t written = round_up(columns, kBlock);
  std::memset(codes + written, 0, stride - written);
}

} // namespace
} // namespace fewbit
