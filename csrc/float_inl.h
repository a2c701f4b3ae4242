// Weights back to float: rows of a table, and products with activations that stay float.
#pragma once

#include "multiply_inl.h"

namespace fewbit {
namespace {

constexpr int64_t kFloatColumns = 8;  // output channels that are made float together
constexpr int64_t kFloatDepth = 1024; // columns of them at a time
constexpr int64_t kFloatRows = 64;    // activation rows that use them

// value = (code - zero point) * scale, columns [begin, begin + count) of a row; begin is even.
inline void row_to_float(const Weight& w, int64_t row, int64_t begin, int64_t count, float* out) {
  const uint8_t* bytes = w.codes + row * w.row_bytes;
  for (int64_t k = begin; k < begin + count;) {
    const int64_t g = k / w.group;
    const int64_t stop = (g + 1) * w.group < begin + count ? (g + 1) * w.group : begin + count;
    const float scale = weight_scale(w, row, g);
    const int32_t z = w.zero_point ? zero_point(w, row, g) : 0;
    float* to = out + k - begin;
    if (w.bits == 8) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(bytes) + k;
      for (int64_t i = 0; i < stop - k; ++i) to[i] = static_cast<float>(codes[i] - z) * scale;
    } else {
      const uint8_t* codes = bytes + k / 2;
      const int32_t offset = z + 8;
      int64_t i = 0;
      for (; i + 16 <= stop - k; i += 16) {
        uint8_t nibbles[16];
        Simd::nibbles16(codes + i / 2, nibbles);
        for (int64_t j = 0; j < 16; ++j) to[i + j] = static_cast<float>(nibbles[j] - offset) * scale;
      }
      for (; i < stop - k; ++i) to[i] = static_cast<float>(((codes[i / 2] >> (i % 2 * 4)) & 15) - offset) * scale;
    }
    k = stop;
  }
}

void rows(const Weight& w, const int64_t* indices, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) row_to_float(w, indices[i], 0, w.columns, out + i * w.columns);
}

// sums[r][c] += x[r] . weights[c] over `depth` columns.
template <int R, int C>
inline void float_tile(const float* x, int64_t x_stride, const float* weights, int64_t depth, float* sums) {
  typename Simd::F acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = Simd::all(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    typename Simd::F w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) w[c] = Simd::load(weights + c * kFloatDepth + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Simd::F a = Simd::load(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = Simd::fma(a, w[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float sum = Simd::sum(acc[r][c]);
      for (int64_t i = k; i < depth; ++i) sum += x[r * x_stride + i] * weights[c * kFloatDepth + i];
      sums[r * kFloatColumns + c] += sum;
    }
}

int64_t float_scratch(const Weight&) { return kFloatColumns * kFloatDepth + kFloatRows * kFloatColumns; }

void linear_float(const Weight& w, const float* x, int64_t rows, int64_t begin, int64_t end, float* scratch,
                  const Output& y) {
  float* weights = scratch;
  float* sums = scratch + kFloatColumns * kFloatDepth;
  for (int64_t first = begin; first < end; first += kFloatColumns) {
    const int64_t columns = end - first < kFloatColumns ? end - first : kFloatColumns;
    for (int64_t top = 0; top < rows; top += kFloatRows) {
      const int64_t height = rows - top < kFloatRows ? rows - top : kFloatRows;
      std::memset(sums, 0, height * kFloatColumns * sizeof(float));
      for (int64_t k = 0; k < w.columns; k += kFloatDepth) {
        const int64_t depth = w.columns - k < kFloatDepth ? w.columns - k : kFloatDepth;
        for (int64_t c = 0; c < columns; ++c) row_to_float(w, first + c, k, depth, weights + c * kFloatDepth);
        for (int64_t c = 0; c < columns; c += 4) {
          const float* part = weights + c * kFloatDepth;
          int64_t r = 0;
          for (; r + 3 <= height; r += 3)
            float_tile<3, 4>(x + (top + r) * w.columns + k, w.columns, part, depth, sums + r * kFloatColumns + c);
          for (; r < height; ++r)
            float_tile<1, 4>(x + (top + r) * w.columns + k, w.columns, part, depth, sums + r * kFloatColumns + c);
        }
      }
      for (int64_t r = 0; r < height; ++r) finish_row(sums + r * kFloatColumns, columns, y, top + r, first);
    }
  }
}

} // namespace
} // namespace fewbit
