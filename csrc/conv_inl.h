// Convolutions of codes as products of matrices: one row of `depth` codes a pixel of the output, in the order (height,
// width, channel) of the window, filled up to a multiple of four. Where the image does not have it like this, windows are
// copied, a block of pixels at a time.
//
// A packed filter has, for each group and kLanes of its outputs (a panel), [depth / 4][kLanes][4] weights. A file that
// includes this has
//   Codes         its vectors: see plain_codes_inl.h, and Codes::kTileRows: pixels that are computed together with 1, 2 ...
//                 panels, so that their sums stay in registers
//   CodesDot      step(acc, x, w): adds the products of four unsigned with four signed bytes to each int32, exactly
//   CodesPairDot  the same where products of neighbours add up within int16: PackHeader::fits_int16
#pragma once

#include <iterator>
#include <utility>

#include "rescale_inl.h"

namespace fewbit {
namespace {

constexpr int kMostPanels = static_cast<int>(std::size(Codes::kTileRows));

// Whether two neighbours' products with codes up to 255 stay within int16.
inline bool pair_fits(int a, int b) {
  const int most = (a > 0 ? a : 0) + (b > 0 ? b : 0), least = (a < 0 ? a : 0) + (b < 0 ? b : 0);
  return most * 255 <= 32767 && least * 255 >= -32768;
}

// Sums of `R` rows of codes, `row_bytes` apart, with `P` panels.
template <class Dot, int R, int P>
__attribute__((always_inline)) inline void add_products(const uint8_t* x, int64_t row_bytes, int64_t steps,
                                                        const uint8_t* panels, int64_t panel_bytes,
                                                        Codes::I (&sums)[R][P]) {
  constexpr int kGroup = 3; // rows reached from one pointer: x86 addresses have a factor of 1, 2 or 4
  const uint8_t* base[(R + kGroup - 1) / kGroup];
#pragma GCC unroll 8
  for (int b = 0; b < (R + kGroup - 1) / kGroup; ++b) base[b] = x + b * kGroup * row_bytes;
  for (int64_t s = 0; s < steps; ++s, panels += Codes::kBytes) {
    Codes::I w[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) w[p] = Codes::load(panels + p * panel_bytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Codes::I codes = Codes::four(base[r / kGroup] + r % kGroup * row_bytes);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums[r][p] = Dot::step(sums[r][p], codes, w[p]);
        Codes::pin(sums[r][p]);
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < (R + kGroup - 1) / kGroup; ++b) {
      base[b] += 4;
      __asm__("" : "+r"(base[b])); // else compilers keep a pointer a row
    }
  }
}

// Results of `R` pixels from `pixel` on, `count` outputs (at most those of P panels) from `output` on.
template <Put Kind, int R, int P>
__attribute__((always_inline)) inline void put_results(Codes::I (&sums)[R][P], const Rescaler<Codes>& rescaler,
                                                       const Rescale& to, const Codes::F (&multiplier)[P], int64_t outputs,
                                                       int64_t pixel, int64_t output, int64_t count) {
  constexpr int kPixels = P == 1 ? 4 : P == 2 ? 2 : 1; // of which the codes fill a vector
  constexpr int kBytes = P * Codes::kLanes;
#pragma GCC unroll 16
  for (int r = 0; r < R; r += kPixels) {
    Codes::I rounded[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int row = r + i / P < R ? r + i / P : r, p = i % P;
      if (i >= kPixels * P || r + i / P >= R) {
        rounded[i] = rounded[0];
        continue;
      }
      const int64_t place = (pixel + row) * outputs + output + p * Codes::kLanes;
      const int64_t left = count - p * Codes::kLanes;
      const Codes::F t = rescaler.scaled(sums[row][p], multiplier[p]);
      if (Kind == Put::other) {
        const uint8_t* from = to.other + place;
        const Codes::I other = left >= Codes::kLanes ? Codes::bytes(from) : Codes::bytes_part(from, left);
        rounded[i] = rescaler.rounded(rescaler.with_other(t, other));
      } else if (Kind == Put::plain || to.codes) {
        rounded[i] = rescaler.template rounded<Kind == Put::plain>(t);
      } else if (left >= Codes::kLanes) {
        Codes::store(static_cast<float*>(to.out) + place, rescaler.clamped(t));
      } else {
        Codes::store_part(static_cast<float*>(to.out) + place, rescaler.clamped(t), left * 4);
      }
    }
    if (Kind == Put::any && !to.codes) continue;
    const Codes::I codes = Codes::ordered(rescaler.codes(rounded));
    uint8_t* out = static_cast<uint8_t*>(to.out) + (pixel + r) * outputs + output;
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i)
      if (r + i < R) Codes::put<kBytes>(out + i * outputs, codes, i, count);
  }
}

// A product of matrices: rows of codes with the packed outputs of one group.
struct Product {
  const uint8_t* x; // that of pixel `first`
  int64_t row_bytes, steps;
  const uint8_t* panels;
  int64_t panel_bytes;
  int64_t outputs, first_output, end_output; // of all groups; those of this one
  int64_t first;                             // pixel
  const Rescale* to;
};

template <class Dot, int R, int P>
void multiply_tile(const Product& a, const Rescaler<Codes>& rescaler, int64_t pixel, int64_t panel) {
  const int64_t output = a.first_output + panel * Codes::kLanes, count = a.end_output - output;
  Codes::F multiplier[P];
  Codes::I sums[R][P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    const int64_t place = output + p * Codes::kLanes, left = count - p * Codes::kLanes;
    const bool whole = left >= Codes::kLanes;
    multiplier[p] = whole ? Codes::floats(a.to->multiplier + place) : Codes::floats_part(a.to->multiplier + place, left);
    const Codes::I offset = whole ? Codes::load(a.to->offset + place) : Codes::load_part(a.to->offset + place, left * 4);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][p] = offset;
  }
  add_products<Dot>(a.x + (pixel - a.first) * a.row_bytes, a.row_bytes, a.steps, a.panels + panel * a.panel_bytes,
                    a.panel_bytes, sums);
  if (a.to->other) {
    put_results<Put::other>(sums, rescaler, *a.to, multiplier, a.outputs, pixel, output, count);
  } else if (a.to->codes && a.to->bounded) {
    put_results<Put::plain>(sums, rescaler, *a.to, multiplier, a.outputs, pixel, output, count);
  } else {
    put_results<Put::any>(sums, rescaler, *a.to, multiplier, a.outputs, pixel, output, count);
  }
}

