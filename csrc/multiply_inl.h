// Matrix products with int8 activations. Included once by each instruction set's file, after its `Simd` and the four below.
// All accumulators are exact: no instruction that could saturate is ever given operands that make it.
//
// Simd   vectors of `kBytes` bytes, which hold kLanes int32 or float. `load_part` reads fewer bytes, and sets the rest to 0.
//        `pin` says that a sum is to be ready here, in a register: compilers otherwise regroup long sums, and run out of
//        registers.
// Dot8, Dot4             how products of 8- and 4-bit weights with int8 activations are added up, for stored rows;
// PanelDot8, PanelDot4   the same for packed panels:
//   Acc, Code, X    an accumulator; weight codes and activations made ready
//   kWide           whether an accumulator holds int32 and can go on over blocks; else it holds int16, one block at most
//   kTileRows       rows of activations that are multiplied with a panel together, as many as registers allow
//   kUnit           neighbouring codes of a channel that lie together in a panel
//   add             optional, for panels and wide sums: a loop of its own over columns [begin, end) of R rows; else kUnit is 4
//   kPlanes         1, or 2 where activations are kept as two arrays: magnitudes and masks of signs
//   kOffset         added to signed weight codes: their zero point is that much higher
//   ready(bytes)    codes as loaded (for 4 bits: one to a byte, 0 to 15)
//   row(p, plane)   a vector of activations; four(p, plane) the same four in every lane
//   start(int32)    an accumulator that starts from this in all lanes
//   step(acc, w, x) adds w * x, the products of four bytes to a lane
//   finish(acc)     int32 lanes
//   block_start(codes)      if not kWide: the value for `start` that takes kOffset * sum of a block's activations away
//   lane_starts(low, high)  what takes kOffset * sum of the activations of two vectors away from a vector of sums
#pragma once

#include <utility>

#include "epilogue_inl.h"
#include "quantize_inl.h"

namespace fewbit {
namespace {

constexpr int64_t kLanes = Simd::kBytes / 4;
constexpr int64_t kColumns = kLanes * Simd::kPanelVectors;
constexpr int64_t kRowsAtMost = 4; // that are few: of gemv, and of float activations that meet codes in registers

template <class D, class = void> constexpr bool kAdds = false;
template <class D> constexpr bool kAdds<D, decltype(void(&D::template add<1>))> = true;

inline float weight_scale(const Weight& w, int64_t row, int64_t group) {
  const int64_t i = row * w.scale_stride + (w.scale_stride == 1 ? 0 : group);
  if (w.scale_type == Type::f32) return static_cast<const float*>(w.scale)[i];
  return float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(w.scale)[i]) << 16);
}

// f(0), f(1), ... f(Count - 1), each with a constant.
template <class F, int64_t... I>
__attribute__((always_inline)) inline void call_with(const F& f, std::integer_sequence<int64_t, I...>) {
  (f(std::integral_constant<int64_t, I>()), ...);
}
template <int64_t Count, class F> __attribute__((always_inline)) inline void for_each_of(const F& f) {
  call_with(f, std::make_integer_sequence<int64_t, Count>());
}

inline int32_t zero_point(const Weight& w, int64_t row, int64_t group) {
  return w.zero_point[row * w.scale_stride + (w.scale_stride == 1 ? 0 : group)];
}

// ---- activations

inline int64_t plane_of(const Weight& w) { return round_up(w.columns, kPadding); }

template <class D> constexpr bool starts_by_block() { return !D::kWide; }

// Whether gemv takes groups of kBlock of which a vector has several.
template <int B> constexpr bool kBlocksInVector = Simd::kBytes * 8 / B > kBlock;
template <int B> bool in_blocks(const Weight& w) {
  return kBlocksInVector<B> && w.group == kBlock && !w.zero_point && w.scale_stride > 1;
}

// int32 a row: for panels a start for each group or block, for rows that are read as stored lanes of sums.
template <class D, class P> int64_t starts_of(const Weight& w) {
  const int64_t panel = starts_by_block<P>() ? ceil_div(w.columns, kBlock) : w.groups;
  return panel > plane_of(w) / 4 ? panel : plane_of(w) / 4;
}

