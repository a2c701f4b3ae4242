// Matrix products with int8 activations. Included once by each instruction set's file, after its `Simd`, `Dot8` and
// `Dot4`. All accumulators are exact: no instruction that could saturate is ever given operands that make it.
//
// Simd   vectors of `kBytes` bytes, which hold kLanes int32 or float. `pin` says that a sum is to be ready here, in a
//        register: compilers otherwise regroup long sums, and run out of registers.
// Dot8, Dot4             how products of 8- and 4-bit weights with int8 activations are added up, for stored rows;
// PanelDot8, PanelDot4   the same for packed panels:
//   Acc, Code       an accumulator; weight codes made ready
//   kWide           whether an accumulator holds int32 and can go on over blocks; else it holds int16, one block at most
//   kTileRows       rows of activations that are multiplied with a panel together, as many as registers allow
//   kElement        bytes of a code, of weights and activations, in panels: 1, or 2 where they are widened to int16
//   kOffset         added to signed weight codes: their zero point is that much higher
//   ready(bytes)    codes as loaded (for 4 bits: one to a byte, 0 to 15)
//   start(int32)    an accumulator that starts from one of Input::starts in all lanes
//   step(acc, w, x) adds w * x, the products of four bytes to a lane
//   finish(acc)     int32 lanes
//   start_of(codes) if not kWide: the value for `start` that takes kOffset * sum of a block's activations away
#pragma once

#include "quantize_inl.h"
#include "epilogue_inl.h"

namespace fewbit {
namespace {

constexpr int64_t kLanes = Simd::kBytes / 4;
constexpr int64_t kColumns = kLanes * Simd::kPanelVectors;
constexpr int64_t kRowsAtMost = 4; // of gemv

inline float weight_scale(const Weight& w, int64_t row, int64_t group) {
  const int64_t i = row * w.scale_stride + (w.scale_stride == 1 ? 0 : group);
  if (w.scale_type == Type::f32) return static_cast<const float*>(w.scale)[i];
  return float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(w.scale)[i]) << 16);
}

// Scales of a row, one a group.
inline void weight_scales(const Weight& w, int64_t row, float* out) {
  if (w.scale_stride == 1) {
    const float scale = weight_scale(w, row, 0);
    for (int64_t g = 0; g < w.groups; ++g) out[g] = scale;
  } else if (w.scale_type == Type::f32) {
    const float* scale = static_cast<const float*>(w.scale) + row * w.groups;
    for (int64_t g = 0; g < w.groups; ++g) out[g] = scale[g];
  } else {
    const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + row * w.groups;
    for (int64_t g = 0; g < w.groups; ++g) out[g] = float_of(static_cast<uint32_t>(scale[g]) << 16);
  }
}

inline int32_t zero_point(const Weight& w, int64_t row, int64_t group) {
  return w.zero_point[row * w.scale_stride + (w.scale_stride == 1 ? 0 : group)];
}

template <class D> int64_t starts_of(const Weight& w) { return D::kWide ? w.groups : ceil_div(w.columns, kBlock); }

int64_t starts(const Weight& w) { return w.bits == 8 ? starts_of<PanelDot8>(w) : starts_of<PanelDot4>(w); }

int64_t code_bytes(const Weight& w, bool gemv) { return gemv ? 1 : w.bits == 8 ? PanelDot8::kElement : PanelDot4::kElement; }

// What panels need beyond the codes, for one row; widens the codes if the panel's are wide.
template <class D> void ready_for_panels(const Weight& w, int8_t* codes, const int32_t* sums, int32_t* starts, int64_t count) {
  if constexpr (D::kWide) {
    for (int64_t g = 0; g < w.groups; ++g) starts[g] = w.zero_point ? 0 : -D::kOffset * sums[g];
  } else {
    const int64_t blocks = starts_of<D>(w);
    for (int64_t b = 0; b < blocks; ++b) starts[b] = w.zero_point ? 0 : D::start_of(codes + b * kBlock);
  }
  if (D::kElement == 2) { // from the end, so that nothing is overwritten before it is read
    for (int64_t i = count - kBlock; i >= 0; i -= kBlock) {
      int16_t wide[kBlock];
      for (int64_t j = 0; j < kBlock; ++j) wide[j] = codes[i + j];
      std::memcpy(codes + 2 * i, wide, sizeof(wide));
    }
  }
}

