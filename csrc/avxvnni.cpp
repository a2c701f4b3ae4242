// 256-bit VNNI (AVX-VNNI): as AVX-512 VNNI, on AVX2's vectors.
#include "avx_inl.h"

namespace fewbit {
namespace {

struct Simd : Avx {
  static constexpr int kPanelVectors = 2;
};

template <int32_t Offset> struct Dot {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 5;
  static constexpr int kElement = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = __m256i;
  using Code = __m256i;
  static Acc none() { return _mm256_setzero_si256(); }
  static Acc start(int32_t sum) { return _mm256_set1_epi32(sum); }
  static Code ready(__m256i w) { return Offset == 128 ? _mm256_xor_si256(w, _mm256_set1_epi8(-128)) : w; }
  static Acc step(Acc acc, Code w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
  static __m256i finish(Acc acc) { return acc; }
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
extern const Kernels kAvxVnni = table("avxvnni");
} // namespace fewbit
