// Products with few rows of activations: the weight's rows as they are stored, one after the other, each read once.
#pragma once

#include "multiply_inl.h"

namespace fewbit {
namespace {

// Sums of products of a vector of codes with the activations from column k on, added to `total`.
template <class D, int B>
__attribute__((always_inline)) inline typename Simd::I products(typename Simd::I total, typename Simd::I bytes, const int8_t* x,
                                                                int64_t plane) {
  if constexpr (B == 8) {
    return D::step(total, D::ready(bytes), D::row(x, plane));
  } else if constexpr (D::kWide) {
    total = D::step(total, D::ready(Simd::low(bytes)), D::row(x, plane));
    return D::step(total, D::ready(Simd::high(bytes)), D::row(x + Simd::kBytes, plane));
  } else {
    typename D::Acc acc = D::step(D::start(0), D::ready(Simd::low(bytes)), D::row(x, plane));
    acc = D::step(acc, D::ready(Simd::high(bytes)), D::row(x + Simd::kBytes, plane));
    return Simd::add(total, D::finish(acc));
  }
}

inline typename Simd::I load_up_to(const uint8_t* p, int64_t bytes) {
  return bytes >= Simd::kBytes ? Simd::load(p) : Simd::load_part(p, bytes);
}

// How far ahead of a byte of N rows the memory is asked for: at the same place of the next N rows, or farther.
constexpr int64_t kAhead = 16384;
template <int N> inline int64_t ahead_of(const Weight& w) { return N * w.row_bytes < kAhead ? kAhead : N * w.row_bytes; }

// Rows [n, n + N) of the weight, columns [begin, end): whole vectors, or up to the end of the row.
template <class D, int B, int R, int N>
__attribute__((always_inline)) inline void sum_run(const Weight& w, const Quantized& in, int64_t n, int64_t begin, int64_t end,
                                                   typename Simd::I (&total)[N][R]) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B; // columns in a vector
  const uint8_t* codes = w.codes + n * w.row_bytes;
  const int64_t plane = plane_of(w);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[i][r] = Simd::zero();
  const auto add = [&](const typename Simd::I(&bytes)[N], int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) total[i][r] = products<D, B>(total[i][r], bytes[i], in.codes + r * in.stride + k, plane);
  };
  const int64_t ahead = ahead_of<N>(w);
  int64_t k = begin;
  for (; k + kStep <= end; k += kStep) {
    typename Simd::I bytes[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const uint8_t* p = codes + i * w.row_bytes + k * B / 8;
      __builtin_prefetch(p + ahead, 0, 2);
      bytes[i] = Simd::load(p);
    }
    add(bytes, k);
  }
  if (k < end) {
    typename Simd::I bytes[N];
    for (int i = 0; i < N; ++i) {
      const uint8_t* p = codes + i * w.row_bytes + k * B / 8;
      __builtin_prefetch(p + ahead, 0, 2);
      bytes[i] = load_up_to(p, w.row_bytes - k * B / 8);
    }
    add(bytes, k);
  }
}

// What is still to be added to the sum over group g.
template <class D> inline int32_t correction(const Weight& w, const Quantized& in, int64_t n, int64_t r, int64_t g) {
  const uint32_t z = D::kOffset + (w.zero_point ? zero_point(w, n, g) : 0); // unsigned: may wrap around to what fits
  return static_cast<int32_t>(in.bonus[r * w.groups + g] - z * static_cast<uint32_t>(in.sums[r * w.groups + g]));
}

// One scale a row.
template <class D, int B, int R, int N> void dot_ungrouped(const Weight& w, const Quantized& in, int64_t n, float (&sums)[N][R]) {
  typename Simd::I total[N][R];
  sum_run<D, B, R, N>(w, in, n, 0, w.columns, total);
  for (int i = 0; i < N; ++i) {
    const float scale = weight_scale(w, n + i, 0);
    for (int r = 0; r < R; ++r) {
      const uint32_t exact = static_cast<uint32_t>(Simd::sum(total[i][r])) +
                             static_cast<uint32_t>(correction<D>(w, in, n + i, r, 0));
      sums[i][r] = static_cast<float>(static_cast<int32_t>(exact)) * in.scale[r] * scale;
    }
  }
}

