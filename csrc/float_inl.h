// Weights back to float: rows of a table, and products with activations that stay float.
#pragma once

#include "gemv_inl.h"

namespace fewbit {
namespace {

constexpr int64_t kFloatColumns = 8;  // output channels that are made float together
constexpr int64_t kFloatDepth = 512;  // columns of them at a time
constexpr int64_t kFloatStride = kFloatDepth + 16; // so that they do not fight for the same places in the cache
constexpr int64_t kFloatRows = 16;    // activation rows at most: for more, a float GEMM is better

// value = (code - zero point) * scale, columns [begin, begin + count) of a row; begin is a multiple of kBlock.
template <int B> inline void row_to_float(const Weight& w, int64_t row, int64_t begin, int64_t count, float* out) {
  constexpr int64_t kGroups = 32; // whose scales are made ready together
  const uint8_t* bytes = w.codes + row * w.row_bytes;
  const int64_t end = begin + count;
  float scale[kGroups];
  int32_t zero[kGroups] = {};
  for (int64_t g = begin / w.group, k = begin; k < end; g += kGroups) {
    const int64_t groups = w.groups - g < kGroups ? w.groups - g : kGroups;
    for (int64_t i = 0; i < groups; ++i) scale[i] = weight_scale(w, row, g + i);
    if (w.zero_point)
      for (int64_t i = 0; i < groups; ++i) zero[i] = zero_point(w, row, g + i);
    for (int64_t i = 0; i < groups && k < end; ++i) {
      const int64_t stop = (g + i + 1) * w.group < end ? (g + i + 1) * w.group : end;
      for (; k + kBlock <= stop; k += kBlock)
        Simd::template block_to_float<B>(bytes + k * B / 8, zero[i], scale[i], out + k - begin);
      for (; k < stop; ++k) {
        const int32_t code = B == 8 ? static_cast<int8_t>(bytes[k]) : ((bytes[k / 2] >> (k % 2 * 4)) & 15) - 8;
        out[k - begin] = static_cast<float>(code - zero[i]) * scale[i];
      }
    }
  }
}

inline void row_to_float(const Weight& w, int64_t row, int64_t begin, int64_t count, float* out) {
  if (w.bits == 8) {
    row_to_float<8>(w, row, begin, count, out);
  } else {
    row_to_float<4>(w, row, begin, count, out);
  }
}

void rows(const Weight& w, const int64_t* indices, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) row_to_float(w, indices[i], 0, w.columns, out + i * w.columns);
}

// sums[c] += x . weights[c] over `depth` columns.
inline void float_dot(const float* x, const float* weights, int64_t depth, float* sums) {
  typename Simd::F acc[kFloatColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kFloatColumns; ++c) acc[c] = Simd::all(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const typename Simd::F a = Simd::load(x + k);
#pragma GCC unroll 8
    for (int c = 0; c < kFloatColumns; ++c) acc[c] = Simd::fma(a, Simd::load(weights + c * kFloatStride + k), acc[c]);
  }
  for (int c = 0; c < kFloatColumns; ++c) {
    float sum = Simd::sum(acc[c]);
    for (int64_t i = k; i < depth; ++i) sum += x[i] * weights[c * kFloatStride + i];
    sums[c] += sum;
  }
}

// Few rows: the codes meet the activations in registers. 8 bits:
template <int R> void float_row(const Weight& w, int64_t n, const float* x, float (&sums)[R]) {
  const uint8_t* bytes = w.codes + n * w.row_bytes;
  typename Simd::FloatSum total[R];
  for (int r = 0; r < R; ++r) total[r] = Simd::no_products();
  for (int64_t g = 0, k = 0; g < w.groups; ++g) {
    const int64_t end = (g + 1) * w.group < w.columns ? (g + 1) * w.group : w.columns;
    const int32_t z = w.zero_point ? zero_point(w, n, g) : 0;
    typename Simd::FloatSum products[R];
    for (int r = 0; r < R; ++r) products[r] = Simd::no_products();
    for (; k + kBlock <= end; k += kBlock) {
      __builtin_prefetch(bytes + k + kAhead, 0, 2);
      Simd::add_products(products, bytes + k, z, x + k, w.columns);
    }
    if (k < end) { // the end of the row, filled up with zeros
      uint8_t codes[kBlock] = {};
      float rest[R][kBlock] = {};
      std::memcpy(codes, bytes + k, w.row_bytes - k);
      for (int r = 0; r < R; ++r) std::memcpy(rest[r], x + r * w.columns + k, (end - k) * sizeof(float));
      Simd::add_products(products, codes, z, &rest[0][0], kBlock);
      k = end;
    }
    for (int r = 0; r < R; ++r) total[r] = Simd::scaled(products[r], weight_scale(w, n, g), total[r]);
  }
  for (int r = 0; r < R; ++r) sums[r] = Simd::sum_products(total[r]);
}

// 4 bits: of a vector of codes each lane has eight neighbours, so the activations lie as [vectors][8][kLanes], zeros after
// their end.
constexpr int64_t kNibbles = 8 * kLanes; // in a vector

inline void spread_out(const float* x, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += kNibbles)
    for (int64_t i = 0; i < 8; ++i)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t column = k + lane * 8 + i;
        *out++ = column < columns ? x[column] : 0.0f;
      }
}

