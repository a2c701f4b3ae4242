// AVX2 without VNNI. vpmaddubsw adds two products in int16 with saturation, so it gets only operands that cannot reach it:
// |w| <= 128 times |x| <= 127 for 8-bit weights (the sign moved from the weight to the activation), and codes up to 15 for
// 4-bit ones, of which eight sums fit in int16 before they are widened.
#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd : Avx {
  static constexpr int kPanelVectors = 2;
};

struct Dot8 {
  static constexpr int32_t kOffset = 0;
  using Acc = __m256i;
  struct Code {
    __m256i value, magnitude;
  };
  static Code ready(__m256i w) { return {w, _mm256_abs_epi8(w)}; }
  static Acc step(Acc acc, Code w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// In panels both sides are widened to int16 beforehand: moving signs costs a multiplier's slot on many CPUs.
struct PanelDot8 {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 6;
  static constexpr int kElement = 2;
  static constexpr int32_t kOffset = 0;
  using Acc = __m256i;
  using Code = __m256i;
  static Acc start(int32_t) { return _mm256_setzero_si256(); }
  static Code ready(__m256i w) { return w; }
  static Acc step(Acc acc, Code w, __m256i x) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x)); }
  static __m256i finish(Acc acc) { return acc; }
  static int32_t start_of(const int8_t*) { return 0; }
};

struct Dot4 {
  static constexpr bool kWide = false;
  static constexpr int kTileRows = 6;
  static constexpr int kElement = 1;
  static constexpr int32_t kOffset = 8;
  using Acc = __m256i;
  using Code = __m256i;
  static Acc none() { return _mm256_setzero_si256(); }
  static Acc start(int32_t pair) { return _mm256_set1_epi32(pair); }
  static Code ready(__m256i w) { return w; }
  static Acc step(Acc acc, Code w, __m256i x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)); }
  static __m256i finish(Acc acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  // -8 times the activations that each of the two int16 of a lane adds up: at most 8 * 16 * 127 = 16256. The sum wraps
  // around on the way, but (code - 8) * x over a block fits.
  static int32_t start_of(const int8_t* x) {
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kBlock; ++i) sums[i / 2 % 2] += x[i];
    return static_cast<int32_t>((static_cast<uint32_t>(-8 * sums[0]) & 0xffff) | static_cast<uint32_t>(-8 * sums[1]) << 16);
  }
};
using PanelDot4 = Dot4;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kAvx2 = table("avx2");
} // namespace fewbit