int64_t code_bytes(const Weight& w) {
  return plane_of(w) * (w.bits == 8 ? Dot8::kPlanes : Dot4::kPlanes);
}

int64_t starts(const Weight& w) { return w.bits == 8 ? starts_of<Dot8, PanelDot8>(w) : starts_of<Dot4, PanelDot4>(w); }

// The codes of a row are written: split them in planes, and find what sums are to start from.
template <class D, class P, int B>
void finish_codes(const Weight& w, bool gemv, int8_t* codes, int32_t* sums, int32_t* bonus, int32_t* starts) {
  static_assert(D::kPlanes == P::kPlanes);
  const int64_t plane = plane_of(w), blocks = ceil_div(w.columns, kBlock);
  for (int64_t g = 0; g < w.groups; ++g) bonus[g] = 0;
  if constexpr (D::kPlanes == 2) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t begin = g * w.group, end = g + 1 < w.groups ? begin + w.group : plane;
      bonus[g] = Simd::split_signs(codes + begin, codes + plane + begin, end - begin);
    }
  }
  if (gemv) {
    if constexpr (kBlocksInVector<B>) {
      if (!in_blocks<B>(w)) return;
      constexpr int64_t kStep = Simd::kBytes * 8 / B;
      for (int64_t k = 0; k < w.columns; k += kStep) {
        const typename Simd::I low = Simd::load(codes + k), high = B == 4 ? Simd::load(codes + k + Simd::kBytes) : Simd::zero();
        Simd::store(starts + k / kStep * kLanes, D::lane_starts(low, high));
      }
    }
  } else if constexpr (starts_by_block<P>()) {
    for (int64_t b = 0; b < blocks; ++b) starts[b] = w.zero_point ? 0 : P::block_start(codes + b * kBlock);
  } else {
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint32_t taken = w.zero_point || !P::kOffset ? 0 : static_cast<uint32_t>(P::kOffset) * static_cast<uint32_t>(sums[g]);
      starts[g] = static_cast<int32_t>(static_cast<uint32_t>(bonus[g]) - taken); // may wrap around to what fits
    }
  }
}

void quantize(const void* x, Type type, int64_t row, int64_t columns, int64_t input_group, const Weight& w, bool gemv,
              const Quantized& out) {
  int8_t* codes = out.codes + row * out.stride;
  int32_t* sums = out.sums + row * w.groups;
  int32_t* bonus = out.bonus + row * w.groups;
  int32_t* starts = out.starts + row * out.starts_stride;
  const float* in;
  if (type == Type::f32) {
    in = static_cast<const float*>(x) + row * columns;
  } else {
    float* converted = row_scratch(columns);
    convert_to_float(static_cast<const uint16_t*>(x) + row * columns, type, columns, converted);
    in = converted;
  }
  const int64_t half = w.bits == 8 ? 0 : gemv ? Simd::kBytes : kBlock / 2;
  const int32_t offset = w.bits == 8 ? PanelDot8::kOffset : starts_by_block<PanelDot4>() ? 0 : PanelDot4::kOffset;
  const bool summed = gemv || w.zero_point || offset;
  quantize_row<Simd>(in, columns, plane_of(w), input_group, w.group, w.groups, half, codes, out.scale + row * w.groups,
                     summed ? sums : nullptr);
  if (w.bits == 8) {
    finish_codes<Dot8, PanelDot8, 8>(w, gemv, codes, sums, bonus, starts);
  } else {
    finish_codes<Dot4, PanelDot4, 4>(w, gemv, codes, sums, bonus, starts);
  }
}

// ---- many rows: panels of kColumns output channels, packed kUnit codes of a channel after kUnit of the next, with scales
// and zero points after them

struct Panel {
  uint8_t* codes;      // [columns rounded up to kBlock / kUnit][kColumns][kUnit]
  float* scale;        // [groups][kColumns]
  int32_t* zero_point; // [groups][kColumns], with kOffset; only if the weight has zero points
};

inline Panel panel_of(const Weight& w, void* memory) {
  uint8_t* bytes = static_cast<uint8_t*>(memory);
  const int64_t codes = round_up(w.columns, kBlock) * kColumns, scales = w.groups * kColumns;
  return {bytes, reinterpret_cast<float*>(bytes + codes), reinterpret_cast<int32_t*>(bytes + codes + scales * 4)};
}

