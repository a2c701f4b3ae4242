// Codes one by one, and means and the largest ones of windows of them; with an instruction set's vectors `Codes`.
#pragma once

#include "rescale_inl.h"

namespace fewbit {
namespace {

// f(first, count) for runs of Codes::kBytes of [0, count), the last of which may be shorter.
template <class F> __attribute__((always_inline)) inline void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + Codes::kBytes <= end; i += Codes::kBytes) f(i, int64_t{Codes::kBytes});
  if (i < end) f(i, end - i);
}

void quantize_codes(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* out) {
  const Codes::F step = Codes::all(scale);
  const Codes::I zero = Codes::all16(zero_point);
  for_vectors(0, count, [&](int64_t first, int64_t n) {
    float rest[Codes::kBytes] = {};
    const float* from = x + first;
    if (n < Codes::kBytes) std::memcpy(rest, from, n * sizeof(float)), from = rest;
    Codes::I t[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      t[q] = Rescaler<Codes>::rounded(Codes::divide(Codes::floats(from + q * Codes::kLanes), step));
    const Codes::I codes = Codes::ordered(Codes::narrow(t, zero));
    n == Codes::kBytes ? Codes::store(out + first, codes) : Codes::store_part(out + first, codes, n);
  });
}

// Interleaves `count` codes of each of C planes.
template <int64_t C> inline void interleave_planes(const uint8_t* planes, int64_t stride, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < C; ++c) out[i * C + c] = planes[c * stride + i];
}

void quantize_planes(const float* x, int64_t plane, int64_t channels, int64_t begin, int64_t end, float scale,
                     int32_t zero_point, uint8_t* out) {
  constexpr int64_t kRun = 256, kChannels = 64;
  uint8_t codes[kChannels * kRun];
  for (int64_t first = begin; first < end; first += kRun) {
    const int64_t count = first + kRun < end ? kRun : end - first;
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      const int64_t here = channel + kChannels < channels ? kChannels : channels - channel;
      for (int64_t c = 0; c < here; ++c)
        quantize_codes(x + (channel + c) * plane + first, count, scale, zero_point, codes + c * kRun);
      uint8_t* to = out + first * channels + channel;
      if (channels == 3) {
        interleave_planes<3>(codes, kRun, count, to);
      } else {
        for (int64_t c = 0; c < here; c += 4) {
          const int64_t four = here - c < 4 ? here - c : 4;
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < four; ++j) to[i * channels + c + j] = codes[(c + j) * kRun + i];
        }
      }
    }
  }
}

void dequantize_codes(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(x[i] - zero_point) * scale;
}

void add_codes(const Add& add, int64_t begin, int64_t end) {
  const Rescaler<Codes> rescaler(add.result);
  const Codes::F a_multiplier = Codes::all(add.a_multiplier), b_multiplier = Codes::all(add.b_multiplier);
  const Codes::I a_zero = Codes::all(add.a_zero_point), b_zero = Codes::all(add.b_zero_point);
  for_vectors(begin, end, [&](int64_t first, int64_t n) {
    const bool whole = n == Codes::kBytes;
    Codes::I a[4], b[4];
    Codes::widen(whole ? Codes::load(add.a + first) : Codes::load_part(add.a + first, n), a);
    Codes::widen(whole ? Codes::load(add.b + first) : Codes::load_part(add.b + first, n), b);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      a[q] = rescaler.rounded(Codes::add(rescaler.scaled(Codes::subtract(a[q], a_zero), a_multiplier),
                                         rescaler.scaled(Codes::subtract(b[q], b_zero), b_multiplier)));
    const Codes::I codes = rescaler.codes(a);
    uint8_t* out = static_cast<uint8_t*>(add.result.out) + first;
    whole ? Codes::store(out, codes) : Codes::store_part(out, codes, n);
  });
}

// The positions of an image that one window has, in steps: rows [y0, y1) and columns [x0, x1).
struct Inside {
  const uint8_t* image;
  int64_t y0, y1, x0, x1;
};

// The first position from `first` on, in steps, that is not before the image.
inline int64_t entered(int64_t first, int64_t step) { return first < 0 ? (-first + step - 1) / step * step + first : first; }

// f(window, its pixel of the output) for all windows of rows [begin, end) of the output.
template <class F>
__attribute__((always_inline)) inline void for_windows(const Pool& p, int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t top = row % p.out_height * p.stride[0] - p.padding[0];
    const int64_t bottom = top + (p.kernel[0] - 1) * p.dilation[0] + 1;
    Inside w{p.x + row / p.out_height * p.height * p.width * p.channels, entered(top, p.dilation[0]),
             bottom < p.height ? bottom : p.height, 0, 0};
    for (int64_t column = 0; column < p.out_width; ++column) {
      const int64_t left = column * p.stride[1] - p.padding[1], right = left + (p.kernel[1] - 1) * p.dilation[1] + 1;
      w.x0 = entered(left, p.dilation[1]);
      w.x1 = right < p.width ? right : p.width;
      f(w, p.out + (row * p.out_width + column) * p.channels);
    }
  }
}

void average(const Average& a, int64_t begin, int64_t end) {
  const Pool& p = a.pool;
  Rescale to{};
  to.high = 255;
  to.codes = true;
  to.zero_point = a.zero_point;
  const Rescaler<Codes> rescaler(to);
  const Codes::F multiplier = Codes::all(a.multiplier);
  for_windows(p, begin, end, [&](const Inside& w, uint8_t* out) {
    const int64_t inside = (w.y1 > w.y0 ? w.y1 - w.y0 : 0) * (w.x1 > w.x0 ? w.x1 - w.x0 : 0);
    const Codes::I start = Codes::all(static_cast<int32_t>(-inside * a.input_zero_point));
    const Codes::F count = Codes::all(static_cast<float>(a.count_padding ? p.kernel[0] * p.kernel[1] : inside));
    for_vectors(0, p.channels, [&](int64_t first, int64_t n) {
      const bool whole = n == Codes::kBytes;
      Codes::I sums[4] = {start, start, start, start}, codes[4];
      for (int64_t y = w.y0; y < w.y1; ++y)
        for (int64_t x = w.x0; x < w.x1; ++x) {
          const uint8_t* from = w.image + (y * p.width + x) * p.channels + first;
          Codes::widen(whole ? Codes::load(from) : Codes::load_part(from, n), codes);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) sums[q] = Codes::add(sums[q], codes[q]);
        }
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sums[q] = rescaler.rounded(Codes::divide(rescaler.scaled(sums[q], multiplier), count));
      const Codes::I result = rescaler.codes(sums);
      whole ? Codes::store(out + first, result) : Codes::store_part(out + first, result, n);
    });
  });
}

void max_pool(const Pool& p, int64_t begin, int64_t end) {
  for_windows(p, begin, end, [&](const Inside& w, uint8_t* out) {
    for_vectors(0, p.channels, [&](int64_t first, int64_t n) {
      const bool whole = n == Codes::kBytes;
      Codes::I most = Codes::zero();
      for (int64_t y = w.y0; y < w.y1; y += p.dilation[0])
        for (int64_t x = w.x0; x < w.x1; x += p.dilation[1]) {
          const uint8_t* from = w.image + (y * p.width + x) * p.channels + first;
          most = Codes::most_bytes(most, whole ? Codes::load(from) : Codes::load_part(from, n));
        }
      whole ? Codes::store(out + first, most) : Codes::store_part(out + first, most, n);
    });
  });
}

void lookup(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = table[x[i]];
}

} // namespace
} // namespace fewbit
