// Activations to int8 codes, to the bit as fewbit.qtensor rounds them. Plain loops, for the steps of which
// instruction sets may have something better.
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

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// A float16 by its bits, since not every compiler has the type. Exact, and without float32's subnormal numbers, which may
// be flushed to zero.
inline float float_of_f16(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, magnitude = half & 0x7fff;
  const uint32_t bias = (127 - 15) << 23; // of exponents; that of infinity and NaN is higher by it once more
  const uint32_t normal = (magnitude << 13) + bias + (magnitude >= 0x7c00 ? bias : 0);
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400 ? small : normal));
}

// `count` bytes, filled up with zeros.
template <int Bytes> struct Filled {
  alignas(Bytes) uint8_t bytes[Bytes] = {};
  Filled(const void* p, int64_t count) { std::memcpy(bytes, p, count); }
};

inline void convert_to_float(const void* x, Type type, int64_t count, float* out) {
  if (type == Type::f32) {
    std::memcpy(out, x, count * sizeof(float));
  } else if (type == Type::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<uint32_t>(in[i]) << 16);
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = float_of_f16(in[i]);
  }
}

inline bool finite(float x) { return x - x == 0; }

// Scale of a block whose largest magnitude is `most`: fewbit.qtensor.qparams for symmetric int8.
inline float scale_of(float most) {
  constexpr double kSmallest = 1.17549435082228750797e-38;
  const double exact = static_cast<double>(most) / 127;
  const float scale = static_cast<float>(exact < kSmallest ? kSmallest : exact);
  return most == 0 ? 1.0f : scale;
}

// The steps over kBlock activations that instruction sets may have better ways for.
struct Plain {
  // The largest |x| so far; a NaN if there was one, since its bits are above those of infinity.
  using Most = int32_t;
  static Most most() { return 0; }
  static Most more(Most most, const float* x) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const int32_t bits = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff);
      most = bits > most ? bits : most;
    }
    return most;
  }
  static float largest(Most most) { return float_of(most); }
  // clamp(round(x / scale)); the scale is that of a range that has x in it, so there is nothing to clamp.
  static void encode(const float* x, float scale, float, int8_t* codes) {
    int32_t q[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) q[i] = static_cast<int32_t>(__builtin_rintf(x[i] / scale));
    for (int64_t i = 0; i < kBlock; ++i) codes[i] = static_cast<int8_t>(q[i]);
  }
  // Sums of codes.
  using Sum = int32_t;
  static Sum no_codes() { return 0; }
  static Sum add_codes(Sum sum, const int8_t* codes) {
    for (int64_t i = 0; i < kBlock; ++i) sum += codes[i];
    return sum;
  }
  static int32_t sum_codes(Sum sum) { return sum; }
  // Codes of a group to magnitudes, in place, and masks of their signs; returns the sum of the magnitudes of negative ones.
  static int32_t split_signs(int8_t* codes, int8_t* masks, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
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
  // Sums of products of float activations with codes less their zero point, and the scaled sums of groups.
  struct FloatSum {
    float lanes[8];
  };
  static FloatSum no_products() { return {}; }
  static float sum_products(FloatSum v) {
    const float* s = v.lanes;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
  static FloatSum scaled(FloatSum products, float scale, FloatSum sum) {
    for (int i = 0; i < 8; ++i) sum.lanes[i] += products.lanes[i] * scale;
    return sum;
  }
  template <int R>
  static void add_products(FloatSum (&sums)[R], const uint8_t* bytes, int32_t zero_point, const float* x, int64_t stride) {
    float codes[kBlock];
    block_to_float<8>(bytes, zero_point, 1.0f, codes);
    for (int r = 0; r < R; ++r)
      for (int64_t i = 0; i < kBlock; ++i) sums[r].lanes[i % 8] += codes[i] * x[r * stride + i];
  }
};

// One row of activations. Its scales are those of `input_group` columns (0: of the whole row), repeated where the weight's
// groups are finer; its codes, for 4-bit weights, in runs of `half` low halves and `half` high halves (0: natural order).
// `count`: columns filled up with zeros. `sums`: null where nobody needs them.
template <class S>
inline void quantize_row(const float* x, int64_t columns, int64_t count, int64_t input_group, int64_t group, int64_t groups,
                         int64_t half, int8_t* codes, float* scale, int32_t* sums) {
  const int64_t whole = columns / kBlock * kBlock;
  float rest[kBlock] = {};
  std::memcpy(rest, x + whole, (columns - whole) * sizeof(float));
  const auto block = [&](int64_t k) { return k < whole ? x + k : rest; };
  const auto largest = [&](int64_t begin, int64_t end) {
    typename S::Most most = S::most();
    for (int64_t k = begin; k < end; k += kBlock) most = S::more(most, block(k));
    return S::largest(most);
  };
  const auto end_of = [&](int64_t g) { return (g + 1) * group < columns ? (g + 1) * group : columns; };
  if (input_group == 0) {
    const float all = scale_of(largest(0, columns));
    for (int64_t g = 0; g < groups; ++g) scale[g] = all;
  } else {
    for (int64_t g = 0; g < groups; ++g) scale[g] = largest(g * group, end_of(g));
    for (int64_t g = 0; g < groups; ++g) scale[g] = scale_of(scale[g]);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const bool usable = finite(scale[g]); // else it is infinite or NaN, and with it this row of the output
    const float s = scale[g], inverse = 1 / s;
    typename S::Sum sum = S::no_codes();
    if (!usable) scale[g] = __builtin_nanf("");
    for (int64_t k = g * group; k < end_of(g); k += kBlock) {
      int8_t split[kBlock];
      int8_t* q = half == 0 ? codes + k : split;
      if (usable) {
        S::encode(block(k), s, inverse, q);
      } else {
        std::memset(q, 0, kBlock);
      }
      if (sums) sum = S::add_codes(sum, q);
      if (half != 0) {
        int8_t* even = codes + k / (2 * half) * 2 * half + k % (2 * half) / 2;
        S::split(q, even, even + half);
      }
    }
    if (sums) sums[g] = S::sum_codes(sum);
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
