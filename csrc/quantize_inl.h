// Activations to int8 codes, to the bit as fewbit.qtensor rounds them. Plain loops that compilers turn into vectors.
#pragma once

#include <cstring>

#include "kernels.h"

namespace fewbit {
namespace {

#ifdef __aarch64__
using Half = __fp16; // before version 13 GCC has no _Float16 in C++ here
#else
using Half = _Float16;
#endif

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline void convert_to_float(const void* x, Type type, int64_t count, float* out) {
  if (type == Type::f32) {
    std::memcpy(out, x, count * sizeof(float));
  } else if (type == Type::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
  } else {
    const Half* in = static_cast<const Half*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = in[i];
  }
}

inline bool finite(float x) { return x - x == 0; }

// Scale of a block whose largest magnitude is `most`: fewbit.qtensor.qparams for symmetric int8.
inline float scale_of(float most) {
  if (most == 0) return 1;
  double exact = static_cast<double>(most) / 127;
  return static_cast<float>(exact < 1.17549435082228750797e-38 ? 1.17549435082228750797e-38 : exact);
}

// The steps over kBlock activations that instruction sets may have better ways for.
struct Plain {
  // The largest |x|; a NaN if there is one, since its bits are above those of infinity.
  static float largest(const float* x) {
    int32_t most = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    return float_of(most);
  }
  // clamp(round(x / scale)); the scale is that of a range that has x in it, so there is nothing to clamp.
  static void encode(const float* x, float scale, int8_t* codes) {
    int32_t q[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) q[i] = static_cast<int32_t>(__builtin_rintf(x[i] / scale));
    for (int64_t i = 0; i < kBlock; ++i) codes[i] = static_cast<int8_t>(q[i]);
  }
  static int32_t sum_codes(const int8_t* codes) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) sum += codes[i];
    return sum;
  }
  // Codes to magnitudes, in place, and masks of their signs; returns the sum of the magnitudes of negative ones.
  static int32_t split_signs(int8_t* codes, int8_t* masks) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      masks[i] = codes[i] < 0 ? -1 : 0;
      codes[i] = static_cast<int8_t>(codes[i] < 0 ? -codes[i] : codes[i]);
      sum += masks[i] & codes[i];
    }
    return sum;
  }
  // 4-bit codes lie two in a byte. So that bytes meet their activations without being interleaved, these are put in the
  // order of the low halves, then the high halves.
  static void split(const int8_t* codes, int8_t* even, int8_t* odd) {
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      even[i] = codes[2 * i];
      odd[i] = codes[2 * i + 1];
    }
  }
  // kBlock stored codes of `B` bits to (code - zero_point) * scale.
  template <int B> static void block_to_float(const uint8_t* bytes, int32_t zero_point, float scale, float* out) {
    int8_t codes[kBlock];
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      codes[2 * i] = static_cast<int8_t>(B == 8 ? bytes[2 * i] : (bytes[i] & 15) - 8);
      codes[2 * i + 1] = static_cast<int8_t>(B == 8 ? bytes[2 * i + 1] : (bytes[i] >> 4) - 8);
    }
    for (int64_t i = 0; i < kBlock; ++i) out[i] = static_cast<float>(codes[i] - zero_point) * scale;
  }
};

// One row of activations. Its scales are those of `input_group` columns (0: of the whole row), repeated where the weight's
// groups are finer; its codes, for 4-bit weights, in runs of `half` low halves and `half` high halves (0: natural order).
// `count`: columns filled up with zeros.
template <class S>
inline void quantize_row(const float* x, int64_t columns, int64_t count, int64_t input_group, int64_t group, int64_t groups,
                         int64_t half, int8_t* codes, float* scale, int32_t* sums) {
  const int64_t whole = columns / kBlock * kBlock;
  float rest[kBlock] = {};
  std::memcpy(rest, x + whole, (columns - whole) * sizeof(float));
  const auto block = [&](int64_t k) { return k < whole ? x + k : rest; };
  const auto scale_from = [&](int64_t begin, int64_t end) {
    float most = 0; // compared as bits: a NaN is above all
    for (int64_t k = begin; k < end; k += kBlock) {
      const float here = S::largest(block(k));
      most = most > here ? most : here;
      if (here != here) return here;
    }
    return scale_of(most);
  };
  const float row_scale = input_group == 0 ? scale_from(0, columns) : 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * group, end = begin + group < columns ? begin + group : columns;
    const float s = input_group == 0 ? row_scale : scale_from(begin, end);
    const bool usable = finite(s); // else it is infinite or NaN, and with it this row of the output
    scale[g] = usable ? s : __builtin_nanf("");
    sums[g] = 0;
    for (int64_t k = begin; k < end; k += kBlock) {
      int8_t q[kBlock] = {};
      if (usable) S::encode(block(k), s, q);
      sums[g] += S::sum_codes(q);
      if (half == 0) {
        std::memcpy(codes + k, q, kBlock);
      } else {
        int8_t* even = codes + k / (2 * half) * 2 * half + k % (2 * half) / 2;
        S::split(q, even, even + half);
      }
    }
  }
  for (int64_t k = round_up(columns, kBlock); k < count; k += kBlock) {
    if (half == 0) {
      std::memset(codes + k, 0, kBlock);
    } else {
      int8_t* even = codes + k / (2 * half) * 2 * half + k % (2 * half) / 2;
      std::memset(even, 0, kBlock / 2);
      std::memset(even + half, 0, kBlock / 2);
    }
  }
}

} // namespace
} // namespace fewbit
