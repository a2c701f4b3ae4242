// Codes one by one, and means of windows of them; with an instruction set's vectors `Codes`.
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

void add_codes(const uint8_t* a, float multiplier, int32_t zero_point, int64_t begin, int64_t end, const Rescale& result) {
  const Rescaler<Codes> rescaler(result);
  const Codes::F factor = Codes::all(multiplier);
  const Codes::I zero = Codes::all(zero_point);
  for_vectors(begin, end, [&](int64_t first, int64_t n) {
    const bool whole = n == Codes::kBytes;
    Codes::I t[4], other[4];
    Codes::widen(whole ? Codes::load(a + first) : Codes::load_part(a + first, n), t);
    Codes::widen(whole ? Codes::load(result.other + first) : Codes::load_part(result.other + first, n), other);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      t[q] = rescaler.rounded(rescaler.with_other(rescaler.scaled(Codes::subtract(t[q], zero), factor), other[q]));
    const Codes::I codes = rescaler.codes(t);
    uint8_t* out = static_cast<uint8_t*>(result.out) + first;
    whole ? Codes::store(out, codes) : Codes::store_part(out, codes, n);
  });
}

// One mean for each channel: of the codes in rows [y0, y1) and columns [x0, x1) of an image.
void average_window(const Average& a, const uint8_t* image, const int64_t (&y)[2], const int64_t (&x)[2],
                    const Rescaler<Codes>& rescaler, uint8_t* out) {
  const int64_t inside = (y[1] > y[0] ? y[1] - y[0] : 0) * (x[1] > x[0] ? x[1] - x[0] : 0);
  const Codes::I start = Codes::all(static_cast<int32_t>(-inside * a.input_zero_point));
  const Codes::F multiplier = Codes::all(a.multiplier);
  const Codes::F count = Codes::all(static_cast<float>(a.count_padding ? a.kernel[0] * a.kernel[1] : inside));
  for_vectors(0, a.channels, [&](int64_t first, int64_t n) {
    const bool whole = n == Codes::kBytes;
    Codes::I sums[4] = {start, start, start, start}, codes[4];
    for (int64_t row = y[0]; row < y[1]; ++row)
      for (int64_t column = x[0]; column < x[1]; ++column) {
        const uint8_t* from = image + (row * a.width + column) * a.channels + first;
        Codes::widen(whole ? Codes::load(from) : Codes::load_part(from, n), codes);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sums[q] = Codes::add(sums[q], codes[q]);
      }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[q] = rescaler.rounded(Codes::divide(rescaler.scaled(sums[q], multiplier), count));
    const Codes::I result = rescaler.codes(sums);
    whole ? Codes::store(out + first, result) : Codes::store_part(out + first, result, n);
  });
}

void average(const Average& a, int64_t begin, int64_t end) {
  Rescale codes{};
  codes.high = 255;
  codes.codes = true;
  codes.zero_point = a.zero_point;
  const Rescaler<Codes> rescaler(codes);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* image = a.x + row / a.out_height * a.height * a.width * a.channels;
    const int64_t top = row % a.out_height * a.stride[0] - a.padding[0], bottom = top + a.kernel[0];
    const int64_t y[2] = {top < 0 ? 0 : top, bottom < a.height ? bottom : a.height};
    for (int64_t column = 0; column < a.out_width; ++column) {
      const int64_t left = column * a.stride[1] - a.padding[1], right = left + a.kernel[1];
      const int64_t x[2] = {left < 0 ? 0 : left, right < a.width ? right : a.width};
      average_window(a, image, y, x, rescaler, a.out + (row * a.out_width + column) * a.channels);
    }
  }
}

void lookup(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = table[x[i]];
}

} // namespace
} // namespace fewbit
