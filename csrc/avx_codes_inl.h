// Vectors of 16 and 32 bytes for codes; see plain_codes_inl.h for what each step does.
#pragma once

#include <immintrin.h>

#include "quantize_inl.h"

namespace fewbit {
namespace {

struct Codes128 {
  static constexpr int kLanes = 4;
  static constexpr int kBytes = 16;
  using Narrower = void;
  using I = __m128i;
  using F = __m128;

  static void pin(I& v) { __asm__("" : "+x"(v)); }
  static I zero() { return _mm_setzero_si128(); }
  static I load(const void* p) { return _mm_loadu_si128(static_cast<const I*>(p)); }
  static I load_part(const void* p, int64_t count) { return load(Filled<16>(p, count).bytes); }
  static F floats(const float* p) { return _mm_loadu_ps(p); }
  static void store(void* p, I v) { _mm_storeu_si128(static_cast<I*>(p), v); }
  static void store(void* p, F v) { _mm_storeu_ps(static_cast<float*>(p), v); }
  static void store_part(void* p, I v, int64_t count) { std::memcpy(p, &v, count); }
  static I all(int32_t v) { return _mm_set1_epi32(v); }
  static F all(float v) { return _mm_set1_ps(v); }
  static I all8(int v) { return _mm_set1_epi8(static_cast<char>(v)); }
  static I all16(int v) { return _mm_set1_epi16(static_cast<int16_t>(v)); }
  static I subtract(I a, I b) { return _mm_sub_epi32(a, b); }
  static F add(F a, F b) { return _mm_add_ps(a, b); }
  static F times(F a, F b) { return _mm_mul_ps(a, b); }
  static F least(F a, F b) { return _mm_min_ps(a, b); }
  static F most(F a, F b) { return _mm_max_ps(a, b); }
  static F to_float(I v) { return _mm_cvtepi32_ps(v); }
  static I round(F v) { return _mm_cvtps_epi32(v); }
  static void widen(I v, I (&out)[4]) {
    const I a = _mm_unpacklo_epi8(v, zero()), b = _mm_unpackhi_epi8(v, zero());
    out[0] = _mm_unpacklo_epi16(a, zero());
    out[1] = _mm_unpackhi_epi16(a, zero());
    out[2] = _mm_unpacklo_epi16(b, zero());
    out[3] = _mm_unpackhi_epi16(b, zero());
  }
  static void interleave(const I (&rows)[4], I (&out)[4]) {
    const I a = _mm_unpacklo_epi8(rows[0], rows[1]), b = _mm_unpackhi_epi8(rows[0], rows[1]);
    const I c = _mm_unpacklo_epi8(rows[2], rows[3]), d = _mm_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm_unpacklo_epi16(a, c);
    out[1] = _mm_unpackhi_epi16(a, c);
    out[2] = _mm_unpacklo_epi16(b, d);
    out[3] = _mm_unpackhi_epi16(b, d);
  }
  static I narrow(const I (&t)[4], I zero_point) {
    const I a = _mm_adds_epi16(_mm_packs_epi32(t[0], t[1]), zero_point);
    return _mm_packus_epi16(a, _mm_adds_epi16(_mm_packs_epi32(t[2], t[3]), zero_point));
  }
  static I least_bytes(I a, I b) { return _mm_min_epu8(a, b); }
  static I most_bytes(I a, I b) { return _mm_max_epu8(a, b); }
};

struct Codes256 {
  static constexpr int kLanes = 8;
  static constexpr int kBytes = 32;
  using Narrower = Codes128;
  using I = __m256i;
  using F = __m256;

  static void pin(I& v) { __asm__("" : "+x"(v)); }
  static I zero() { return _mm256_setzero_si256(); }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I load_part(const void* p, int64_t count) { return load(Filled<32>(p, count).bytes); }
  static F floats(const float* p) { return _mm256_loadu_ps(p); }
  static F floats_part(const float* p, int64_t count) {
    const I wanted = _mm256_cmpgt_epi32(all(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskload_ps(p, wanted);
  }
  static void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static void store(void* p, F v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
  static void store_part(void* p, I v, int64_t count) { std::memcpy(p, &v, count); }
  static void store_part(void* p, F v, int64_t count) { std::memcpy(p, &v, count); }
  static I four(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  static I bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static I bytes_part(const uint8_t* p, int64_t count) { return bytes(Filled<kLanes>(p, count).bytes); }
  static I all(int32_t v) { return _mm256_set1_epi32(v); }
  static F all(float v) { return _mm256_set1_ps(v); }
  static I all8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I all16(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F times(F a, F b) { return _mm256_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  static F least(F a, F b) { return _mm256_min_ps(a, b); }
  static F most(F a, F b) { return _mm256_max_ps(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static void widen(I v, I (&out)[4]) {
    const I a = _mm256_unpacklo_epi8(v, zero()), b = _mm256_unpackhi_epi8(v, zero());
    out[0] = _mm256_unpacklo_epi16(a, zero());
    out[1] = _mm256_unpackhi_epi16(a, zero());
    out[2] = _mm256_unpacklo_epi16(b, zero());
    out[3] = _mm256_unpackhi_epi16(b, zero());
  }
  static void interleave(const I (&rows)[4], I (&out)[4]) {
    const I a = _mm256_unpacklo_epi8(rows[0], rows[1]), b = _mm256_unpackhi_epi8(rows[0], rows[1]);
    const I c = _mm256_unpacklo_epi8(rows[2], rows[3]), d = _mm256_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm256_unpacklo_epi16(a, c);
    out[1] = _mm256_unpackhi_epi16(a, c);
    out[2] = _mm256_unpacklo_epi16(b, d);
    out[3] = _mm256_unpackhi_epi16(b, d);
  }
  static I narrow(const I (&t)[4], I zero_point) {
    const I a = _mm256_adds_epi16(_mm256_packs_epi32(t[0], t[1]), zero_point);
    return _mm256_packus_epi16(a, _mm256_adds_epi16(_mm256_packs_epi32(t[2], t[3]), zero_point));
  }
  static I least_bytes(I a, I b) { return _mm256_min_epu8(a, b); }
  static I most_bytes(I a, I b) { return _mm256_max_epu8(a, b); }
  static I ordered(I v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
  template <int Bytes> static void put(uint8_t* p, I v, int place, int64_t count) {
    if (count < Bytes) {
      alignas(32) uint8_t bytes[32];
      store(bytes, v);
      std::memcpy(p, bytes + place * Bytes, count);
    } else if constexpr (Bytes == 32) {
      store(p, v);
    } else {
      const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
      if constexpr (Bytes == 8) {
        const __m128i half = place < 2 ? low : high;
        const int64_t eight = place % 2 ? _mm_extract_epi64(half, 1) : _mm_cvtsi128_si64(half);
        std::memcpy(p, &eight, 8);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), place ? high : low);
        if constexpr (Bytes == 24) _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 16), high);
      }
    }
  }
};

} // namespace
} // namespace fewbit