int64_t panel_bytes(const Weight& w) {
  return round_up(w.columns, kBlock) * kColumns + w.groups * kColumns * (w.zero_point ? 8 : 4);
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
  constexpr int64_t kUnit = D::kUnit, kStep = kColumns * kUnit;
  const int64_t valid = w.rows - first < kColumns ? w.rows - first : kColumns;
  const int64_t whole = w.row_bytes / (kBlock * B / 8) * kBlock; // columns whose blocks can be read directly
  for (int64_t n = 0; n < kColumns; n += Simd::kPackRows) {
    const bool full = n + Simd::kPackRows <= valid;
    for (int64_t k = 0; k < w.columns; k += kBlock) {
      uint8_t* to = out + k * kColumns + n * kUnit;
      if (full && k < whole) {
        Simd::template pack<B>(w.codes + (first + n) * w.row_bytes + k * B / 8, w.row_bytes, to, kStep);
        continue;
      }
      for (int64_t i = 0; i < Simd::kPackRows; ++i) {
        uint8_t codes[kBlock] = {};
        if (n + i < valid) block_codes<B>(w, first + n + i, k, codes);
        for (int64_t s = 0; s < kBlock / kUnit; ++s) std::memcpy(to + s * kStep + i * kUnit, codes + s * kUnit, kUnit);
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
__attribute__((always_inline)) inline void scale_group(const Weight& w, const Panel& panel, const Quantized& in, int64_t row,
                                                       int64_t g, typename Simd::I (&total)[R][Simd::kPanelVectors],
                                                       typename Simd::F (&out)[R][Simd::kPanelVectors]) {
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
      out[r][v] = Simd::fma(Simd::times(Simd::to_float(sum), a), b[v], out[r][v]);
    }
  }
}

// One step of R rows: four activations of each times the codes of kColumns channels.
template <class D, int R>
__attribute__((always_inline)) inline void tile_step(typename D::Acc (&acc)[R][Simd::kPanelVectors], const uint8_t* codes,
                                                     const int8_t* const (&x)[R], int64_t k, int64_t plane) {
  constexpr int V = Simd::kPanelVectors;
  typename D::Code c[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) c[v] = D::ready(Simd::load(codes + v * Simd::kBytes));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const typename D::X four = D::four(x[r] + k, plane);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      acc[r][v] = D::step(acc[r][v], c[v], four);
      Simd::pin(acc[r][v]);
    }
  }
}

// Memory that is needed next, asked for a few lines at a time while there is enough else to do.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;
  int64_t bytes; // a step: a multiple of a line
  __attribute__((always_inline)) inline void step() {
    for (const uint8_t* stop = next + bytes; next < end && next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Sums over columns [begin, end) of group g: total [R][V], exact.
template <class D, int R>
__attribute__((always_inline)) inline void tile_group(const uint8_t* codes, const int8_t* const (&x)[R],
                                                      const int32_t* const (&start)[R], int64_t plane, int64_t g,
                                                      int64_t begin, int64_t end, Ahead& ahead,
                                                      typename Simd::I (&total)[R][Simd::kPanelVectors]) {
  constexpr int V = Simd::kPanelVectors;
  codes += begin * kColumns;
  if constexpr (kAdds<D>) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) total[r][v] = Simd::all(start[r][g]);
    D::template add<R>(codes, x, begin, end, total);
  } else {
    typename D::Acc acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = D::start(start[r][starts_by_block<D>() ? begin / kBlock : g]);
    if constexpr (D::kWide) {
      for (int64_t k = begin; k < end; k += 16, codes += 16 * kColumns) {
        ahead.step();
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) tile_step<D, R>(acc, codes + s * 4 * kColumns, x, k + s * 4, plane);
      }
    } else {
      ahead.step();
#pragma GCC unroll 8
      for (int s = 0; s < kBlock / 4; ++s) tile_step<D, R>(acc, codes + s * 4 * kColumns, x, begin + s * 4, plane);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[r][v] = D::finish(acc[r][v]);
  }
}

