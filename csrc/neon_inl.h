// 128-bit vectors of 64-bit ARM with sdot, which adds four products of signed bytes to an int32 exactly.
#pragma once

#include <arm_neon.h>

#include "quantize_inl.h"

namespace fewbit {
namespace {

struct Neon : Plain {
  static constexpr int kBytes = 16;
  static constexpr int kPackRows = 4;
  using I = int32x4_t;
  using F = float32x4_t;

  static void pin(I& v) { __asm__ volatile("" : "+w"(v)); } // volatile: in this order
  static I zero() { return vdupq_n_s32(0); }
  static I load(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I load(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
  static I load(const int32_t* p) { return vld1q_s32(p); }
  static I load_part(const uint8_t* p, int64_t bytes) { return load(Filled<kBytes>(p, bytes).bytes); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static void store(int32_t* p, I v) { vst1q_s32(p, v); }
  static I all(int32_t v) { return vdupq_n_s32(v); }
  static F all(float v) { return vdupq_n_f32(v); }
  static I add(I a, I b) { return vaddq_s32(a, b); }
  static I subtract(I a, I b) { return vsubq_s32(a, b); }
  static I multiply(I a, I b) { return vmulq_s32(a, b); }
  static F times(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static I power_of_two(I n) { return vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23); } // bits of 2^n
  static I low(I bytes) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(15))); }
  static I high(I bytes) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(bytes), 4)); }
  static int32_t sum(I v) { return vaddvq_s32(v); }
  static float sum(F v) { return vaddvq_f32(v); }

  static F load_bf16(const uint16_t* p, int64_t count) { // fewer than a vector; zeros after them
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(Filled<8>(p, count * 2).bytes)), 16));
  }
  template <int64_t Place> static F nibble(I v) {
    const I top = vshlq_n_s32(veorq_s32(v, vdupq_n_s32(static_cast<int>(0x88888888))), 28 - 4 * Place);
    return vcvtq_f32_s32(vshrq_n_s32(top, 28));
  }
  static I first_lane(int32_t v) { return vsetq_lane_s32(v, zero(), 0); }
  template <int64_t Blocks> static F spread(F scale, int64_t) { return vdupq_laneq_f32(scale, 0); } // one block a vector
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

  // kBlock columns of a row, one code to a byte: for 4 bits low halves, then high halves.
  template <int B> static void block(const uint8_t* row, I (&codes)[2]) {
    codes[0] = load(row);
    if constexpr (B == 8) {
      codes[1] = load(row + 16);
    } else {
      codes[1] = high(codes[0]);
      codes[0] = low(codes[0]);
    }
  }
};

// Signed codes as they are; of 4-bit ones 0 to 15, whose zero point is 8.
template <int32_t Offset> struct Sdot {
  static constexpr bool kWide = true;
  static constexpr int kPlanes = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = int32x4_t;
  using Code = int8x16_t;
  using X = int8x16_t;
  static Code ready(int32x4_t w) { return vreinterpretq_s8_s32(w); }
  static X row(const int8_t* p, int64_t) { return vld1q_s8(p); }
  static Acc step(Acc acc, Code w, X x) { return vdotq_s32(acc, w, x); }
};
using Dot8 = Sdot<0>;
using Dot4 = Sdot<8>;

} // namespace
} // namespace fewbit
