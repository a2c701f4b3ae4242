// ARM with sdot. In panels it takes the four activations of a row from a lane, so that none has to be spread over a vector.
#include "neon_inl.h"
#include "plain_codes_inl.h"

namespace fewbit {
namespace {

struct Simd : Neon {
  static constexpr int kPanelVectors = 4;

  // kBlock columns of 4 rows, as [kBlock / 4][4 rows][4 bytes], `step_bytes` apart.
  template <int B> static void pack(const uint8_t* rows, int64_t row_bytes, uint8_t* out, int64_t step_bytes) {
    I r[4][2];
    for (int i = 0; i < 4; ++i) block<B>(rows + i * row_bytes, r[i]);
    for (int half = 0; half < 2; ++half) {
      const int32x4_t a = vtrn1q_s32(r[0][half], r[1][half]), b = vtrn2q_s32(r[0][half], r[1][half]);
      const int32x4_t c = vtrn1q_s32(r[2][half], r[3][half]), d = vtrn2q_s32(r[2][half], r[3][half]);
      put(out, vtrn1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(c)));
      put(out + step_bytes, vtrn1q_s64(vreinterpretq_s64_s32(b), vreinterpretq_s64_s32(d)));
      put(out + 2 * step_bytes, vtrn2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(c)));
      put(out + 3 * step_bytes, vtrn2q_s64(vreinterpretq_s64_s32(b), vreinterpretq_s64_s32(d)));
      out += 4 * step_bytes;
    }
  }
  static void put(uint8_t* out, int64x2_t codes) { vst1q_u8(out, vreinterpretq_u8_s64(codes)); }
};

template <class Dot> struct PanelDot : Dot {
  static constexpr int kTileRows = 6;
  static constexpr int kUnit = 4;

  template <int R>
  __attribute__((always_inline)) static void add(const uint8_t* codes, const int8_t* const (&x)[R], int64_t begin,
                                                 int64_t end, int32x4_t (&sums)[R][Simd::kPanelVectors]) {
    constexpr int64_t kStepBytes = Simd::kPanelVectors * Simd::kBytes;
    for (int64_t k = begin; k < end; k += 16, codes += 4 * kStepBytes) {
      int8x16_t a[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] = vld1q_s8(x[r] + k);
      add_lane<0>(codes, a, sums);
      add_lane<1>(codes + kStepBytes, a, sums);
      add_lane<2>(codes + 2 * kStepBytes, a, sums);
      add_lane<3>(codes + 3 * kStepBytes, a, sums);
    }
  }
  // With six rows 24 sums and their activations leave two registers, so one vector of codes is read at a time.
  template <int Lane, int R>
  __attribute__((always_inline)) static void add_lane(const uint8_t* codes, const int8x16_t (&x)[R],
                                                      int32x4_t (&sums)[R][Simd::kPanelVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kPanelVectors; ++v) {
      const int8x16_t c = Dot::ready(Simd::load(codes + v * Simd::kBytes));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][v] = vdotq_laneq_s32(sums[r][v], c, x[r], Lane);
        Simd::pin(sums[r][v]);
      }
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
extern const Kernels kNeonDotprod = table("neon_dotprod");
} // namespace fewbit