void quantize(const void* x, Type type, int64_t row, int64_t columns, int64_t input_group, const Weight& w, bool gemv,
              const Quantized& out) {
  int8_t* codes = out.codes + row * out.stride;
  float* scale = out.scale + row * w.groups;
  int32_t* sums = out.sums + row * w.groups;
  const int64_t count = round_up(columns, kPadding);
  const float* in;
  if (type == Type::f32) {
    in = static_cast<const float*>(x) + row * columns;
  } else {
    float* converted = row_scratch(columns);
    convert_to_float(static_cast<const uint16_t*>(x) + row * columns, type, columns, converted);
    in = converted;
  }
  quantize_row(in, columns, input_group, w.group, w.groups, codes, count, scale, sums);
  if (w.bits == 4) split_even_odd(codes, count, gemv ? Simd::kBytes : kBlock / 2);
  if (gemv) return;
  int32_t* starts = out.starts + row * out.starts_stride;
  if (w.bits == 8) {
    ready_for_panels<PanelDot8>(w, codes, sums, starts, count);
  } else {
    ready_for_panels<PanelDot4>(w, codes, sums, starts, count);
  }
}

// ---- many rows: panels of kColumns output channels, packed four bytes of a channel after four of the next, with scales and
// zero points after them

struct Panel {
  uint8_t* codes;       // [columns rounded up to kBlock * kElement / 4][kColumns][4 bytes]
  float* scale;         // [groups][kColumns]
  int32_t* zero_point;  // [groups][kColumns], with kOffset; only if the weight has zero points
};

inline Panel panel_of(const Weight& w, void* memory) {
  uint8_t* bytes = static_cast<uint8_t*>(memory);
  const int64_t codes = round_up(w.columns, kBlock) * kColumns * code_bytes(w, false), scales = w.groups * kColumns;
  return {bytes, reinterpret_cast<float*>(bytes + codes), reinterpret_cast<int32_t*>(bytes + codes + scales * 4)};
}

int64_t panel_bytes(const Weight& w) {
  return round_up(w.columns, kBlock) * kColumns * code_bytes(w, false) + w.groups * kColumns * (w.zero_point ? 8 : 4);
}

// Codes [begin, begin + kBlock) of a row, one to a byte, in the order that activations have; zeros beyond the row.
template <int B> inline void block_codes(const Weight& w, int64_t row, int64_t begin, uint8_t* out) {
  constexpr int64_t kWanted = kBlock * B / 8;
  const int64_t offset = begin * B / 8, left = w.row_bytes - offset;
  const uint8_t* bytes = w.codes + row * w.row_bytes + offset;
  uint8_t part[kWanted];
  if (left < kWanted) {
    std::memset(part, 0, kWanted);
    std::memcpy(part, bytes, left);
    bytes = part;
  }
  if (B == 8) {
    std::memcpy(out, bytes, kBlock);
  } else {
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      out[i] = bytes[i] & 15;
      out[i + kBlock / 2] = bytes[i] >> 4;
    }
  }
}