using Tile = void (*)(const Product&, const Rescaler<Codes>&, int64_t pixel, int64_t panel);

template <class Dot, int P, int... R> Tile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile tiles[] = {multiply_tile<Dot, R + 1, P>...};
  return tiles[rows - 1];
}

template <class Dot, int P> Tile tile_of(int64_t rows) {
  return tile_of<Dot, P>(rows, std::make_integer_sequence<int, Codes::kTileRows[P - 1]>());
}

template <class Dot, int... P> Tile tile_of(int64_t panels, int64_t rows, std::integer_sequence<int, P...>) {
  Tile tile = nullptr;
  (void)((panels == P + 1 && (tile = tile_of<Dot, P + 1>(rows), true)) || ...);
  return tile;
}

template <class Dot> Tile tile_of(int64_t panels, int64_t rows) {
  return tile_of<Dot>(panels, rows, std::make_integer_sequence<int, kMostPanels>());
}

// Pixels [a.first, end) with panels [begin_panel, end_panel). Tiles are of about the same size, since one of a few rows
// costs as much as one of many.
template <class Dot>
void multiply_block(const Product& a, const Rescaler<Codes>& rescaler, int64_t end, int64_t begin_panel, int64_t end_panel) {
  const int64_t rows = end - a.first, panels = end_panel - begin_panel, runs = ceil_div(panels, kMostPanels);
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t panel = begin_panel + panels * run / runs, wide = begin_panel + panels * (run + 1) / runs - panel;
    const int64_t tiles = ceil_div(rows, Codes::kTileRows[wide - 1]), least = rows / tiles, larger = rows % tiles;
    const Tile tile = tile_of<Dot>(wide, least), larger_tile = larger ? tile_of<Dot>(wide, least + 1) : tile;
    int64_t pixel = a.first;
    for (int64_t i = 0; i < tiles; ++i) {
      (i < larger ? larger_tile : tile)(a, rescaler, pixel, panel);
      pixel += least + (i < larger);
    }
  }
}

// `count` bytes; may read and write up to a multiple of `Step` where `safe`.
template <int Step> inline void copy_run(uint8_t* to, const uint8_t* from, int64_t count, bool safe) {
  if (!safe) {
    std::memcpy(to, from, count);
    return;
  }
  for (int64_t i = 0; i < count; i += Step) std::memcpy(to + i, from + i, Step);
}

