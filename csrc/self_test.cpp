// Whether an instruction set's kernels compute what the portable ones do, on the operands that come nearest to overflow.
#include <vector>

#include "kernels.h"

namespace fewbit {

namespace {

// All products of a problem whose scales are small integers, so that every output is an exact one.
std::vector<float> outputs(const Kernels& k, const Weight& w, int64_t input_group, const std::vector<float>& x, int64_t rows) {
  const int64_t stride = k.code_bytes(w), starts = k.starts(w);
  std::vector<int8_t> codes(rows * stride);
  std::vector<float> scale(rows * w.groups), y(rows * w.rows);
  std::vector<int32_t> sums(rows * w.groups), bonus(rows * w.groups), start(rows * starts);
  const Quantized q{codes.data(), stride, scale.data(), sums.data(), bonus.data(), start.data(), starts, rows};
  const bool gemv = rows <= k.gemv_rows;
  for (int64_t row = 0; row < rows; ++row) k.quantize(x.data(), Type::f32, row, w.columns, input_group, w, gemv, q);
  const Output out{y.data(), w.rows, Type::f32, nullptr, Activation::none};
  if (gemv) {
    k.gemv(w, q, 0, w.rows, out);
    return y;
  }
  std::vector<uint8_t> memory(k.panel_bytes(w) + 64);
  void* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  for (int64_t first = 0; first < w.rows; first += k.panel_columns) {
    k.pack(w, first, panel);
    k.multiply(w, first, panel, q, 0, rows, nullptr, 0, out);
  }
  return y;
}

// A convolution of 3 x 5 codes, all 255: sums as float32, then codes, then codes of sums with those.
std::vector<float> outputs(const Kernels& k, const Filter& f, const std::vector<int8_t>& weight) {
  std::vector<uint8_t> packed(f.packed_bytes()), x(15 * f.channels * f.groups, 255), codes(15 * f.outputs), added(codes);
  std::vector<float> multiplier(f.outputs, 1.0f), y(codes.size());
  const std::vector<int32_t> offset(f.outputs, -7);
  k.pack_filter(f, weight.data(), packed.data());
  Conv c{f, packed.data(), x.data(), 1, 3, 5, 3, 5, {1, 1}, {1, 1}, {1, 1}, 255, {}};
  c.result = {multiplier.data(), offset.data(), -3e9f, 3e9f, false, false, 0, y.data()};
  k.conv(c, 1, 0, k.conv_tasks(c, 1));
  multiplier.assign(f.outputs, 1 / 4096.0f);
  c.result = {multiplier.data(), offset.data(), 3, 250, true, true, 100, codes.data()};
  k.conv(c, 1, 0, k.conv_tasks(c, 1));
  c.result = {multiplier.data(), offset.data(), 3, 250, true, true, 100, added.data(), codes.data(), -0.7f, 120};
  k.conv(c, 1, 0, k.conv_tasks(c, 1));
  y.insert(y.end(), codes.begin(), codes.end());
  y.insert(y.end(), added.begin(), added.end());
  return y;
}

bool convolutions_agree(const Kernels& kernels, const Kernels& reference) {
  // Whole vectors and parts of them, of any instruction set; dense and depthwise. Sums are exact in float32.
  for (const Filter& f : {Filter{70, 12, 3, 3, 1}, Filter{70, 1, 3, 3, 70}}) {
    static_assert(255 * 128 * 12 * 9 < 1 << 24);
    // Outputs of the largest, of the smallest and of alternating weights; and with the largest pairs that fit int16.
    const int kinds[2][4][2] = {{{127, 127}, {-128, -128}, {127, -128}, {-77, 101}},
                                {{64, 64}, {-64, -64}, {127, 1}, {-128, 127}}};
    for (const auto& kind : kinds) {
      std::vector<int8_t> weight(f.outputs * f.depth());
      const int64_t area = f.height * f.width;
      for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
        // Neighbours are channels of a dense filter and rows of a depthwise one.
        const int64_t output = i / f.depth(), place = f.channels > 1 ? i % f.depth() / area : i % area / f.width;
        weight[i] = static_cast<int8_t>(kind[output % 4][place % 2]);
      }
      if (outputs(kernels, f, weight) != outputs(reference, f, weight)) return false;
    }
  }
  return true;
}

} // namespace

bool agree(const Kernels& kernels, const Kernels& reference) {
  if (!convolutions_agree(kernels, reference)) return false;
  // 17 groups: more than the scales of any vector. Float32 has sums exactly, those of 4 bits also if they are scaled and
  // what raises codes is added and taken away again.
  constexpr int64_t kRows = 36, kColumns = 516, kGroup = 32, kScales = 8;
  static_assert(255 * 127 * kColumns < 1 << 24 && 2 * 15 * 127 * kColumns * kScales < 1 << 24);
  for (const int bits : {8, 4}) {
    Weight w;
    w.rows = kRows;
    w.columns = kColumns;
    w.bits = bits;
    w.row_bytes = bits == 8 ? kColumns : ceil_div(kColumns, 8) * 4;
    // Rows of the largest, of the smallest and of alternating codes, and of all kinds of them.
    std::vector<uint8_t> codes(kRows * w.row_bytes);
    for (int64_t n = 0; n < kRows; ++n)
      for (int64_t i = 0; i < w.row_bytes; ++i) {
        const uint8_t high = bits == 8 ? 127 : 255, low = bits == 8 ? 128 : 0;
        const uint8_t kinds[] = {high, low, i % 2 ? high : low, static_cast<uint8_t>(i * 37 + n * 11)};
        codes[n * w.row_bytes + i] = kinds[n % 4];
      }
    w.codes = codes.data();
    std::vector<float> scale(kRows * ceil_div(kColumns, kGroup), 1.0f);
    if (bits == 4)
      for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(1 + i * 3 % kScales);
    std::vector<int8_t> zeros(scale.size(), bits == 8 ? -128 : 7);
    w.scale = scale.data();
    w.scale_type = Type::f32;
    for (const int64_t group : {int64_t{0}, kGroup})
      for (const bool symmetric : {true, false})
        for (const int64_t rows : {int64_t{1}, int64_t{3}, int64_t{9}}) {
          w.group = group ? group : round_up(kColumns, kBlock);
          w.groups = ceil_div(kColumns, w.group);
          w.scale_stride = w.groups;
          w.zero_point = symmetric ? nullptr : zeros.data();
          std::vector<float> x(rows * kColumns);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < kColumns; ++k) {
              const float kinds[] = {127.0f, -127.0f, k % 2 ? 127.0f : -127.0f};
              x[r * kColumns + k] = k % 32 == 31 ? 127.0f : kinds[r % 3]; // the scale of every group of x is 1
            }
          if (outputs(kernels, w, group, x, rows) != outputs(reference, w, group, x, rows)) return false;
        }
  }
  return true;
}

} // namespace fewbit
