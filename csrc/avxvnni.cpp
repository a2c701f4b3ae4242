// 256-bit VNNI (AVX-VNNI): as AVX-512 VNNI, on AVX2's vectors.
#include "avx_codes_inl.h"
#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd : Avx {
  static constexpr int kPanelVectors = 2;
};

template <int32_t Offset> struct Dot {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 5;
  static constexpr int kUnit = 4;
  static constexpr int kPlanes = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = __m256i;
  using Code = __m256i;
  using X = __m256i;
  static Code ready(__m256i w) { return Offset == 128 ? _mm256_xor_si256(w, _mm256_set1_epi8(-128)) : w; }
  static X row(const int8_t* p, int64_t) { return Simd::load(p); }
  static X four(const int8_t* p, int64_t) { return Simd::four(p); }
  static Acc start(int32_t sum) { return _mm256_set1_epi32(sum); }
  static Acc step(Acc acc, Code w, X x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
  static __m256i finish(Acc acc) { return acc; }
  static __m256i lane_starts(__m256i low, __m256i high) {
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(Offset));
    return _mm256_sub_epi32(Simd::zero(), _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(Simd::zero(), offset, low), offset, high));
  }
};
using Dot8 = Dot<128>;
using Dot4 = Dot<8>;
using PanelDot8 = Dot8;
using PanelDot4 = Dot4;

struct Codes : Codes256 {
  static constexpr int kTileRows[] = {8, 6, 4, 3};
  static constexpr int kTileColumns = 2;
};

struct CodesDot {
  static __m256i step(__m256i acc, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
  static __m128i step(__m128i acc, __m128i x, __m128i w) { return _mm_dpbusd_avx_epi32(acc, x, w); }
};
using CodesPairDot = CodesDot;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kAvxVnni = table("avxvnni");
} // namespace fewbit