// The windows of a convolution in one group's channels. What follows one in its row is any codes, whose weights are 0.
template <int Step> class Windows {
 public:
  Windows(const Conv& c, int64_t group)
      : c_(c), f_(c.filter), channels_(c.channels()), line_(c.width * channels_), group_(group * f_.channels),
        run_(f_.width * f_.channels), row_bytes_(round_up(f_.depth(), 4)), last_(c.x + c.batch * c.height * line_ - Step) {}

  void copy(int64_t begin, int64_t end, uint8_t* to) {
    int64_t x = begin % c_.out_width, y = begin / c_.out_width % c_.out_height, n = begin / c_.out_width / c_.out_height;
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t count = end - pixel < c_.out_width - x ? end - pixel : c_.out_width - x;
      row(n, y, x, x + count, to);
      pixel += count;
      to += count * row_bytes_;
      x = 0;
      if (++y == c_.out_height) y = 0, ++n;
    }
  }

 private:
  // Of pixels [begin, end) of a row of the output.
  void row(int64_t n, int64_t y, int64_t begin, int64_t end, uint8_t* to) {
    const uint8_t* image = c_.x + n * c_.height * line_ + group_;
    const int64_t top = y * c_.stride[0] - c_.padding[0], bottom = top + (f_.height - 1) * c_.dilation[0];
    const bool dense = f_.groups == 1 && c_.dilation[1] == 1; // a row of a window lies in one piece
    int64_t x = begin;
    while (x < end) {
      const int64_t left = x * c_.stride[1] - c_.padding[1];
      const uint8_t* from = image + top * line_ + left * channels_;
      const int64_t span = (bottom - top) * line_ + run_;
      if (dense && run_ <= Step && top >= 0 && bottom < c_.height && left >= 0 && left + f_.width <= c_.width &&
          from + span <= last_) {
        int64_t count = (c_.width - f_.width - left) / c_.stride[1] + 1;
        const int64_t step = c_.stride[1] * channels_, safe = (last_ - from - span) / step + 1;
        if (count > end - x) count = end - x;
        if (count > safe) count = safe;
        short_runs(from, step, count, to);
        x += count;
        to += count * row_bytes_;
      } else {
        window(image, top, left, dense, to);
        ++x;
        to += row_bytes_;
      }
    }
  }

  // Windows of which a row is one step, all of them within the image.
  void short_runs(const uint8_t* from, int64_t step, int64_t count, uint8_t* to) {
    const int64_t height = f_.height, run = run_, line = line_ * c_.dilation[0], row_bytes = row_bytes_;
    for (int64_t i = 0; i < count; ++i, from += step, to += row_bytes) {
      const uint8_t* in = from;
      uint8_t* out = to;
      for (int64_t ky = 0; ky < height; ++ky, in += line, out += run) std::memcpy(out, in, Step);
    }
  }

  void window(const uint8_t* image, int64_t top, int64_t left, bool dense, uint8_t* out) {
    const bool inside = left >= 0 && left + (f_.width - 1) * c_.dilation[1] < c_.width;
    for (int64_t ky = 0; ky < f_.height; ++ky) {
      const int64_t y = top + ky * c_.dilation[0];
      if (y < 0 || y >= c_.height) {
        std::memset(out, c_.zero_point, run_);
        out += run_;
      } else if (dense && inside) {
        const uint8_t* from = image + y * line_ + left * channels_;
        copy_run<Step>(out, from, run_, from + run_ <= last_);
        out += run_;
      } else {
        for (int64_t kx = 0; kx < f_.width; ++kx, out += f_.channels) {
          const int64_t x = left + kx * c_.dilation[1];
          if (x < 0 || x >= c_.width) {
            std::memset(out, c_.zero_point, f_.channels);
          } else {
            const uint8_t* from = image + y * line_ + x * channels_;
            copy_run<Step>(out, from, f_.channels, from + f_.channels <= last_);
          }
        }
      }
    }
  }

  const Conv& c_;
  const Filter& f_;
  const int64_t channels_, line_, group_, run_, row_bytes_;
  const uint8_t* last_; // from where a step can still be read
};

constexpr int64_t kMostStep = 64;

inline void copy_windows(const Conv& c, int64_t group, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t run = c.filter.channels * (c.dilation[1] == 1 && c.filter.groups == 1 ? c.filter.width : 1);
  if (run <= 16) {
    Windows<16>(c, group).copy(begin, end, to);
  } else if (run <= 32) {
    Windows<32>(c, group).copy(begin, end, to);
  } else {
    Windows<kMostStep>(c, group).copy(begin, end, to);
  }
}