// R rows of activations times a panel: out [R][kColumns]. Z: there are zero points. OneBlock: groups are of kBlock.
template <class D, int R, bool Z, bool OneBlock>
void tile(const Weight& w, const Panel& panel, const Quantized& in, int64_t row, Ahead& ahead, float* out) {
  constexpr int V = Simd::kPanelVectors;
  const int8_t* x[R];
  const int32_t* start[R];
  for (int r = 0; r < R; ++r) {
    x[r] = in.codes + (row + r) * in.stride;
    start[r] = in.starts + (row + r) * in.starts_stride;
  }
  typename Simd::F sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = Simd::all(0.0f);
  const int64_t columns = round_up(w.columns, kBlock), plane = plane_of(w);
  for (int64_t g = 0, begin = 0; g < w.groups; ++g) {
    const int64_t end = OneBlock ? begin + kBlock : begin + w.group < columns ? begin + w.group : columns;
    typename Simd::I total[R][V];
    if constexpr (D::kWide || OneBlock) {
      tile_group<D, R>(panel.codes, x, start, plane, g, begin, end, ahead, total);
    } else {
      tile_group<D, R>(panel.codes, x, start, plane, g, begin, begin + kBlock, ahead, total);
      for (int64_t k = begin + kBlock; k < end; k += kBlock) {
        typename Simd::I more[R][V];
        tile_group<D, R>(panel.codes, x, start, plane, g, k, k + kBlock, ahead, more);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) total[r][v] = Simd::add(total[r][v], more[r][v]);
      }
    }
    begin = end;
    scale_group<R, Z>(w, panel, in, row, g, total, sums);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) Simd::store(out + r * kColumns + v * kLanes, sums[r][v]);
}

template <class D, int R>
void rows_of_panel(const Weight& w, int64_t first, const Panel& panel, const Quantized& in, int64_t row, int64_t rows,
                   Ahead& ahead, const Output& y) {
  if constexpr (R > 1) {
    if (rows < R) return rows_of_panel<D, R - 1>(w, first, panel, in, row, rows, ahead, y);
  }
  alignas(64) float out[R * kColumns];
  const int64_t size = y.type == Type::f32 ? 4 : 2;
  for (int r = 0; r < R; ++r) { // where the sums go
    const uint8_t* to = static_cast<const uint8_t*>(y.data) + ((row + r) * y.stride + first) * size;
    for (int64_t i = 0; i < kColumns * size; i += 64) __builtin_prefetch(to + i, 1);
  }
  if (w.zero_point) {
    tile<D, R, true, false>(w, panel, in, row, ahead, out);
  } else if (D::kWide || w.group > kBlock) {
    tile<D, R, false, false>(w, panel, in, row, ahead, out);
  } else {
    tile<D, R, false, true>(w, panel, in, row, ahead, out);
  }
  const int64_t valid = w.rows - first < kColumns ? w.rows - first : kColumns;
  finish_rows<kColumns>(out, R, valid, y, row, first);
}

template <class D>
void multiply_with(const Weight& w, int64_t first, const void* memory, const Quantized& in, int64_t begin, int64_t end,
                   const void* next, int64_t bytes, const Output& y) {
  const Panel panel = panel_of(w, const_cast<void*>(memory));
  const int64_t steps = ceil_div(end - begin, D::kTileRows) * ceil_div(w.columns, D::kWide ? 16 : kBlock);
  const uint8_t* from = static_cast<const uint8_t*>(next);
  Ahead ahead{from, from + bytes, round_up(ceil_div(bytes, steps > 0 ? steps : 1), 64)};
  for (int64_t row = begin; row < end;) {
    // Two tiles of even height rather than a full one and a low one.
    const int64_t left = end - row;
    const int64_t rows = left <= D::kTileRows ? left : left < 2 * D::kTileRows ? (left + 1) / 2 : D::kTileRows;
    rows_of_panel<D, D::kTileRows>(w, first, panel, in, row, rows, ahead, y);
    row += rows;
  }
}

void multiply(const Weight& w, int64_t first, const void* panel, const Quantized& in, int64_t begin, int64_t end,
              const void* next, int64_t bytes, const Output& y) {
  if (w.bits == 8) {
    multiply_with<PanelDot8>(w, first, panel, in, begin, end, next, bytes, y);
  } else {
    multiply_with<PanelDot4>(w, first, panel, in, begin, end, next, bytes, y);
  }
}

} // namespace
} // namespace fewbit
