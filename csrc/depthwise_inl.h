// Depthwise convolutions of codes: one output a channel. Four rows of the image are interleaved byte by byte, so that one
// product of four bytes is that of four rows of the filter. Where the window moves by rows that would else be filled up with
// zeros, the same interleaved rows serve two rows of the output, the second with the filter moved.
//
// Channels go in blocks of four vectors; blocks are narrower at the end. Interleaving leaves a block's channels in the order
// that V::narrow undoes: four from each 128 bits in turn. A packed filter has, for each block, [width][height / 4] times
// four vectors in this order.
#pragma once

#include <type_traits>

#include "conv_inl.h"

namespace fewbit {
namespace {

// Calls f with the vector type of the `index`-th block of `channels`, and the block's first channel; returns their number.
template <class V, class F> int64_t block_of(int64_t channels, int64_t index, const F& f, int64_t first = 0) {
  constexpr int64_t kChannels = V::kBytes;
  if constexpr (std::is_void_v<typename V::Narrower>) {
    if (index >= 0) f(V(), first + index * kChannels);
    return ceil_div(channels, kChannels);
  } else {
    const int64_t whole = channels / kChannels;
    if (index >= 0 && index < whole) {
      f(V(), first + index * kChannels);
      return 0;
    }
    return whole + block_of<typename V::Narrower>(channels % kChannels, index - whole, f, first + whole * kChannels);
  }
}

inline int64_t channel_blocks(int64_t channels) {
  return block_of<Codes>(channels, -1, [](auto, int64_t) {});
}

// Where a block has its `i`-th channel: in which of its four vectors, and in which lane.
inline int64_t vector_of(int64_t i) { return i % 16 / 4; }
inline int64_t lane_of(int64_t i) { return i / 16 * 4 + i % 4; }

inline bool pack_depthwise(const Filter& f, const int8_t* weight, uint8_t* packed) {
  const int64_t groups = ceil_div(f.height, 4), blocks = channel_blocks(f.outputs);
  bool fits = true;
  std::memset(packed, 0, f.packed_bytes() - Filter::kPackHeader);
  for (int64_t index = 0; index < blocks; ++index)
    block_of<Codes>(f.outputs, index, [&](auto v, int64_t first) {
      constexpr int64_t kBytes = decltype(v)::kBytes;
      uint8_t* block = packed + first * f.width * groups * 4;
      for (int64_t i = 0; i < kBytes && first + i < f.outputs; ++i) {
        const int8_t* from = weight + (first + i) * f.height * f.width;
        for (int64_t y = 0; y < f.height; ++y)
          for (int64_t x = 0; x < f.width; ++x) {
            const int64_t vector = (x * groups + y / 4) * 4 + vector_of(i);
            block[vector * kBytes + lane_of(i) * 4 + y % 4] = static_cast<uint8_t>(from[y * f.width + x]);
            // Any neighbours: the filter may be moved.
            fits = fits && (y == 0 || pair_fits(from[(y - 1) * f.width + x], from[y * f.width + x]));
          }
      }
    });
  return fits;
}

// One block of channels of a convolution.
template <class V, class Dot> class Depthwise {
 public:
  static constexpr int kTile = Codes::kTileColumns; // columns of the output computed together, over one or two rows
  static constexpr int64_t kBytes = V::kBytes;

  Depthwise(const Conv& c, int64_t first)
      : c_(c), first_(first), valid_(c.filter.outputs - first < kBytes ? c.filter.outputs - first : kBytes),
        groups_(ceil_div(c.filter.height, 4)), column_bytes_(groups_ * 4 * kBytes), rescaler_(c.result) {
    constexpr int64_t kCached = 20 << 10;
    const Filter& f = c.filter;
    const int64_t window = (f.width - 1) * c.dilation[1];
    two_rows_ = V::kLanes >= 4 && kTile >= 2 && c.dilation[0] == 1 && ceil_div(f.height + c.stride[0], 4) == groups_;
    segment_ = (kCached / column_bytes_ - window - 1) / c.stride[1] + 1;
    if (segment_ > c.out_width) segment_ = c.out_width;
    if (segment_ < kTile) segment_ = kTile;
    const int64_t columns = (segment_ + kTile) * c.stride[1] + window + 1, filter_bytes = f.width * column_bytes_;
    uint8_t* memory = reinterpret_cast<uint8_t*>(row_scratch((9 * kBytes + filter_bytes + columns * column_bytes_) / 4));
    multiplier_ = reinterpret_cast<float*>(memory);
    offset_ = reinterpret_cast<int32_t*>(memory + 4 * kBytes);
    around_ = memory + 8 * kBytes;
    moved_ = memory + 9 * kBytes;
    columns_ = moved_ + filter_bytes;
    filter_ = c.packed + Filter::kPackHeader + first * f.width * groups_ * 4;
    for (int64_t i = 0; i < kBytes; ++i) {
      const int64_t place = vector_of(i) * V::kLanes + lane_of(i);
      multiplier_[place] = i < valid_ ? c.result.multiplier[first + i] : 0;
      offset_[place] = i < valid_ ? c.result.offset[first + i] : 0;
    }
    std::memset(around_, c.zero_point, kBytes);
    if (two_rows_) move_filter();
  }

  // Rows [begin, end) of an image of the output.
  void rows(int64_t image, int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end;) {
      const bool two = two_rows_ && y + 1 < end;
      for (int64_t x = 0; x < c_.out_width; x += segment_) {
        const int64_t count = x + segment_ < c_.out_width ? segment_ : c_.out_width - x;
        interleave(image, y, x, count, two);
        const int64_t pixel = (image * c_.out_height + y) * c_.out_width + x;
        two ? segment<2>(pixel, count) : segment<1>(pixel, count);
      }
      y += two ? 2 : 1;
    }
  }