template <class D, int B> void pack_codes(const Weight& w, int64_t first, uint8_t* out) {
  constexpr int64_t kElement = D::kElement, kStep = 4 / kElement;
  const int64_t valid = w.rows - first < kColumns ? w.rows - first : kColumns;
  const int64_t whole = w.row_bytes / (kBlock * B / 8) * kBlock; // columns whose blocks can be read directly
  for (int64_t n = 0; n < kColumns; n += Simd::kPackRows) {
    const bool full = n + Simd::kPackRows <= valid;
    for (int64_t k = 0; k < w.columns; k += kBlock) {
      uint8_t* to = out + k * kElement * kColumns + n * 4;
      if (full && k < whole) {
        Simd::template pack<B, kElement>(w.codes + (first + n) * w.row_bytes + k * B / 8, w.row_bytes, to, kColumns * 4);
        continue;
      }
      for (int64_t i = 0; i < Simd::kPackRows; ++i) {
        uint8_t codes[kBlock] = {};
        if (n + i < valid) block_codes<B>(w, first + n + i, k, codes);
        for (int64_t s = 0; s < kBlock / kStep; ++s) {
          uint8_t* four = to + s * kColumns * 4 + i * 4;
          if (kElement == 1) {
            std::memcpy(four, codes + s * 4, 4);
          } else {
            const int16_t wide[2] = {static_cast<int8_t>(codes[s * 2]), static_cast<int8_t>(codes[s * 2 + 1])};
            std::memcpy(four, wide, 4);
          }
        }
      }
    }
  }
}

void pack(const Weight& w, int64_t first, void* memory) {
  const Panel panel = panel_of(w, memory);
  if (w.bits == 8) {
    pack_codes<PanelDot8, 8>(w, first, panel.codes);
  } else {
    pack_codes<PanelDot4, 4>(w, first, panel.codes);
  }
  const int32_t offset = w.bits == 8 ? PanelDot8::kOffset : PanelDot4::kOffset;
  for (int64_t n = 0; n < kColumns; ++n) {
    const bool valid = first + n < w.rows;
    for (int64_t g = 0; g < w.groups; ++g) {
      panel.scale[g * kColumns + n] = valid ? weight_scale(w, first + n, g) : 0;
      if (w.zero_point) panel.zero_point[g * kColumns + n] = valid ? zero_point(w, first + n, g) + offset : 0;
    }
  }
}

// out[r][n] += (total[r][n] - zero point * sum of activations) * scales, for group g of a panel.
template <int R, bool Z>
inline void scale_group(const Weight& w, const Panel& panel, const Input& in, int64_t row, int64_t g,
                        typename Simd::I (&total)[R][Simd::kPanelVectors], float* out) {
  constexpr int V = Simd::kPanelVectors;
  typename Simd::F b[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) b[v] = Simd::load(panel.scale + g * kColumns + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename Simd::F a = Simd::all(in.scale[(row + r) * w.groups + g]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      typename Simd::I sum = total[r][v];
      if (Z) {
        const typename Simd::I z = Simd::load(panel.zero_point + g * kColumns + v * kLanes);
        sum = Simd::subtract(sum, Simd::multiply(z, Simd::all(in.sums[(row + r) * w.groups + g])));
      }
      float* to = out + r * kColumns + v * kLanes;
      Simd::store(to, Simd::fma(Simd::times(Simd::to_float(sum), a), b[v], Simd::load(to)));
    }
  }
}

// R rows of activations times a panel: out [R][kColumns]. Z: there are zero points. OneBlock: groups are of kBlock.
template <class D, int R, bool Z, bool OneBlock>
void tile(const Weight& w, const Panel& panel, const Input& in, int64_t row, float* out) {
  constexpr int V = Simd::kPanelVectors;
  constexpr int64_t kStep = 4 / D::kElement; // columns in four bytes
  const int8_t* x[R];
  const int32_t* start[R];
  for (int r = 0; r < R; ++r) {
    x[r] = in.codes + (row + r) * in.stride;
    start[r] = in.starts + (row + r) * in.starts_stride;
  }
  for (int i = 0; i < R * kColumns; ++i) out[i] = 0;
  const int64_t columns = round_up(w.columns, kBlock);
  const uint8_t* codes = panel.codes;
  typename D::Acc acc[R][V];
  const auto begin_from = [&](int64_t i) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = D::start(start[r][i]);
  };
  const auto step = [&](int64_t k) {
    typename D::Code c[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c[v] = D::ready(Simd::load(codes + v * Simd::kBytes));
    codes += kColumns * 4;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Simd::I four = Simd::four(x[r] + k * D::kElement);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[r][v] = D::step(acc[r][v], c[v], four);
        Simd::pin(acc[r][v]);
      }
    }
  };
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group, end = begin + w.group < columns ? begin + w.group : columns;
    typename Simd::I total[R][V];
    if constexpr (D::kWide) {
      begin_from(g);
      for (int64_t k = begin; k < end; k += 4 * kStep) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) step(k + s * kStep);
      }
    } else {
      for (int64_t k = begin; k < end; k += kBlock) {
        if (!OneBlock && k > begin) {
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) total[r][v] = k == begin + kBlock ? D::finish(acc[r][v]) : Simd::add(total[r][v], D::finish(acc[r][v]));
        }
        begin_from(k / kBlock);
#pragma GCC unroll 8
        for (int s = 0; s < kBlock / kStep; ++s) step(k + s * kStep);
      }
    }
    const bool more = !D::kWide && !OneBlock && end - begin > kBlock;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        total[r][v] = more ? Simd::add(total[r][v], D::finish(acc[r][v])) : D::finish(acc[r][v]);
    scale_group<R, Z>(w, panel, in, row, g, total, out);
  }
}

