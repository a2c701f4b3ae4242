// 256-bit vectors, with what is common to the instruction sets that use them.
#pragma once

#include <immintrin.h>

#include "quantize_inl.h"

namespace fewbit {
namespace {

struct Avx {
  static constexpr int kBytes = 32;
  static constexpr int kPackRows = 8;
  static constexpr int kPrefetch = 2048; // bytes ahead in a stream of weights
  using I = __m256i;
  using F = __m256;

  static void pin(I& v) { __asm__("" : "+x"(v)); }
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I all(int32_t v) { return _mm256_set1_epi32(v); }
  static F all(float v) { return _mm256_set1_ps(v); }
  static I four(const int8_t* p) { // the same four codes in every lane
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
  }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F times(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I low(I bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static I high(I bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)); }

  static int32_t sum(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // One value a block of 32 columns, in all lanes of the block, for a vector of `Columns` columns.
  template <int64_t Columns> static F spread(const float* p) {
    static_assert(Columns == 32 || Columns == 64);
    if constexpr (Columns == 32) return _mm256_set1_ps(*p);
    return _mm256_setr_m128(_mm_set1_ps(p[0]), _mm_set1_ps(p[1]));
  }
  // One value a block, in the block's first lane.
  template <int64_t Columns> static I first_lanes(const int32_t* p) {
    if constexpr (Columns == 32) return _mm256_zextsi128_si256(_mm_cvtsi32_si128(p[0]));
    return _mm256_setr_m128i(_mm_cvtsi32_si128(p[0]), _mm_cvtsi32_si128(p[1]));
  }

  // kBlock columns of 8 rows, as [kBlock * Element / 4][8 rows][4 bytes], `step_bytes` apart.
  template <int B, int Element> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
    I r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      if constexpr (B == 8) {
        r[i] = load(rows + i * row_bytes);
      } else { // low halves, then high halves
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * row_bytes));
        const I both = _mm256_setr_m128i(bytes, _mm_srli_epi16(bytes, 4));
        r[i] = _mm256_and_si256(both, _mm256_set1_epi8(15));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I low = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
      const I high = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
      put<Element>(low, out, i, step_bytes);
      put<Element>(high, out, i + 4, step_bytes);
    }
  }
  template <int Element> static void put(I codes, uint8_t* out, int64_t step, int64_t step_bytes) {
    if constexpr (Element == 1) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + step * step_bytes), codes);
    } else { // the first two codes of each lane as int16, then the last two
      const I first = _mm256_srai_epi16(_mm256_unpacklo_epi8(codes, codes), 8);
      const I second = _mm256_srai_epi16(_mm256_unpackhi_epi8(codes, codes), 8);
      const __m256 a = _mm256_castsi256_ps(first), b = _mm256_castsi256_ps(second);
      _mm256_storeu_ps(reinterpret_cast<float*>(out + 2 * step * step_bytes), _mm256_shuffle_ps(a, b, 0x88));
      _mm256_storeu_ps(reinterpret_cast<float*>(out + (2 * step + 1) * step_bytes), _mm256_shuffle_ps(a, b, 0xdd));
    }
  }

  static void nibbles16(const uint8_t* bytes, uint8_t* out) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m128i both = _mm_unpacklo_epi8(v, _mm_srli_epi16(v, 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_and_si128(both, _mm_set1_epi8(15)));
  }
};

} // namespace
} // namespace fewbit