 private:
  using I = typename V::I;

  // The filter for the second row: later by the stride. Its rows are bytes of words, four a group.
  void move_filter() {
    const int64_t shift = 8 * c_.stride[0];
    for (int64_t x = 0; x < c_.filter.width; ++x)
      for (int64_t g = 0; g < groups_; ++g) {
        const uint8_t* from = filter_ + x * column_bytes_ + g * 4 * kBytes;
        uint8_t* to = moved_ + x * column_bytes_ + g * 4 * kBytes;
        for (int64_t i = 0; i < 4 * kBytes; i += 4) {
          uint32_t word, before = 0;
          std::memcpy(&word, from + i, 4);
          if (g > 0) std::memcpy(&before, from + i - 4 * kBytes, 4);
          word = static_cast<uint32_t>(((uint64_t{word} << 32 | before) << shift) >> 32);
          std::memcpy(to + i, &word, 4);
        }
      }
  }

  // The columns of the image that outputs [x, x + count) of a row need, from row top on.
  void interleave(int64_t image, int64_t out_y, int64_t out_x, int64_t count, bool two) {
    const Filter& f = c_.filter;
    const int64_t top = out_y * c_.stride[0] - c_.padding[0], left = out_x * c_.stride[1] - c_.padding[1];
    const int64_t columns = (count - 1) * c_.stride[1] + (f.width - 1) * c_.dilation[1] + 1;
    const int64_t used = f.height + (two ? c_.stride[0] : 0), channels = f.outputs;
    const auto within = [&](int64_t v) { return v < 0 ? 0 : v > columns ? columns : v; };
    const int64_t begin = within(-left), end = within(c_.width - left) < begin ? begin : within(c_.width - left);
    const I around = V::load(around_);
    for (int64_t g = 0; g < groups_; ++g) {
      const uint8_t* row[4];
      int64_t step[4];
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t y = top + (4 * g + r) * c_.dilation[0];
        const bool inside = 4 * g + r < used && y >= 0 && y < c_.height;
        row[r] = inside ? c_.x + ((image * c_.height + y) * c_.width + left + begin) * channels + first_ : around_;
        step[r] = inside ? channels : 0;
      }
      uint8_t* out = columns_ + g * 4 * kBytes;
      const auto fill = [&](int64_t column) {
        for (int64_t q = 0; q < 4; ++q) V::store(out + column * column_bytes_ + q * kBytes, around);
      };
      for (int64_t column = 0; column < begin; ++column) fill(column);
      const int64_t bytes = begin * column_bytes_;
      valid_ == kBytes ? mix<true>(row, step, end - begin, out + bytes) : mix<false>(row, step, end - begin, out + bytes);
      for (int64_t column = end; column < columns; ++column) fill(column);
    }
  }

