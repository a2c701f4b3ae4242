// AVX2 without VNNI. vpmaddubsw adds two products in int16 with saturation, so it gets only operands that cannot reach it:
// magnitudes of activations, at most 127, times weights whose signs follow the activations'; and 4-bit codes up to 15, of
// which the sums of a block fit in int16 before they are widened.
#include "avx_codes_inl.h"
#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd : Avx {
  static constexpr int kPanelVectors = 4;
};

// Of an activation its magnitude and a mask of its sign. w ^ mask is w or -w - 1, which is off by the magnitude of each
// negative activation, whatever w is: these are added again at the end. (vpsignb would need no correction, but competes with
// the multiplications.) At most 127 times -128 <= w ^ mask <= 127: two of these are within int16.
struct Dot8 {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 2;
  static constexpr int kUnit = 4;
  static constexpr int kPlanes = 2;
  static constexpr int32_t kOffset = 0;
  using Acc = __m256i;
  using Code = __m256i;
  struct X {
    __m256i magnitude, mask;
  };
  static Code ready(__m256i w) { return w; }
  static X row(const int8_t* p, int64_t plane) { return {Avx::load(p), Avx::load(p + plane)}; }
  static X four(const int8_t* p, int64_t plane) { return {Avx::four(p), Avx::four(p + plane)}; }
  static Acc start(int32_t bonus) { return _mm256_set1_epi32(bonus); }
  static Acc step(Acc acc, Code w, X x) {
    const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_xor_si256(w, x.mask));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static __m256i finish(Acc acc) { return acc; }
};
using PanelDot8 = Dot8;

struct Dot4 {
  static constexpr bool kWide = false;
  static constexpr int kTileRows = 3;
  static constexpr int kUnit = 4;
  static constexpr int kPlanes = 1;
  static constexpr int32_t kOffset = 8;
  using Acc = __m256i;
  using Code = __m256i;
  using X = __m256i;
  static Code ready(__m256i w) { return w; }
  static X row(const int8_t* p, int64_t) { return Avx::load(p); }
  static X four(const int8_t* p, int64_t) { return Avx::four(p); }
  static Acc start(int32_t pair) { return _mm256_set1_epi32(pair); }
  static Acc step(Acc acc, Code w, X x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)); }
  static __m256i finish(Acc acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  // -8 times the activations that each of the two int16 of a lane adds up: at most 8 * 16 * 127 = 16256. The sum wraps
  // around on the way, but (code - 8) * x over a block fits.
  static int32_t block_start(const int8_t* x) {
    const __m256i eight = _mm256_maddubs_epi16(_mm256_set1_epi8(8), Avx::load(x));
    __m128i s = _mm_add_epi16(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), s));
  }
  static __m256i lane_starts(__m256i low, __m256i high) {
    const __m256i eight = _mm256_set1_epi8(8);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(eight, low), _mm256_maddubs_epi16(eight, high));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(-1));
  }
};
using PanelDot4 = Dot4;

struct Codes : Codes256 {
  static constexpr int kTileRows[] = {6, 5, 3, 2};
  static constexpr int kTileColumns = 2;
};

// Even and odd bytes apart, widened to 16 bits: two products of at most 255 * 128 are added in int32.
struct CodesDot {
  static __m256i step(__m256i acc, __m256i x, __m256i w) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  static __m128i step(__m128i acc, __m128i x, __m128i w) {
    const __m128i even =
        _mm_madd_epi16(_mm_and_si128(x, _mm_set1_epi16(255)), _mm_srai_epi16(_mm_slli_epi16(w, 8), 8));
    const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(w, 8));
    return _mm_add_epi32(acc, _mm_add_epi32(even, odd));
  }
};

// Of weights whose products with any neighbouring codes add up within int16.
struct CodesPairDot {
  static __m256i step(__m256i acc, __m256i x, __m256i w) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
  }
  static __m128i step(__m128i acc, __m128i x, __m128i w) {
    return _mm_add_epi32(acc, _mm_madd_epi16(_mm_maddubs_epi16(x, w), _mm_set1_epi16(1)));
  }
};

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kAvx2 = table("avx2");
} // namespace fewbit