// How a convolution is cut into tasks: blocks of pixels, times shares of the panels of a group, times groups.
struct Blocks {
  int64_t pixels, count;      // of a block; how many
  int64_t panels, shares;     // of a group
  int64_t tasks(int64_t groups) const { return count * shares * groups; }
};

inline Blocks blocks_of(const Conv& c, int64_t threads) {
  constexpr int64_t kCached = 64 << 10, kLeast = 48, kMost = 96; // bytes of a block's codes, its pixels
  const int64_t pixels = c.pixels(), depth = round_up(c.filter.depth(), 4);
  const int64_t wanted = kCached / depth < kLeast ? kLeast : kCached / depth > kMost ? kMost : kCached / depth;
  Blocks b;
  b.count = ceil_div(pixels, wanted);
  b.panels = ceil_div(c.filter.outputs / c.filter.groups, Codes::kLanes);
  b.shares = 1;
  const int64_t wanted_tasks = 8 * threads; // of which each thread gets about as many
  if (threads > 1 && b.count * c.filter.groups < wanted_tasks) {
    const int64_t most = ceil_div(b.panels, kMostPanels);
    b.shares = ceil_div(wanted_tasks, b.count * c.filter.groups);
    if (b.shares > most) b.shares = most;
  }
  b.pixels = ceil_div(pixels, b.count);
  b.count = ceil_div(pixels, b.pixels);
  return b;
}

template <class Dot> void multiply_tasks(const Conv& c, int64_t threads, int64_t begin, int64_t end) {
  const Filter& f = c.filter;
  const Blocks blocks = blocks_of(c, threads);
  const int64_t depth = round_up(f.depth(), 4), group_outputs = f.outputs / f.groups;
  const int64_t group_bytes = depth * round_up(group_outputs, 16);
  const bool plain = f.height == 1 && f.width == 1 && c.stride[0] == 1 && c.stride[1] == 1 && c.padding[0] == 0 &&
                     c.padding[1] == 0 && f.channels % 4 == 0;
  const Rescaler<Codes> rescaler(c.result);
  uint8_t* windows = plain ? nullptr : reinterpret_cast<uint8_t*>(row_scratch((blocks.pixels * depth + kMostStep) / 4 + 1));
  int64_t copied = -1; // the block and group whose windows are there
  for (int64_t task = begin; task < end; ++task) {
    const int64_t share = task % blocks.shares, place = task / blocks.shares;
    const int64_t group = place % f.groups, first = place / f.groups * blocks.pixels;
    const int64_t last = first + blocks.pixels < c.pixels() ? first + blocks.pixels : c.pixels();
    if (!plain && copied != place) {
      copy_windows(c, group, first, last, windows);
      copied = place;
    }
    const Product product{plain ? c.x + first * c.channels() + group * f.channels : windows,
                          plain ? c.channels() : depth,
                          depth / 4,
                          c.packed + Filter::kPackHeader + group * group_bytes,
                          depth * Codes::kLanes,
                          f.outputs,
                          group * group_outputs,
                          (group + 1) * group_outputs,
                          first,
                          &c.result};
    multiply_block<Dot>(product, rescaler, last, blocks.panels * share / blocks.shares,
                        blocks.panels * (share + 1) / blocks.shares);
  }
}

// [group][panel][depth / 4][kLanes][4]; returns whether neighbours fit int16.
inline bool pack_panels(const Filter& f, const int8_t* weight, uint8_t* packed) {
  constexpr int64_t kLanes = Codes::kLanes;
  const int64_t depth = f.depth(), padded = round_up(depth, 4), group_outputs = f.outputs / f.groups;
  const int64_t group_bytes = padded * round_up(group_outputs, 16), area = f.height * f.width;
  bool fits = true;
  std::vector<int8_t> row(padded); // one output's weights, in the order of the codes
  for (int64_t output = 0; output < f.outputs; ++output) {
    const int8_t* from = weight + output * depth;
    for (int64_t i = 0; i < area; ++i)
      for (int64_t channel = 0; channel < f.channels; ++channel) row[i * f.channels + channel] = from[channel * area + i];
    const int64_t group = output / group_outputs, place = output % group_outputs;
    uint8_t* to = packed + group * group_bytes + place / kLanes * padded * kLanes + place % kLanes * 4;
    for (int64_t k = 0; k < padded; k += 4) {
      fits = fits && pair_fits(row[k], row[k + 1]) && pair_fits(row[k + 2], row[k + 3]);
      std::memcpy(to + k * kLanes, row.data() + k, 4);
    }
  }
  return fits;
}

} // namespace
} // namespace fewbit
