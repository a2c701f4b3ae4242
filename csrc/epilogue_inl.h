// What is done to sums before they are stored: bias, activation, conversion; and the gates of recurrent layers.
#pragma once

#include "quantize_inl.h"

namespace fewbit {
namespace {

// Elementary functions of vectors, which GCC and Clang give the operators of their elements.
using Floats = Simd::F;

inline Floats floats_of(Simd::I v) {
  Floats value;
  std::memcpy(&value, &v, sizeof(v));
  return value;
}
inline Simd::I bits_of(Floats v) {
  Simd::I bits;
  std::memcpy(&bits, &v, sizeof(v));
  return bits;
}
// Horner's scheme, the highest power first.
template <class... C> inline Floats polynomial(Floats x, float first, C... rest) {
  Floats p = Simd::all(first);
  ((p = Simd::fma(p, x, Simd::all(rest))), ...);
  return p;
}
inline Floats magnitude(Floats x) { return x < 0 ? -x : x; }

// exp, to about 1 ulp; coefficients of Cephes' expf. Infinite from 88.4 on, for a sigmoid of 0; never below exp(-87).
inline Floats exp_of(Floats x) {
  const Floats top = Simd::all(89.0f), bottom = Simd::all(-87.0f);
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  const Floats magic = Simd::all(12582912.0f); // x + magic has the nearest integer in its lowest bits
  const Floats rounded = Simd::fma(x, Simd::all(1.44269504088896341f), magic), n = rounded - magic;
  const Floats r = Simd::fma(n, Simd::all(2.12194440e-4f), Simd::fma(n, Simd::all(-0.693359375f), x));
  const Floats p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                              5.0000001201e-1f);
  return (Simd::fma(p, r * r, r) + 1.0f) * floats_of(Simd::power_of_two(bits_of(rounded)));
}

inline Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp_of(-x)); }

// Cephes' tanhf.
inline Floats tanh_of(Floats x) {
  const Floats t = magnitude(x), z = x * x;
  const Floats p = polynomial(z, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                              -3.33332819422e-1f);
  const Floats near = Simd::fma(p, z * x, x);
  const Floats far = 1.0f - 2.0f / (exp_of(t + t) + 1.0f);
  return t < 0.625f ? near : x < 0 ? -far : far;
}

// x P(x^2) / Q(x^2) with an error of 3e-7, the coefficients Eigen's: from 4 on it is 1.
inline Floats erf_of(Floats x) {
  const Floats top = Simd::all(4.0f), bottom = Simd::all(-4.0f);
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  const Floats z = x * x;
  const Floats p = polynomial(z, -2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f,
                              -5.69250639462346e-05f, -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f);
  const Floats q = polynomial(z, -1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f,
                              -7.37332916720468e-03f, -1.42647390514189e-02f);
  return x * p / q;
}

// f of every element of arrays, a vector at a time: y[i] = f(x[i]...).
template <class F, class... X> inline void each_of(int64_t count, const F& f, float* y, const X*... x) {
  constexpr int64_t kStep = sizeof(Floats) / sizeof(float);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) Simd::store(y + i, f(Simd::load(x + i)...));
  if (i < count) {
    const auto part = [&](const float* p) {
      float values[kStep] = {};
      std::memcpy(values, p + i, (count - i) * sizeof(float));
      return Simd::load(values);
    };
    float values[kStep];
    Simd::store(values, f(part(x)...));
    std::memcpy(y + i, values, (count - i) * sizeof(float));
  }
}

// f(activation), an activation being a function of vectors.
template <class F> inline void with(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f([](Floats x) { return x; });
    case Activation::relu: return f([](Floats x) { return x < 0 ? Simd::all(0.0f) : x; });
    case Activation::gelu: return f([](Floats x) { return 0.5f * x * (1.0f + erf_of(x * 0.707106781186547524f)); });
    case Activation::gelu_tanh:
      return f([](Floats x) { return 0.5f * x * (1.0f + tanh_of(0.797884560802865356f * (x + 0.044715f * x * x * x))); });
    case Activation::silu: return f([](Floats x) { return x * sigmoid_of(x); });
  }
}

