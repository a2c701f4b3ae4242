// 256-bit vectors, with what is common to the instruction sets that use them.
#pragma once

#include <immintrin.h>

#include "quantize_inl.h"

namespace fewbit {
namespace {

// Steps over kBlock numbers: see Plain.
struct AvxBlocks {
  // kBlock stored codes of `B` bits less their zero point, as float.
  template <int B> static void codes_to_float(const uint8_t* bytes, int32_t zero_point, __m256 (&out)[4]) {
    __m128i half[2]; // 16 signed codes each
    if constexpr (B == 8) {
      half[0] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
      half[1] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16));
    } else {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), mask = _mm_set1_epi8(15);
      const __m128i z = _mm_set1_epi8(static_cast<char>(zero_point + 8));
      const __m128i low = _mm_sub_epi8(_mm_and_si128(v, mask), z);
      const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(v, 4), mask), z);
      half[0] = _mm_unpacklo_epi8(low, high);
      half[1] = _mm_unpackhi_epi8(low, high);
    }
    const __m256i z = _mm256_set1_epi32(zero_point);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256i code = _mm256_cvtepi8_epi32(i % 2 ? _mm_unpackhi_epi64(half[i / 2], half[i / 2]) : half[i / 2]);
      if (B == 8) code = _mm256_sub_epi32(code, z);
      out[i] = _mm256_cvtepi32_ps(code);
    }
  }
  template <int B> static void block_to_float(const uint8_t* bytes, int32_t zero_point, float scale, float* out) {
    __m256 codes[4];
    codes_to_float<B>(bytes, zero_point, codes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + 8 * i, _mm256_mul_ps(codes[i], _mm256_set1_ps(scale)));
  }
  struct FloatSum {
    __m256 even, odd; // two, so that one product need not wait for the other
  };
  static FloatSum no_products() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static float sum_products(FloatSum v) { return sum_lanes(_mm256_add_ps(v.even, v.odd)); }
  static FloatSum scaled(FloatSum products, float scale, FloatSum sum) {
    const __m256 s = _mm256_set1_ps(scale);
    return {_mm256_fmadd_ps(products.even, s, sum.even), _mm256_fmadd_ps(products.odd, s, sum.odd)};
  }
  template <int R>
  static void add_products(FloatSum (&sums)[R], const uint8_t* bytes, int32_t zero_point, const float* x, int64_t stride) {
    __m256 codes[4];
    codes_to_float<8>(bytes, zero_point, codes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* row = x + r * stride;
      sums[r].even = _mm256_fmadd_ps(codes[0], _mm256_loadu_ps(row), sums[r].even);
      sums[r].odd = _mm256_fmadd_ps(codes[1], _mm256_loadu_ps(row + 8), sums[r].odd);
      sums[r].even = _mm256_fmadd_ps(codes[2], _mm256_loadu_ps(row + 16), sums[r].even);
      sums[r].odd = _mm256_fmadd_ps(codes[3], _mm256_loadu_ps(row + 24), sums[r].odd);
    }
  }
  static float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  using Most = __m256i;
  static Most most() { return _mm256_setzero_si256(); }
  static Most more(Most most, const float* x) {
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + 8 * i)), positive));
    return most;
  }
  static float largest(Most most) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return float_of(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
  }
  // x * (1 / scale) is off from x / scale by less than 2e-5 here: only next to a tie does it take the division to round
  // as the definition does.
  static void encode(const float* x, float scale, float inverse_scale, int8_t* codes) {
    const __m256 inverse = _mm256_set1_ps(inverse_scale), positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 n[4], off = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256 quotient = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse);
      n[i] = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      off = _mm256_max_ps(off, _mm256_and_ps(_mm256_sub_ps(quotient, n[i]), positive));
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(off, _mm256_set1_ps(0.4999f), _CMP_GT_OQ))) {
      for (int i = 0; i < 4; ++i) {
        const __m256 quotient = _mm256_div_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(scale));
        n[i] = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
    }
    const __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32(n[0]), _mm256_cvtps_epi32(n[1]));
    const __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32(n[2]), _mm256_cvtps_epi32(n[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i q = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), q);
  }
  using Sum = __m256i;
  static Sum no_codes() { return _mm256_setzero_si256(); }
  static Sum add_codes(Sum sum, const int8_t* codes) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static int32_t sum_codes(Sum sum) { return sum_lanes(sum); }
  static int32_t sum_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static int32_t split_signs(int8_t* codes, int8_t* masks, int64_t count) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += kBlock) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k));
      const __m256i mask = _mm256_cmpgt_epi8(_mm256_setzero_si256(), q), magnitude = _mm256_abs_epi8(q);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), magnitude);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(masks + k), mask);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(magnitude, mask), _mm256_set1_epi8(1));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum_lanes(sums);
  }
  static void split(const int8_t* codes, int8_t* even, int8_t* odd) {
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, //
                                           0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(q, order), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(both, 1));
  }
};

struct Avx : AvxBlocks {
  static constexpr int kBytes = 32;
  static constexpr int kPackRows = 8;
  using I = __m256i;
  using F = __m256;

  static void pin(I& v) { __asm__("" : "+x"(v)); }
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I load_part(const uint8_t* p, int64_t bytes) {
    if (bytes % 4) return load(Filled<kBytes>(p, bytes).bytes);
    const I wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes / 4)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), wanted);
  }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store(uint8_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
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
  static I power_of_two(I n) { return _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23); } // bits of 2^n
  static I low(I bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static I high(I bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)); }

  static int32_t sum(I v) { return sum_lanes(v); }
  static float sum(F v) { return sum_lanes(v); }

  static F load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load_bf16(const uint16_t* p, int64_t count) { // fewer than a vector; zeros after them
    const __m128i wanted = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(count / 2)), _mm_setr_epi32(0, 1, 2, 3));
    __m128i bits = _mm_maskload_epi32(reinterpret_cast<const int*>(p), wanted);
    if (count % 2) {
      const __m128i last = _mm_cmpeq_epi16(_mm_set1_epi16(static_cast<int16_t>(count - 1)), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
      bits = _mm_or_si128(bits, _mm_and_si128(last, _mm_set1_epi16(static_cast<int16_t>(p[count - 1]))));
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // The `Place`-th 4-bit code of each lane, -8 to 7.
  template <int64_t Place> static F nibble(I v) {
    const I top = _mm256_slli_epi32(_mm256_xor_si256(v, _mm256_set1_epi32(static_cast<int>(0x88888888))), 28 - 4 * Place);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28));
  }
  static I first_lane(int32_t v) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(v)); }
  // Of a vector of scales, one a block: those of `Blocks` blocks from `first` on, each in the lanes of its block.
  template <int64_t Blocks> static F spread(F scale, int64_t first) {
    static_assert(Blocks == 2);
    const I place = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(static_cast<int>(first)));
    return _mm256_permutevar8x32_ps(scale, place);
  }

  // kBlock columns of 8 rows, as [kBlock / 4][8 rows][4], `step_bytes` apart.
  template <int B> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
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
      store(out + i * step_bytes, low);
      store(out + (i + 4) * step_bytes, high);
    }
  }
};

} // namespace
} // namespace fewbit