// Groups of whole vectors: int32 to the end of each.
template <class D, int B, int R, int N>
void dot_long_groups(const Weight& w, const Quantized& in, int64_t n, float (&sums)[N][R]) {
  typename Simd::F total[N][R];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[i][r] = Simd::all(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group, end = begin + w.group < w.columns ? begin + w.group : w.columns;
    typename Simd::I sum[N][R];
    sum_run<D, B, R, N>(w, in, n, begin, end, sum);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const float scale = weight_scale(w, n + i, g);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const typename Simd::I exact = Simd::add(sum[i][r], Simd::first_lane(correction<D>(w, in, n + i, r, g)));
        total[i][r] = Simd::fma(Simd::to_float(exact), Simd::all(in.scale[r * w.groups + g] * scale), total[i][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[i][r] = Simd::sum(total[i][r]);
}

// The scales of `count` groups from `place` on, at most a vector of them; zeros after them.
inline typename Simd::F scales_of(const Weight& w, int64_t place, int64_t count) {
  if (w.scale_type == Type::f32)
    return floats_of(load_up_to(static_cast<const uint8_t*>(w.scale) + place * 4, count * 4));
  const uint16_t* from = static_cast<const uint16_t*>(w.scale) + place;
  return count >= kLanes ? Simd::load_bf16(from) : Simd::load_bf16(from, count);
}

// Groups of kBlock, several in a vector: a run of kLanes of them at a time, whose scales fill a vector.
template <class D, int B, int R, int N>
void dot_blocks(const Weight& w, const Quantized& in, int64_t n, float (&sums)[N][R]) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B; // columns in a vector
  constexpr int64_t kRun = kLanes * kBlock;
  const uint8_t* codes = w.codes + n * w.row_bytes;
  const int64_t plane = plane_of(w);
  const bool wide = w.scale_type == Type::f32;
  typename Simd::F total[N][R];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[i][r] = Simd::all(0.0f);
  const auto add = [&](int64_t k, int64_t block, const typename Simd::I(&bytes)[N], const typename Simd::F(&scale)[N][R])
                       __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename Simd::I start = Simd::load(in.starts + r * in.starts_stride + k / kStep * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const typename Simd::I sum = products<D, B>(start, bytes[i], in.codes + r * in.stride + k, plane);
        const typename Simd::F s = Simd::template spread<kStep / kBlock>(scale[i][r], block);
        total[i][r] = Simd::fma(Simd::to_float(sum), s, total[i][r]);
      }
    }
  };
  const int64_t ahead = ahead_of<N>(w);
  int64_t begin = 0, g = 0;
  for (; g + kLanes <= w.groups && begin + kRun <= w.columns; begin += kRun, g += kLanes) {
    typename Simd::F scale[N][R];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const int64_t place = (n + i) * w.groups + g;
      __builtin_prefetch(static_cast<const uint8_t*>(w.scale) + (place + ahead * 8 / (B * kBlock)) * (wide ? 4 : 2), 0, 2);
      const typename Simd::F b = scales_of(w, place, kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) scale[i][r] = Simd::times(b, Simd::load(in.scale + r * w.groups + g));
    }
    for_each_of<kRun / kStep>([&](auto v) __attribute__((always_inline)) {
      const int64_t k = begin + decltype(v)::value * kStep;
      typename Simd::I bytes[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const uint8_t* p = codes + i * w.row_bytes + k * B / 8;
        __builtin_prefetch(p + ahead, 0, 2);
        bytes[i] = Simd::load(p);
      }
      add(k, decltype(v)::value * (kStep / kBlock), bytes, scale);
    });
  }
  if (begin < w.columns) { // the rest, in which a vector is not full of scales
    const int64_t rest = w.groups - g;
    typename Simd::F scale[N][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(in.scale + r * w.groups + g);
      const typename Simd::F a = floats_of(load_up_to(from, rest * 4));
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) scale[i][r] = Simd::times(scales_of(w, (n + i) * w.groups + g, rest), a);
    }
    for (int64_t k = begin, block = 0; k < w.columns; k += kStep, block += kStep / kBlock) {
      typename Simd::I bytes[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const uint8_t* p = codes + i * w.row_bytes + k * B / 8;
        __builtin_prefetch(p + ahead, 0, 2);
        bytes[i] = load_up_to(p, w.row_bytes - k * B / 8);
      }
      add(k, block, bytes, scale);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[i][r] = Simd::sum(total[i][r]);
}