inline uint16_t to_bf16(float x) { // half to even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline uint16_t to_f16(float x) { // the same
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, bias = (127 - 15) << 23;
  const uint32_t normal = (magnitude - bias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The last bit of 0.5 + x is that of float16's subnormal numbers, for the processor to round to.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t number = magnitude < (127 - 14) << 23 ? small : normal > 0x7c00 ? 0x7c00 : normal;
  return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(x != x ? 0x7e00 : number);
}

inline void store_row(const float* sums, int64_t count, const Output& y, int64_t row, int64_t first) {
  const int64_t place = row * y.stride + first;
  if (y.type == Type::f32) {
    std::memcpy(static_cast<float*>(y.data) + place, sums, count * sizeof(float));
  } else if (y.type == Type::bf16) {
    uint16_t* out = static_cast<uint16_t*>(y.data) + place;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(sums[i]);
  } else {
    uint16_t* out = static_cast<uint16_t*>(y.data) + place;
    for (int64_t i = 0; i < count; ++i) out[i] = to_f16(sums[i]);
  }
}

// `count` sums of output row `row`, from channel `first` on. Changes `sums`.
inline void finish_row(float* sums, int64_t count, const Output& y, int64_t row, int64_t first) {
  if (y.bias)
    for (int64_t i = 0; i < count; ++i) sums[i] += y.bias[first + i];
  if (y.activation != Activation::none)
    with(y.activation, [&](auto activation) { each_of(count, activation, sums, sums); });
  store_row(sums, count, y, row, first);
}

// The same for `rows` rows of `Columns` sums, of which `count` are of channels that exist.
template <int64_t Columns>
inline void finish_rows(float* sums, int64_t rows, int64_t count, const Output& y, int64_t row, int64_t first) {
  if (count < Columns || y.type != Type::f32) {
    for (int64_t r = 0; r < rows; ++r) finish_row(sums + r * Columns, count, y, row + r, first);
    return;
  }
  constexpr int64_t kVectors = Columns * sizeof(float) / sizeof(Floats), kStep = Columns / kVectors;
  Floats bias[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) bias[v] = y.bias ? Simd::load(y.bias + first + v * kStep) : Simd::all(0.0f);
  with(y.activation, [&](auto activation) {
    for (int64_t r = 0; r < rows; ++r) {
      float* out = static_cast<float*>(y.data) + (row + r) * y.stride + first;
      for (int64_t v = 0; v < kVectors; ++v)
        Simd::store(out + v * kStep, activation(Simd::load(sums + r * Columns + v * kStep) + bias[v]));
    }
  });
}

// One step of an LSTM (gates i, f, g, o) and of a GRU (r, z, n) for some hidden units of one sequence, as torch has them.
void lstm(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* h, float* c) {
  const auto gate = [&](int64_t g) { return input + g * hidden + begin; };
  const auto inner = [&](int64_t g) { return recurrent + g * hidden + begin; };
  const auto next = [](Floats i, Floats i_h, Floats f, Floats f_h, Floats g, Floats g_h, Floats before) {
    return sigmoid_of(f + f_h) * before + sigmoid_of(i + i_h) * tanh_of(g + g_h);
  };
  const int64_t count = end - begin;
  const float* before = c + begin;
  each_of(count, next, c + begin, gate(0), inner(0), gate(1), inner(1), gate(2), inner(2), before);
  const auto output = [](Floats o, Floats o_h, Floats cell) { return sigmoid_of(o + o_h) * tanh_of(cell); };
  each_of(count, output, h + begin, gate(3), inner(3), before);
}

void gru(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* h) {
  const auto gate = [&](int64_t g) { return input + g * hidden + begin; };
  const auto inner = [&](int64_t g) { return recurrent + g * hidden + begin; };
  const auto next = [](Floats r, Floats r_h, Floats z, Floats z_h, Floats n, Floats n_h, Floats before) {
    const Floats candidate = tanh_of(n + sigmoid_of(r + r_h) * n_h);
    return candidate + sigmoid_of(z + z_h) * (before - candidate);
  };
  const float* before = h + begin;
  each_of(end - begin, next, h + begin, gate(0), inner(0), gate(1), inner(1), gate(2), inner(2), before);
}

} // namespace
} // namespace fewbit
