// ARM with smmla, which multiplies eight columns of two rows with those of two output channels: for panels. Single rows go
// through sdot.
#include "neon_inl.h"
#include "plain_codes_inl.h"

namespace fewbit {
namespace {

struct Simd : Neon {
  static constexpr int kPanelVectors = 3;

  // kBlock columns of 4 rows, as [kBlock / 8][4 rows][8 bytes], `step_bytes` apart.
  template <int B> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
    for (int i = 0; i < 4; i += 2, out += kBytes) {
      I a[2], b[2];
      block<B>(rows + i * row_bytes, a);
      block<B>(rows + (i + 1) * row_bytes, b);
      for (int half = 0; half < 2; ++half) {
        const int64x2_t c = vreinterpretq_s64_s32(a[half]), d = vreinterpretq_s64_s32(b[half]);
        vst1q_u8(out + 2 * half * step_bytes, vreinterpretq_u8_s64(vzip1q_s64(c, d)));
        vst1q_u8(out + (2 * half + 1) * step_bytes, vreinterpretq_u8_s64(vzip2q_s64(c, d)));
      }
    }
  }
};

template <class Dot> struct PanelDot : Dot {
  static constexpr int kTileRows = 8;
  static constexpr int kUnit = 8;

  // A pair of rows times a pair of channels gives four sums, in one register: those of the first row, then of the second.
  template <int R>
  __attribute__((always_inline)) static void add(const uint8_t* codes, const int8_t* const (&x)[R], int64_t begin,
                                                 int64_t end, int32x4_t (&sums)[R][Simd::kPanelVectors]) {
    constexpr int kRowPairs = (R + 1) / 2, kChannelPairs = 2 * Simd::kPanelVectors;
    int32x4_t acc[kRowPairs][kChannelPairs];
    for (auto& sums_of_pair : acc)
      for (auto& sum : sums_of_pair) sum = vdupq_n_s32(0);
    for (int64_t k = begin; k < end; k += 8, codes += kChannelPairs * Simd::kBytes) {
      int8x16_t pair[kRowPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kRowPairs; ++i)
        pair[i] = vcombine_s8(vld1_s8(x[2 * i] + k), vld1_s8(x[2 * i + 1 < R ? 2 * i + 1 : 2 * i] + k));
#pragma GCC unroll 8
      for (int j = 0; j < kChannelPairs; ++j) {
        const int8x16_t c = Dot::ready(Simd::load(codes + j * Simd::kBytes));
#pragma GCC unroll 4
        for (int i = 0; i < kRowPairs; ++i) {
          acc[i][j] = vmmlaq_s32(acc[i][j], pair[i], c);
          Simd::pin(acc[i][j]);
        }
      }
    }
    for (int i = 0; i < kRowPairs; ++i)
      for (int v = 0; v < Simd::kPanelVectors; ++v) {
        const int64x2_t a = vreinterpretq_s64_s32(acc[i][2 * v]), b = vreinterpretq_s64_s32(acc[i][2 * v + 1]);
        sums[2 * i][v] = vaddq_s32(sums[2 * i][v], vreinterpretq_s32_s64(vzip1q_s64(a, b)));
        if (2 * i + 1 < R) sums[2 * i + 1][v] = vaddq_s32(sums[2 * i + 1][v], vreinterpretq_s32_s64(vzip2q_s64(a, b)));
      }
  }
};
using PanelDot8 = PanelDot<Dot8>;
using PanelDot4 = PanelDot<Dot4>;
using Codes = PlainCodes;
using CodesDot = PlainCodesDot;
using CodesPairDot = PlainCodesDot;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kNeonI8mm = table("neon_i8mm");
} // namespace fewbit