  // `count` columns of four rows.
  template <bool Whole> void mix(const uint8_t* (&row)[4], const int64_t (&step)[4], int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i, out += column_bytes_) {
      I rows[4], mixed[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        rows[r] = Whole || step[r] == 0 ? V::load(row[r]) : V::load_part(row[r], valid_);
        row[r] += step[r];
      }
      V::interleave(rows, mixed);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) V::store(out + q * kBytes, mixed[q]);
    }
  }

  template <int R> void segment(int64_t pixel, int64_t count) {
    constexpr int kColumns = kTile / R;
    const int64_t tiles = ceil_div(count, kColumns), least = count / tiles, larger = count % tiles;
    int64_t x = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t columns = least + (i < larger);
      tile_of<R>(columns, std::make_integer_sequence<int, kColumns>(), pixel + x, x);
      x += columns;
    }
  }
  template <int R, int... T> void tile_of(int64_t columns, std::integer_sequence<int, T...>, int64_t pixel, int64_t x) {
    const bool other = c_.result.other;
    (void)((columns == T + 1 && (other ? tile<true, R, T + 1>(pixel, x) : tile<false, R, T + 1>(pixel, x), true)) || ...);
  }

  // Not inlined, for the sake of registers, for which `Other` is apart too.
  template <bool Other, int R, int T> __attribute__((noinline)) void tile(int64_t pixel, int64_t x) {
    I sums[R][T][4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const I offset = V::load(offset_ + q * V::kLanes);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sums[r][t][q] = offset;
    }
    const uint8_t *w = filter_, *moved = moved_;
    const int64_t stride = c_.stride[1] * column_bytes_;
    for (int64_t kx = 0; kx < c_.filter.width; ++kx) {
      const uint8_t* columns = columns_ + x * stride + kx * c_.dilation[1] * column_bytes_;
      for (int64_t g = 0; g < groups_; ++g, columns += 4 * kBytes, w += 4 * kBytes, moved += 4 * kBytes) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          I w0 = V::load(w + q * kBytes), w1 = R == 2 ? V::load(moved + q * kBytes) : w0;
          V::pin(w0); // else compilers read it again for each column
          V::pin(w1);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            const I codes = V::load(columns + t * stride + q * kBytes);
            sums[0][t][q] = Dot::step(sums[0][t][q], codes, w0);
            V::pin(sums[0][t][q]);
            if (R == 1) continue;
            sums[R - 1][t][q] = Dot::step(sums[R - 1][t][q], codes, w1);
            V::pin(sums[R - 1][t][q]);
          }
        }
      }
    }
    if constexpr (Other) {
      put_tile<Put::other>(sums, pixel);
    } else {
      const bool plain = c_.result.codes && c_.result.bounded && valid_ == kBytes;
      plain ? put_tile<Put::plain>(sums, pixel) : put_tile<Put::any>(sums, pixel);
    }
  }

  template <Put Kind, int R, int T>
  __attribute__((always_inline)) void put_tile(const I (&sums)[R][T][4], int64_t pixel) {
    const Rescaler<V> rescaler = rescaler_;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) put<Kind>(sums[r][t], rescaler, pixel + r * c_.out_width + t);
  }

  // Put::plain: of a whole block.
  template <Put Kind>
  __attribute__((always_inline)) void put(const I (&sums)[4], const Rescaler<V>& rescaler, int64_t pixel) {
    const Rescale& to = c_.result;
    const int64_t place = pixel * c_.filter.outputs + first_;
    typename V::F t[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) t[q] = rescaler.scaled(sums[q], V::floats(multiplier_ + q * V::kLanes));
    if (Kind == Put::other) {
      I other[4];
      V::widen(valid_ == kBytes ? V::load(to.other + place) : V::load_part(to.other + place, valid_), other);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) t[q] = rescaler.with_other(t[q], other[q]);
    } else if (Kind == Put::any && !to.codes) {
      put_floats(t, static_cast<float*>(to.out) + place);
      return;
    }
    I rounded[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) rounded[q] = rescaler.template rounded<Kind == Put::plain>(t[q]);
    const I codes = rescaler.codes(rounded);
    uint8_t* out = static_cast<uint8_t*>(to.out) + place;
    Kind == Put::plain || valid_ == kBytes ? V::store(out, codes) : V::store_part(out, codes, valid_);
  }

  void put_floats(const typename V::F (&t)[4], float* out) {
    alignas(64) float values[kBytes];
    for (int q = 0; q < 4; ++q) V::store(values + q * V::kLanes, rescaler_.clamped(t[q]));
    for (int64_t i = 0; i < valid_; ++i) out[i] = values[vector_of(i) * V::kLanes + lane_of(i)];
  }

  const Conv& c_;
  const int64_t first_, valid_, groups_, column_bytes_;
  const Rescaler<V> rescaler_;
  bool two_rows_;
  int64_t segment_;
  float* multiplier_;
  int32_t* offset_;
  uint8_t *around_, *moved_, *columns_;
  const uint8_t* filter_;
};

