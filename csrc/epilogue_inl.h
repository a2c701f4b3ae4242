// What is done to sums before they are stored: bias, activation, conversion. And the elementary functions, written as
// plain arithmetic without branches, so that compilers turn the loops into vectors and every CPU gives the same numbers.
#pragma once

#include "quantize_inl.h"

namespace fewbit {
namespace {

// exp, to about 1 ulp; coefficients of Cephes' expf. Saturates instead of overflowing.
inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float rounded = x * 1.44269504088896341f + 12582912.0f; // an integer, in the lowest bits; safe for a NaN, too
  const float n = rounded - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of((bits_of(rounded) + 127) << 23);
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// Cephes' tanhf.
inline float tanh_of(float x) {
  const float t = x < 0 ? -x : x;
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * t) + 1.0f);
  return t < 0.625f ? p : (x < 0 ? -far : far);
}

// erf with an error of about 1e-7: polynomials for the middle and for the logarithm of the tail.
inline float erf_of(float x) {
  const float t = x < 0 ? -x : x;
  const float s = x * x;
  float tail = -1.72853470e-5f * t + 3.83197126e-4f;
  tail = tail * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  tail = tail * t - 1.06777877e-1f;
  tail = tail * t - 6.34846687e-1f;
  tail = tail * t - 1.28717512e-1f;
  tail = 1.0f - exp_of(tail * t - t);
  tail = t > 4.0f ? 1.0f : tail;
  float middle = -5.96761703e-4f;
  middle = middle * s + 4.99119423e-3f;
  middle = middle * s - 2.67681349e-2f;
  middle = middle * s + 1.12819925e-1f;
  middle = middle * s - 3.76125336e-1f;
  middle = middle * s + 1.28379166e-1f;
  middle = middle * x + x;
  return t > 0.927734375f ? (x < 0 ? -tail : tail) : middle;
}

inline void activate(float* y, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::none: break;
    case Activation::relu:
      for (int64_t i = 0; i < count; ++i) y[i] = y[i] < 0 ? 0 : y[i];
      break;
    case Activation::gelu:
      for (int64_t i = 0; i < count; ++i) y[i] = 0.5f * y[i] * (1.0f + erf_of(y[i] * 0.707106781186547524f));
      break;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < count; ++i) {
        const float inner = 0.797884560802865356f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
        y[i] = 0.5f * y[i] * (1.0f + tanh_of(inner));
      }
      break;
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) y[i] = y[i] * sigmoid_of(y[i]);
      break;
  }
}

inline uint16_t to_bf16(float x) { // half to even, NaN stays NaN
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// `count` sums of output row `row`, from channel `first` on. Changes `sums`.
inline void finish_row(float* sums, int64_t count, const Output& y, int64_t row, int64_t first) {
  if (y.bias)
    for (int64_t i = 0; i < count; ++i) sums[i] += y.bias[first + i];
  activate(sums, count, y.activation);
  const int64_t place = row * y.stride + first;
  if (y.type == Type::f32) {
    std::memcpy(static_cast<float*>(y.data) + place, sums, count * sizeof(float));
  } else if (y.type == Type::bf16) {
    uint16_t* out = static_cast<uint16_t*>(y.data) + place;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(sums[i]);
  } else {
    Half* out = static_cast<Half*>(y.data) + place;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Half>(sums[i]);
  }
}

// One step of an LSTM (gates i, f, g, o) and of a GRU (r, z, n) for some hidden units of one sequence, as torch has them.
void lstm(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* __restrict h,
          float* __restrict c) {
  for (int64_t j = begin; j < end; ++j) {
    const float i = sigmoid_of(input[j] + recurrent[j]);
    const float f = sigmoid_of(input[hidden + j] + recurrent[hidden + j]);
    const float g = tanh_of(input[2 * hidden + j] + recurrent[2 * hidden + j]);
    const float o = sigmoid_of(input[3 * hidden + j] + recurrent[3 * hidden + j]);
    const float next = f * c[j] + i * g;
    c[j] = next;
    h[j] = o * tanh_of(next);
  }
}

void gru(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* __restrict h) {
  for (int64_t j = begin; j < end; ++j) {
    const float r = sigmoid_of(input[j] + recurrent[j]);
    const float z = sigmoid_of(input[hidden + j] + recurrent[hidden + j]);
    const float n = tanh_of(input[2 * hidden + j] + r * recurrent[2 * hidden + j]);
    h[j] = n + z * (h[j] - n);
  }
}

} // namespace
} // namespace fewbit
