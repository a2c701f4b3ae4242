// AVX-512 with VNNI: four products of unsigned and signed bytes are added to int32 without saturation. Signed 8-bit weights
// become unsigned by adding 128, which is taken away again through the sums of the activations.
#include <immintrin.h>

#include "avx_codes_inl.h"
#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd : AvxBlocks {
  static constexpr int kBytes = 64;
  static constexpr int kPackRows = 8;
  static constexpr int kPanelVectors = 2;
  using I = __m512i;
  using F = __m512;

  static void pin(I& v) { __asm__("" : "+v"(v)); }
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I load_part(const uint8_t* p, int64_t bytes) { return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I all(int32_t v) { return _mm512_set1_epi32(v); }
  static F all(float v) { return _mm512_set1_ps(v); }
  static I four(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
  }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F times(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I power_of_two(I n) { return _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23); }
  static I low(I bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static I high(I bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
  static int32_t sum(I v) {
    return Avx::sum(_mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
  }
  static float sum(F v) {
    return Avx::sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
  static F load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  template <int64_t Place> static F nibble(I v) {
    const F codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); // its place is the low four bits
    return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * Place), codes);
  }
  static F load_bf16(const uint16_t* p, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static I first_lane(int32_t v) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(v)); }
  template <int64_t Blocks> static F spread(F scale, int64_t first) {
    static_assert(Blocks == 2 || Blocks == 4);
    constexpr int a = Blocks == 4, b = Blocks / 2, c = Blocks - 1;
    const I place = _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, a, a, a, a, b, b, b, b, c, c, c, c),
                                     _mm512_set1_epi32(static_cast<int>(first)));
    return _mm512_permutexvar_ps(place, scale);
  }
  template <int B> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
    Avx::pack<B>(rows, row_bytes, out, step_bytes);
  }
};

template <int32_t Offset> struct Dot {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 8;
  static constexpr int kUnit = 4;
  static constexpr int kPlanes = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = __m512i;
  using Code = __m512i;
  using X = __m512i;
  static Code ready(__m512i w) { return Offset == 128 ? _mm512_xor_si512(w, _mm512_set1_epi8(-128)) : w; }
  static X row(const int8_t* p, int64_t) { return Simd::load(p); }
  static X four(const int8_t* p, int64_t) { return Simd::four(p); }
  static Acc start(int32_t sum) { return _mm512_set1_epi32(sum); }
  static Acc step(Acc acc, Code w, X x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static __m512i finish(Acc acc) { return acc; }
  static __m512i lane_starts(__m512i low, __m512i high) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(Offset));
    return _mm512_sub_epi32(Simd::zero(), _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(Simd::zero(), offset, low), offset, high));
  }
};
using Dot8 = Dot<128>;
using Dot4 = Dot<8>;
using PanelDot8 = Dot8;
using PanelDot4 = Dot4;

struct Codes {
  static constexpr int kLanes = 16;
  static constexpr int kBytes = 64;
  static constexpr int kTileRows[] = {14, 12, 8, 6};
  static constexpr int kTileColumns = 6;
  using Narrower = Codes256;
  using I = __m512i;
  using F = __m512;

  static __mmask64 first(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
  static void pin(I& v) { __asm__("" : "+v"(v)); }
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I load_part(const void* p, int64_t count) { return _mm512_maskz_loadu_epi8(first(count), p); }
  static F floats(const float* p) { return _mm512_loadu_ps(p); }
  static F floats_part(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first(count)), p);
  }
  static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static void store(void* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_part(void* p, I v, int64_t count) { _mm512_mask_storeu_epi8(p, first(count), v); }
  static void store_part(void* p, F v, int64_t count) { store_part(p, _mm512_castps_si512(v), count); }
  static I four(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static I bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I bytes_part(const uint8_t* p, int64_t count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(first(count)), p));
  }
  static I all(int32_t v) { return _mm512_set1_epi32(v); }
  static F all(float v) { return _mm512_set1_ps(v); }
  static I all8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I all16(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F times(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F least(F a, F b) { return _mm512_min_ps(a, b); }
  static F most(F a, F b) { return _mm512_max_ps(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static void widen(I v, I (&out)[4]) {
    const I rows[4] = {v, zero(), zero(), zero()};
    interleave(rows, out);
  }
  static void interleave(const I (&rows)[4], I (&out)[4]) {
    const I a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const I c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
  }
  static I narrow(const I (&t)[4], I zero_point) {
    const I a = _mm512_adds_epi16(_mm512_packs_epi32(t[0], t[1]), zero_point);
    return _mm512_packus_epi16(a, _mm512_adds_epi16(_mm512_packs_epi32(t[2], t[3]), zero_point));
  }
  static I least_bytes(I a, I b) { return _mm512_min_epu8(a, b); }
  static I most_bytes(I a, I b) { return _mm512_max_epu8(a, b); }
  static I ordered(I v) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  }
  template <int Bytes> static void put(uint8_t* p, I v, int place, int64_t count) {
    if constexpr (Bytes >= 48) {
      if (count < Bytes) return store_part(p, v, count);
      if (Bytes == 64) return store(p, v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32), _mm512_extracti32x4_epi32(v, 2));
    } else if constexpr (Bytes == 32) {
      const __m256i half = place ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
      if (count >= Bytes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
      _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(first(count)), half);
    } else {
      const __m128i quarters[] = {_mm512_castsi512_si128(v), _mm512_extracti32x4_epi32(v, 1),
                                  _mm512_extracti32x4_epi32(v, 2), _mm512_extracti32x4_epi32(v, 3)};
      if (count >= Bytes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), quarters[place]);
      _mm_mask_storeu_epi8(p, static_cast<__mmask16>(first(count)), quarters[place]);
    }
  }
};

struct CodesDot {
  static __m512i step(__m512i acc, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(acc, x, w); }
  static __m256i step(__m256i acc, __m256i x, __m256i w) { return _mm256_dpbusd_epi32(acc, x, w); }
  static __m128i step(__m128i acc, __m128i x, __m128i w) { return _mm_dpbusd_epi32(acc, x, w); }
};
using CodesPairDot = CodesDot;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kAvx512Vnni = table("avx512vnni");
} // namespace fewbit