template <class D, int R>
void rows_of_panel(const Weight& w, int64_t first, const Panel& panel, const Input& in, int64_t row, int64_t rows,
                   const Output& y) {
  if constexpr (R > 1) {
    if (rows < R) return rows_of_panel<D, R - 1>(w, first, panel, in, row, rows, y);
  }
  alignas(64) float out[R * kColumns];
  if (w.zero_point) {
    tile<D, R, true, false>(w, panel, in, row, out);
  } else if (D::kWide || w.group > kBlock) {
    tile<D, R, false, false>(w, panel, in, row, out);
  } else {
    tile<D, R, false, true>(w, panel, in, row, out);
  }
  const int64_t valid = w.rows - first < kColumns ? w.rows - first : kColumns;
  for (int r = 0; r < R; ++r) finish_row(out + r * kColumns, valid, y, row + r, first);
}

template <class D>
void multiply_with(const Weight& w, int64_t first, const void* memory, const Input& in, int64_t begin, int64_t end,
                   const Output& y) {
  const Panel panel = panel_of(w, const_cast<void*>(memory));
  for (int64_t row = begin; row < end;) {
    // Two tiles of even height rather than a full one and a low one.
    const int64_t left = end - row;
    const int64_t rows = left <= D::kTileRows ? left : left < 2 * D::kTileRows ? (left + 1) / 2 : D::kTileRows;
    rows_of_panel<D, D::kTileRows>(w, first, panel, in, row, rows, y);
    row += rows;
  }
}

void multiply(const Weight& w, int64_t first, const void* panel, const Input& in, int64_t begin, int64_t end,
              const Output& y) {
  if (w.bits == 8) {
    multiply_with<PanelDot8>(w, first, panel, in, begin, end, y);
  } else {
    multiply_with<PanelDot4>(w, first, panel, in, begin, end, y);
  }
}

// ---- few rows: the weight's rows as they are stored, one after the other

// Products of scales, one a block: [R][stride], for blocks [first, first + blocks) of row n.
template <int R>
inline void scales_of_blocks(const Weight& w, const Input& in, int64_t n, int64_t first, int64_t blocks, int64_t per_group,
                             float* out, int64_t stride) {
  float scale[32];
  const int64_t begin = first / per_group, count = (first + blocks - 1) / per_group + 1 - begin;
  const int64_t place = n * w.groups + begin;
  if (w.scale_stride == 1) {
    const float all = weight_scale(w, n, 0);
    for (int64_t g = 0; g < count; ++g) scale[g] = all;
  } else if (w.scale_type == Type::f32) {
    std::memcpy(scale, static_cast<const float*>(w.scale) + place, count * sizeof(float));
  } else {
    convert_to_float(static_cast<const uint16_t*>(w.scale) + place, Type::bf16, count, scale);
  }
  for (int r = 0; r < R; ++r) {
    const float* a = in.scale + r * w.groups + begin;
    float* to = out + r * stride;
    if (per_group == 1) {
      for (int64_t g = 0; g < count; ++g) to[g] = a[g] * scale[g];
    } else {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t g = (first + b) / per_group - begin;
        to[b] = a[g] * scale[g];
      }
    }
  }
}

