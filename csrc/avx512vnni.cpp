// AVX-512 with VNNI: four products of unsigned and signed bytes are added to int32 without saturation. Signed 8-bit weights
// become unsigned by adding 128, which is taken away again through the sums of the activations.
#include <immintrin.h>

#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd {
  static constexpr int kBytes = 64;
  static constexpr int kPackRows = 8;
  static constexpr int kPrefetch = 2048;
  static constexpr int kPanelVectors = 2;
  using I = __m512i;
  using F = __m512;

  static void pin(I& v) { __asm__("" : "+v"(v)); }
  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
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
  static I low(I bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static I high(I bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
  static int32_t sum(I v) {
    return Avx::sum(_mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
  }
  static float sum(F v) {
    return Avx::sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
  template <int64_t Columns> static F spread(const float* p) {
    static_assert(Columns == 64 || Columns == 128);
    if constexpr (Columns == 64) {
      return _mm512_insertf32x8(_mm512_set1_ps(p[0]), _mm256_set1_ps(p[1]), 1);
    } else {
      const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
      return _mm512_permutexvar_ps(place, _mm512_castps128_ps512(_mm_loadu_ps(p)));
    }
  }
  template <int64_t Columns> static I first_lanes(const int32_t* p) {
    if constexpr (Columns == 64) {
      return _mm512_maskz_expand_epi32(0x0101, _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    } else {
      return _mm512_maskz_expand_epi32(0x1111, _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
  }
  template <int B, int Element> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
    Avx::pack<B, Element>(rows, row_bytes, out, step_bytes);
  }
  static void nibbles16(const uint8_t* bytes, uint8_t* out) { Avx::nibbles16(bytes, out); }
};

template <int32_t Offset> struct Dot {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 8;
  static constexpr int kElement = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = __m512i;
  using Code = __m512i;
  static Acc none() { return _mm512_setzero_si512(); }
  static Acc start(int32_t sum) { return _mm512_set1_epi32(sum); }
  static Code ready(__m512i w) { return Offset == 128 ? _mm512_xor_si512(w, _mm512_set1_epi8(-128)) : w; }
  static Acc step(Acc acc, Code w, __m512i x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static __m512i finish(Acc acc) { return acc; }
  static int32_t start_of(const int8_t*) { return 0; }
};
using Dot8 = Dot<128>;
using Dot4 = Dot<8>;
using PanelDot8 = Dot8;
using PanelDot4 = Dot4;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kAvx512Vnni = table("avx512vnni");
} // namespace fewbit