// Of the groups that kNibbles columns from k on are in, the scale or the zero point, each in its lanes.
template <class Value> inline Floats lanes_of(const Weight& w, int64_t k, const Value& value) {
  if (w.groups == 1 || w.group % kNibbles == 0) return Simd::all(static_cast<float>(value(k / w.group)));
  alignas(64) float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += kBlock / 8) {
    const int64_t column = k + lane * 8 < w.columns ? k + lane * 8 : w.columns - 1; // beyond them activations are 0
    const float v = static_cast<float>(value(column / w.group));
    for (int64_t i = 0; i < kBlock / 8; ++i) lanes[lane + i] = v;
  }
  return Simd::load(lanes);
}

template <int R, bool Z> void nibble_row(const Weight& w, int64_t n, const float* x, int64_t stride, float (&sums)[R]) {
  constexpr int64_t kBlocks = kNibbles / kBlock; // in a vector
  const uint8_t* bytes = w.codes + n * w.row_bytes;
  const bool blocks = w.group == kBlock && w.scale_stride > 1;
  Floats total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = Simd::all(0.0f);
  for (int64_t k = 0; k < w.columns; k += kNibbles, x += 8 * kLanes) {
    __builtin_prefetch(bytes + k / 2 + kAhead, 0, 2);
    const typename Simd::I codes = load_up_to(bytes + k / 2, w.row_bytes - k / 2);
    Floats zero = Simd::all(0.0f);
    if (Z) zero = lanes_of(w, k, [&](int64_t g) { return zero_point(w, n, g); });
    Floats products[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) products[r] = Simd::all(0.0f);
    for_each_of<8>([&](auto i) __attribute__((always_inline)) {
      Floats code = Simd::template nibble<decltype(i)::value>(codes);
      if (Z) code -= zero;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        products[r] = Simd::fma(code, Simd::load(x + r * stride + decltype(i)::value * kLanes), products[r]);
    });
    Floats scale;
    if (blocks) {
      const int64_t g = k / kBlock, place = n * w.groups + g, left = w.groups - g < kLanes ? w.groups - g : kLanes;
      const int64_t ahead = (place + kAhead / (kBlock / 2)) * (w.scale_type == Type::f32 ? 4 : 2);
      __builtin_prefetch(static_cast<const uint8_t*>(w.scale) + ahead, 0, 2);
      scale = Simd::template spread<kBlocks>(scales_of(w, place, left), 0);
    } else {
      scale = lanes_of(w, k, [&](int64_t g) { return weight_scale(w, n, g); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r] = Simd::fma(products[r], scale, total[r]);
  }
  for (int r = 0; r < R; ++r) sums[r] = Simd::sum(total[r]);
}

template <int B, int R>
void float_rows(const Weight& w, const float* x, int64_t rows, int64_t begin, int64_t end, const Output& y) {
  if constexpr (R > 1) {
    if (rows < R) return float_rows<B, R - 1>(w, x, rows, begin, end, y);
  }
  const int64_t stride = round_up(w.columns, kNibbles);
  if (B == 4) {
    float* activations = row_scratch(R * stride);
    for (int r = 0; r < R; ++r) spread_out(x + r * w.columns, w.columns, activations + r * stride);
    x = activations;
  }
  constexpr int64_t kChunk = 64; // output channels that are finished together
  float out[R][kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    for (int64_t i = 0; i < count; ++i) {
      float sums[R];
      if constexpr (B == 8) {
        float_row<R>(w, first + i, x, sums);
      } else if (w.zero_point) {
        nibble_row<R, true>(w, first + i, x, stride, sums);
      } else {
        nibble_row<R, false>(w, first + i, x, stride, sums);
      }
      for (int r = 0; r < R; ++r) out[r][i] = sums[r];
    }
    for (int r = 0; r < R; ++r) finish_row(out[r], count, y, r, first);
  }
}

int64_t float_scratch() { return kFloatColumns * kFloatStride + kFloatRows * kFloatColumns; }

void linear_float(const Weight& w, const float* x, int64_t rows, int64_t begin, int64_t end, float* scratch,
                  const Output& y) {
  if (rows <= kRowsAtMost) {
    return w.bits == 8 ? float_rows<8, kRowsAtMost>(w, x, rows, begin, end, y)
                       : float_rows<4, kRowsAtMost>(w, x, rows, begin, end, y);
  }
  float* weights = scratch;
  float* sums = scratch + kFloatColumns * kFloatStride;
  for (int64_t first = begin; first < end; first += kFloatColumns) {
    const int64_t columns = end - first < kFloatColumns ? end - first : kFloatColumns;
    if (columns < kFloatColumns) std::memset(weights, 0, kFloatColumns * kFloatStride * sizeof(float));
    std::memset(sums, 0, rows * kFloatColumns * sizeof(float));
    for (int64_t k = 0; k < w.columns; k += kFloatDepth) {
      const int64_t depth = w.columns - k < kFloatDepth ? w.columns - k : kFloatDepth;
      for (int64_t c = 0; c < columns; ++c) row_to_float(w, first + c, k, depth, weights + c * kFloatStride);
      for (int64_t r = 0; r < rows; ++r) float_dot(x + r * w.columns + k, weights, depth, sums + r * kFloatColumns);
    }
    for (int64_t r = 0; r < rows; ++r) finish_row(sums + r * kFloatColumns, columns, y, r, first);
  }
}

} // namespace
} // namespace fewbit