// -(zero point) * sum of activations, at the first block of each group, 0 at the others.
template <int R, int32_t kOffset>
inline void corrections_of_blocks(const Weight& w, const Input& in, int64_t n, int64_t first, int64_t blocks,
                                  int64_t ready, int64_t per_group, int32_t* out, int64_t stride) {
  for (int r = 0; r < R; ++r) {
    const int32_t* sums = in.sums + r * w.groups;
    int32_t* to = out + r * stride;
    if (per_group == 1 && !w.zero_point) {
      for (int64_t b = 0; b < blocks; ++b) to[b] = -kOffset * sums[first + b];
    } else {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t g = (first + b) / per_group;
        const int32_t z = kOffset + (w.zero_point ? zero_point(w, n, g) : 0);
        to[b] = (first + b) % per_group == 0 ? -z * sums[g] : 0;
      }
    }
    for (int64_t b = blocks; b < ready; ++b) to[b] = 0;
  }
}

// Sums over a row in which all columns share a scale: int32 to the end.
template <class D, int B, int R> void dot_ungrouped(const Weight& w, const Input& in, int64_t n, int32_t* sums) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B; // columns in a vector
  const uint8_t* codes = w.codes + n * w.row_bytes;
  typename Simd::I total[R];
  for (int r = 0; r < R; ++r) total[r] = Simd::zero();
  auto add = [&](typename Simd::I bytes, int64_t k) {
    if constexpr (B == 8) {
      const auto c = Dot8::ready(bytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r] = Dot8::step(total[r], c, Simd::load(in.codes + r * in.stride + k));
    } else {
      const auto low = Dot4::ready(Simd::low(bytes)), high = Dot4::ready(Simd::high(bytes));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t* x = in.codes + r * in.stride + k;
        typename Dot4::Acc acc = Dot4::step(Dot4::none(), low, Simd::load(x));
        acc = Dot4::step(acc, high, Simd::load(x + Simd::kBytes));
        total[r] = Simd::add(total[r], Dot4::finish(acc));
      }
    }
  };
  const int64_t whole = w.row_bytes / Simd::kBytes * Simd::kBytes;
  int64_t k = 0;
  for (int64_t i = 0; i < whole; i += Simd::kBytes, k += kStep) {
    __builtin_prefetch(codes + i + Simd::kPrefetch);
    add(Simd::load(codes + i), k);
  }
  if (whole < w.row_bytes) {
    alignas(64) uint8_t tail[Simd::kBytes] = {};
    std::memcpy(tail, codes + whole, w.row_bytes - whole);
    add(Simd::load(tail), k);
  }
  for (int r = 0; r < R; ++r) sums[r] = Simd::sum(total[r]);
}