// Any groups: a vector of sums is taken apart into its blocks.
template <class D, int B, int R> void dot_any_groups(const Weight& w, const Quantized& in, int64_t n, float (&sums)[R]) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B;
  constexpr int64_t kLanesOfBlock = kLanes * kBlock / kStep;
  const uint8_t* codes = w.codes + n * w.row_bytes;
  const int64_t plane = plane_of(w), per_group = w.group / kBlock, ahead = ahead_of<1>(w);
  for (int r = 0; r < R; ++r) sums[r] = 0;
  uint32_t sum[R] = {}; // of the group so far; may wrap around to what fits
  int64_t g = 0, left = per_group;
  const auto finish = [&] {
    const float scale = weight_scale(w, n, g);
    for (int r = 0; r < R; ++r) {
      const uint32_t exact = sum[r] + static_cast<uint32_t>(correction<D>(w, in, n, r, g));
      sums[r] += static_cast<float>(static_cast<int32_t>(exact)) * (in.scale[r * w.groups + g] * scale);
      sum[r] = 0;
    }
    ++g;
    left = per_group;
  };
  for (int64_t k = 0; k < w.columns; k += kStep) {
    __builtin_prefetch(codes + k * B / 8 + ahead, 0, 2);
    const typename Simd::I bytes = load_up_to(codes + k * B / 8, w.row_bytes - k * B / 8);
    alignas(64) int32_t lanes[R][kLanes];
    for (int r = 0; r < R; ++r)
      Simd::store(lanes[r], products<D, B>(Simd::zero(), bytes, in.codes + r * in.stride + k, plane));
    for (int64_t lane = 0; lane < kLanes && k + lane * (kStep / kLanes) < w.columns; lane += kLanesOfBlock) {
      for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < kLanesOfBlock; ++i) sum[r] += static_cast<uint32_t>(lanes[r][lane + i]);
      if (--left == 0) finish();
    }
  }
  if (g < w.groups) finish();
}

// N output channels from n on.
template <class D, int B, int R, int N>
inline void dot(const Weight& w, const Quantized& in, int64_t n, float (&sums)[N][R]) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B;
  if (w.groups == 1) {
    dot_ungrouped<D, B, R, N>(w, in, n, sums);
  } else if (!kBlocksInVector<B> || w.group % kStep == 0) {
    dot_long_groups<D, B, R, N>(w, in, n, sums);
  } else if constexpr (kBlocksInVector<B>) {
    if (in_blocks<B>(w)) {
      dot_blocks<D, B, R, N>(w, in, n, sums);
    } else {
      for (int i = 0; i < N; ++i) dot_any_groups<D, B, R>(w, in, n + i, sums[i]);
    }
  }
}

template <class D, int B, int R>
void gemv_rows(const Weight& w, const Quantized& in, int64_t begin, int64_t end, const Output& y) {
  constexpr int64_t kChunk = 64;                       // output channels that are finished together
  constexpr int N = R == 1 ? 4 : R == 2 ? 2 : 1;       // that are read together
  float out[R][kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    int64_t i = 0;
    for (; i + N <= count; i += N) {
      float sums[N][R];
      dot<D, B, R, N>(w, in, first + i, sums);
      for (int j = 0; j < N; ++j)
        for (int r = 0; r < R; ++r) out[r][i + j] = sums[j][r];
    }
    for (; i < count; ++i) {
      float sums[1][R];
      dot<D, B, R, 1>(w, in, first + i, sums);
      for (int r = 0; r < R; ++r) out[r][i] = sums[0][r];
    }
    for (int r = 0; r < R; ++r) finish_row(out[r], count, y, r, first);
  }
}

template <class D, int B, int R>
void gemv_with(const Weight& w, const Quantized& in, int64_t begin, int64_t end, const Output& y) {
  if constexpr (R > 1) {
    if (in.rows < R) return gemv_with<D, B, R - 1>(w, in, begin, end, y);
  }
  gemv_rows<D, B, R>(w, in, begin, end, y);
}

void gemv(const Weight& w, const Quantized& in, int64_t begin, int64_t end, const Output& y) {
  if (w.bits == 8) {
    gemv_with<Dot8, 8, kRowsAtMost>(w, in, begin, end, y);
  } else {
    gemv_with<Dot4, 4, kRowsAtMost>(w, in, begin, end, y);
  }
}

} // namespace
} // namespace fewbit
