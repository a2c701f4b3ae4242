// What becomes of sums of products of codes, with an instruction set's vectors `V`: see Rescale. A vector has kLanes int32;
// four of them become the bytes of one.
#pragma once

#include "quantize_inl.h"

namespace fewbit {
namespace {

// What a tile of sums becomes: codes of bounded sums, codes of sums with Rescale::other, anything without it.
enum class Put { plain, other, any };

template <class V> struct Rescaler {
  using I = typename V::I;
  using F = typename V::F;

  F low, high, other_multiplier;
  I other_zero_point, low_codes, high_codes, zero_point;

  explicit Rescaler(const Rescale& r)
      : low(V::all(r.low)), high(V::all(r.high)), other_multiplier(V::all(r.other_multiplier)),
        other_zero_point(V::all(r.other_zero_point)), low_codes(V::zero()), high_codes(V::zero()),
        zero_point(V::all16(r.zero_point)) {
    if (r.codes) {
      low_codes = V::all8(static_cast<int>(r.low));
      high_codes = V::all8(static_cast<int>(r.high));
    }
  }

  static F scaled(I sum, F multiplier) { return V::times(V::to_float(sum), multiplier); }
  F with_other(F t, I codes) const {
    return V::add(t, scaled(V::subtract(codes, other_zero_point), other_multiplier));
  }
  F clamped(F t) const { return V::least(V::most(t, low), high); }
  // What is beyond int32 becomes the least of it: only above is that wrong, unless `Bounded`.
  template <bool Bounded = false> static I rounded(F t) { return V::round(Bounded ? t : V::least(t, V::all(1e9f))); }
  // Codes of four vectors of `rounded`, in the order of V::narrow. It saturates, so that the bounds can wait until bytes.
  I codes(const I (&t)[4]) const {
    return V::least_bytes(V::most_bytes(V::narrow(t, zero_point), low_codes), high_codes);
  }
};

} // namespace
} // namespace fewbit
