// Any CPU: vectors of 16 bytes as plain arrays, which compilers may turn into what they know.
#include "plain_codes_inl.h"
#include "quantize_inl.h"

namespace fewbit {
namespace {

struct Simd : Plain {
  static constexpr int kBytes = 16;
  static constexpr int kPanelVectors = 2;
  static constexpr int kPackRows = 1;
  static constexpr int kLanes = 4;
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef float F __attribute__((vector_size(kBytes)));

  template <class R, class O> static R each(O value) {
    R r;
    for (int i = 0; i < kLanes; ++i) r[i] = value(i);
    return r;
  }
  static void pin(I&) {}
  static I zero() { return all(0); }
  static I load(const void* p) {
    I r;
    std::memcpy(&r, p, kBytes);
    return r;
  }
  static I load_part(const uint8_t* p, int64_t bytes) { return load(Filled<kBytes>(p, bytes).bytes); }
  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, kBytes);
    return r;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, kBytes); }
  static void store(int32_t* p, I v) { std::memcpy(p, &v, kBytes); }
  static I all(int32_t v) { return each<I>([=](int) { return v; }); }
  static F all(float v) { return each<F>([=](int) { return v; }); }
  static I four(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return all(bits);
  }
  // Through unsigned: sums may wrap around on the way to one that fits.
  static I add(I a, I b) { return each<I>([=](int i) { return int32_t(uint32_t(a[i]) + uint32_t(b[i])); }); }
  static I subtract(I a, I b) { return each<I>([=](int i) { return int32_t(uint32_t(a[i]) - uint32_t(b[i])); }); }
  static I multiply(I a, I b) { return each<I>([=](int i) { return int32_t(uint32_t(a[i]) * uint32_t(b[i])); }); }
  static F times(F a, F b) { return each<F>([=](int i) { return a[i] * b[i]; }); }
  static F fma(F a, F b, F c) { return each<F>([=](int i) { return a[i] * b[i] + c[i]; }); }
  static F to_float(I v) { return each<F>([=](int i) { return static_cast<float>(v[i]); }); }
  static I power_of_two(I n) { return each<I>([=](int i) { return int32_t((uint32_t(n[i]) + 127) << 23); }); }
  static I low(I bytes) { return each<I>([=](int i) { return bytes[i] & 0x0f0f0f0f; }); }
  static I high(I bytes) { return each<I>([=](int i) { return (bytes[i] >> 4) & 0x0f0f0f0f; }); }
  static int32_t sum(I v) { return int32_t(uint32_t(v[0]) + uint32_t(v[1]) + uint32_t(v[2]) + uint32_t(v[3])); }
  static float sum(F v) { return (v[0] + v[1]) + (v[2] + v[3]); }
  static F load_bf16(const uint16_t* p) { return each<F>([=](int i) { return float_of(uint32_t{p[i]} << 16); }); }
  template <int64_t Blocks> static F spread(F scale, int64_t first) { return all(scale[first]); }
  static F load_bf16(const uint16_t* p, int64_t count) { // fewer than a vector; zeros after them
    return each<F>([=](int i) { return i < count ? float_of(uint32_t{p[i]} << 16) : 0.0f; });
  }
  template <int64_t Place> static F nibble(I v) {
    return each<F>([=](int i) { return static_cast<float>(static_cast<int32_t>(uint32_t(v[i]) >> 4 * Place & 15) - 8); });
  }
  static I first_lane(int32_t v) {
    return each<I>([=](int i) { return i ? 0 : v; });
  }
  template <int B> static void pack(const uint8_t* rows, int64_t, uint8_t* out, int64_t step_bytes) {
    for (int s = 0; s < kBlock / 4; ++s)
      for (int i = 0; i < 4; ++i) {
        const int k = s * 4 + i;
        out[s * step_bytes + i] = B == 8 ? rows[k] : k < 16 ? rows[k] & 15 : rows[k - 16] >> 4;
      }
  }
};

template <int32_t Offset> struct Dot {
  static constexpr bool kWide = true;
  static constexpr int kTileRows = 2;
  static constexpr int kUnit = 4;
  static constexpr int kPlanes = 1;
  static constexpr int32_t kOffset = Offset;
  using Acc = Simd::I;
  using Code = Simd::I;
  using X = Simd::I;
  static Acc start(int32_t sum) { return Simd::all(sum); }
  static Code ready(Simd::I w) { return w; }
  static X row(const int8_t* p, int64_t) { return Simd::load(p); }
  static X four(const int8_t* p, int64_t) { return Simd::four(p); }
  static Acc step(Acc acc, Code w, X x) {
    return Simd::each<Acc>([&](int i) {
      const int32_t codes = w[i], inputs = x[i];
      int8_t a[4], b[4];
      std::memcpy(a, &codes, 4);
      std::memcpy(b, &inputs, 4);
      return int32_t(uint32_t(acc[i]) + uint32_t(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]));
    });
  }
  static Simd::I finish(Acc acc) { return acc; }
};
using Dot8 = Dot<0>;
using Dot4 = Dot<8>;
using PanelDot8 = Dot8;
using PanelDot4 = Dot4;
using Codes = PlainCodes;
using CodesDot = PlainCodesDot;
using CodesPairDot = PlainCodesDot;

} // namespace
} // namespace fewbit

#include "table_inl.h"

namespace fewbit {
extern const Kernels kScalar = table("scalar");
} // namespace fewbit