// A row in groups: each vector of sums is scaled by the scales of its groups.
template <class D, int B, int R> void dot_grouped(const Weight& w, const Input& in, int64_t n, float* sums) {
  constexpr int64_t kStep = Simd::kBytes * 8 / B;   // columns in a vector
  constexpr int64_t kBlocks = kStep / kBlock;       // blocks in a vector; NEON's 8-bit vectors are half a block
  constexpr int64_t kSpan = 1024;                   // columns whose scales are made ready together
  constexpr int64_t kPerBlock = kBlocks ? 1 : kBlock / kStep;
  constexpr int32_t kOffset = D::kOffset;
  const uint8_t* codes = w.codes + n * w.row_bytes;
  typename Simd::F total[R];
  for (int r = 0; r < R; ++r) total[r] = Simd::all(0.0f);
  float scale[R][kSpan / kBlock];
  int32_t correction[R][kSpan / kBlock];
  const int64_t blocks_of_group = w.group / kBlock;
  for (int64_t begin = 0; begin < w.columns; begin += kSpan) {
    const int64_t blocks = ceil_div(w.columns - begin < kSpan ? w.columns - begin : kSpan, kBlock);
    const int64_t first = begin / kBlock;
    scales_of_blocks<R>(w, in, n, first, blocks, blocks_of_group, &scale[0][0], kSpan / kBlock);
    const int64_t ready = round_up(blocks, kBlocks ? kBlocks : 1);
    for (int r = 0; r < R; ++r)
      for (int64_t b = blocks; b < ready; ++b) scale[r][b] = 0;
    corrections_of_blocks<R, kOffset>(w, in, n, first, blocks, ready, blocks_of_group, &correction[0][0], kSpan / kBlock);
    const int64_t end_byte = begin * B / 8 + kSpan * B / 8 < w.row_bytes ? begin * B / 8 + kSpan * B / 8 : w.row_bytes;
    int64_t block = 0, part = 0;
    for (int64_t i = begin * B / 8, k = begin; i < end_byte; i += Simd::kBytes, k += kStep) {
      typename Simd::I bytes;
      if (i + Simd::kBytes <= w.row_bytes) {
        __builtin_prefetch(codes + i + Simd::kPrefetch);
        bytes = Simd::load(codes + i);
      } else {
        alignas(64) uint8_t tail[Simd::kBytes] = {};
        std::memcpy(tail, codes + i, w.row_bytes - i);
        bytes = Simd::load(tail);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t* x = in.codes + r * in.stride + k;
        typename Simd::I sum;
        if constexpr (B == 8) {
          sum = Dot8::step(Simd::zero(), Dot8::ready(bytes), Simd::load(x));
        } else {
          typename Dot4::Acc acc = Dot4::step(Dot4::none(), Dot4::ready(Simd::low(bytes)), Simd::load(x));
          sum = Dot4::finish(Dot4::step(acc, Dot4::ready(Simd::high(bytes)), Simd::load(x + Simd::kBytes)));
        }
        if (part == 0) sum = Simd::add(sum, Simd::template first_lanes<kStep>(correction[r] + block));
        total[r] = Simd::fma(Simd::to_float(sum), Simd::template spread<kStep>(scale[r] + block), total[r]);
      }
      if (++part == kPerBlock) {
        part = 0;
        block += kBlocks ? kBlocks : 1;
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = Simd::sum(total[r]);
}

template <class D, int B, int R>
void gemv_rows(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& y) {
  constexpr int64_t kChunk = 64; // output channels that are finished together
  float out[R][kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = end - first < kChunk ? end - first : kChunk;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = first + i;
      if (w.groups == 1) {
        int32_t sums[R];
        dot_ungrouped<D, B, R>(w, in, n, sums);
        const uint32_t z = D::kOffset + (w.zero_point ? zero_point(w, n, 0) : 0);
        const float scale = weight_scale(w, n, 0);
        for (int r = 0; r < R; ++r) { // unsigned: sums may wrap around on the way to one that fits
          const uint32_t exact = static_cast<uint32_t>(sums[r]) - z * static_cast<uint32_t>(in.sums[r]);
          out[r][i] = static_cast<float>(static_cast<int32_t>(exact)) * in.scale[r] * scale;
        }
      } else {
        float sums[R];
        dot_grouped<D, B, R>(w, in, n, sums);
        for (int r = 0; r < R; ++r) out[r][i] = sums[r];
      }
    }
    for (int r = 0; r < R; ++r) finish_row(out[r], count, y, r, first);
  }
}

template <class D, int B, int R>
void gemv_with(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& y) {
  if constexpr (R > 1) {
    if (in.rows < R) return gemv_with<D, B, R - 1>(w, in, begin, end, y);
  }
  gemv_rows<D, B, R>(w, in, begin, end, y);
}

void gemv(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& y) {
  if (w.bits == 8) {
    gemv_with<Dot8, 8, kRowsAtMost>(w, in, begin, end, y);
  } else {
    gemv_with<Dot4, 4, kRowsAtMost>(w, in, begin, end, y);
  }
}

} // namespace
} // namespace fewbit
