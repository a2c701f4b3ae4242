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

void average(const Average& a, int64_t begin, int64_t end) {
  int32_t* sums = reinterpret_cast<int32_t*>(row_scratch(a.channels));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / a.out_height, top = row % a.out_height * a.stride[0] - a.padding[0];
    const int64_t y0 = top < 0 ? 0 : top, y1 = top + a.kernel[0] < a.height ? top + a.kernel[0] : a.height;
    for (int64_t column = 0; column < a.out_width; ++column) {
      const int64_t left = column * a.stride[1] - a.padding[1];
      const int64_t x0 = left < 0 ? 0 : left, x1 = left + a.kernel[1] < a.width ? left + a.kernel[1] : a.width;
      const int64_t inside = (y1 > y0 ? y1 - y0 : 0) * (x1 > x0 ? x1 - x0 : 0);
      const int32_t start = static_cast<int32_t>(-inside * a.input_zero_point);
      for (int64_t c = 0; c < a.channels; ++c) sums[c] = start;
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) {
          const uint8_t* codes = a.x + ((image * a.height + y) * a.width + x) * a.channels;
          for (int64_t c = 0; c < a.channels; ++c) sums[c] += codes[c];
        }
      const float count = static_cast<float>(a.count_padding ? a.kernel[0] * a.kernel[1] : inside);
      uint8_t* out = a.out + (row * a.out_width + column) * a.channels;
      for (int64_t c = 0; c < a.channels; ++c) {
        const float mean = static_cast<float>(sums[c]) * a.multiplier / count;
        const float code = __builtin_rintf(mean < -1e9f ? -1e9f : mean < 1e9f ? mean : 1e9f);
        const int32_t v = static_cast<int32_t>(code) + a.zero_point;
        out[c] = static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
      }
    }
  }
}

void lookup(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = table[x[i]];
}

} // namespace
} // namespace fewbit