// Rows of the output that a task computes for one block of channels.
inline int64_t depthwise_rows(const Conv& c, int64_t threads) {
  constexpr int64_t kCached = 256 << 10; // bytes of the image that stay near while block after block reads them
  int64_t rows = kCached / (c.width * c.channels() * c.stride[0]) / 2 * 2;
  const int64_t share = ceil_div(c.out_height, ceil_div(4 * threads, c.batch * channel_blocks(c.channels())));
  if (threads > 1 && share < rows) rows = round_up(share, 2);
  if (rows < 4) rows = 4;
  return rows < c.out_height ? rows : c.out_height;
}

inline int64_t conv_tasks(const Conv& c, int64_t threads) {
  if (!c.filter.depthwise()) return blocks_of(c, threads).tasks(c.filter.groups);
  return c.batch * ceil_div(c.out_height, depthwise_rows(c, threads)) * channel_blocks(c.channels());
}

template <class Dot> void run_conv(const Conv& c, int64_t threads, int64_t begin, int64_t end) {
  if (!c.filter.depthwise()) return multiply_tasks<Dot>(c, threads, begin, end);
  const int64_t blocks = channel_blocks(c.channels()), rows = depthwise_rows(c, threads), parts = ceil_div(c.out_height, rows);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t place = task / blocks, image = place / parts, first_row = place % parts * rows;
    const int64_t last_row = first_row + rows < c.out_height ? first_row + rows : c.out_height;
    block_of<Codes>(c.channels(), task % blocks, [&](auto v, int64_t first) {
      Depthwise<decltype(v), Dot>(c, first).rows(image, first_row, last_row);
    });
  }
}

void conv(const Conv& c, int64_t threads, int64_t begin, int64_t end) {
  PackHeader header;
  std::memcpy(&header, c.packed, sizeof(header));
  header.fits_int16 ? run_conv<CodesPairDot>(c, threads, begin, end) : run_conv<CodesDot>(c, threads, begin, end);
}

void pack_filter(const Filter& f, const int8_t* weight, uint8_t* packed) {
  std::memset(packed, 0, f.packed_bytes());
  uint8_t* to = packed + Filter::kPackHeader;
  const bool fits = f.depthwise() ? pack_depthwise(f, weight, to) : pack_panels(f, weight, to);
  const PackHeader header{kPackMagic, Codes::kLanes, f.depthwise(), fits};
  std::memcpy(packed, &header, sizeof(header));
}

} // namespace
} // namespace fewbit
