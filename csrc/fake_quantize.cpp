// Rounding to a grid and its gradient, one pass over memory each: what training does between float operations.
//
// Plain loops that compilers vectorize. The results are the same on every instruction set: each element is a few float32
// operations, and sums have their own order, which depends neither on the width of vectors nor on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "tensors.h"

namespace fewbit {

namespace {

constexpr int64_t kPiece = 2048; // elements that are worked on at once
constexpr int kLanes = 16;       // of sums
constexpr float kRounder = 12582912.0f; // 1.5 * 2^23: adding it leaves no fraction bits, to even

// One block's grid: elements are first divided, then clamped to integers, so that rounding needs no clamp.
struct Grid {
  float scale, divisor, low, high; // low and high: the ends of the codes, less the zero point
};

FEWBIT_INLINE float rounded(float x, const Grid& g) {
  float v = x / g.divisor;
  v = v == v ? v : 0.0f;
  v = std::min(std::max(v, g.low), g.high);
  return ((v + kRounder) - kRounder) * g.scale;
}

FEWBIT_VERSIONS void round_piece(const float* __restrict x, float* __restrict y, int64_t count, const Grid& grid) {
  const Grid g = grid;
  for (int64_t i = 0; i < count; ++i) y[i] = rounded(x[i], g);
}

// The sum of a piece, in kLanes sums that are added at the end.
FEWBIT_INLINE double sum(const float* x, int64_t count) {
  float lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += x[i];
  double total = 0;
  for (const float lane : lanes) total += lane;
  return total;
}

template <bool given>
FEWBIT_INLINE void gradient_loop(const float* __restrict gradient, const float* __restrict x, const float* __restrict y,
                                 float* __restrict to, int64_t count, const Grid& grid, double* sums) {
  const Grid g = grid;
  const float low = g.low * g.scale, high = g.high * g.scale;
  float scale[kPiece], beyond[kPiece];
  for (int64_t i = 0; i < count; ++i) {
    const float value = given ? y[i] : rounded(x[i], g);
    const bool inside = (x[i] >= low) & (x[i] <= high);
    const float passed = inside ? gradient[i] : 0.0f;
    to[i] = passed;
    scale[i] = gradient[i] * (value - (inside ? x[i] : 0.0f));
    beyond[i] = gradient[i] - passed;
  }
  sums[0] = sum(scale, count);
  sums[1] = sum(beyond, count);
}

FEWBIT_VERSIONS void gradient_piece(const float* gradient, const float* x, float* to, int64_t count, const Grid& grid,
                                    double* sums) {
  gradient_loop<false>(gradient, x, nullptr, to, count, grid, sums);
}

FEWBIT_VERSIONS void gradient_piece_of(const float* gradient, const float* x, const float* y, float* to, int64_t count,
                                       const Grid& grid, double* sums) {
  gradient_loop<true>(gradient, x, y, to, count, grid, sums);
}

const float* floats(const Tensor& x, int64_t count, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, "fewbit: ", what,
                  " must be contiguous float32 of ", count, " elements, found ", described(x), ".");
  return static_cast<const float*>(x.const_data_ptr());
}

std::vector<int64_t> shape_of(const Tensor& x) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  return shape;
}

// A tensor's blocks, one scale each and of one size, cut into pieces.
class Blocks {
 public:
  Blocks(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, double low, double high)
      : count_(scale.numel()), low_(static_cast<float>(low)), high_(static_cast<float>(high)) {
    STD_TORCH_CHECK(count_ > 0 && x.numel() % count_ == 0, "fewbit: ", count_, " scales do not divide ", x.numel(),
                    " elements.");
    STD_TORCH_CHECK(low <= high && low >= -65536 && high <= 65536, "fewbit: codes must be within 65536, found ", low,
                    " to ", high, ".");
    size_ = x.numel() / count_;
    scales_ = floats(scale, count_, "scale");
    zeros_ = zero_point ? floats(*zero_point, count_, "zero_point") : nullptr;
    pieces_ = ceil_div(std::max<int64_t>(size_, 1), kPiece);
  }

  int64_t count() const { return count_; }
  int64_t pieces() const { return pieces_; } // of a block

  Grid grid(int64_t block) const {
    const float scale = scales_[block], zero = zeros_ ? zeros_[block] : 0.0f;
    return {scale, scale > 0 ? scale : std::numeric_limits<float>::infinity(), low_ - zero, high_ - zero};
  }

  // f(piece, its block, place of its first element, elements)
  template <class F> void each(const F& f) const {
    in_parallel(count_ * pieces_, count_ * size_ * 8, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t block = piece / pieces_, first = piece % pieces_ * kPiece;
        f(piece, block, block * size_ + first, std::min(kPiece, size_ - first));
      }
    });
  }

 private:
  int64_t count_, size_ = 0, pieces_ = 0;
  float low_, high_;
  const float *scales_, *zeros_;
};

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, double low,
                     double high) {
  const Blocks blocks(x, scale, zero_point, low, high);
  const float* from = floats(x, x.numel(), "x");
  Tensor y = new_tensor(shape_of(x), ScalarType::Float);
  float* to = static_cast<float*>(y.mutable_data_ptr());
  blocks.each([&](int64_t, int64_t block, int64_t place, int64_t count) {
    round_piece(from + place, to + place, count, blocks.grid(block));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& gradient, const Tensor& x,
                                                          const std::optional<Tensor>& y, const Tensor& scale,
                                                          const std::optional<Tensor>& zero_point, double low,
                                                          double high) {
  const Blocks blocks(x, scale, zero_point, low, high);
  const float *from = floats(x, x.numel(), "x"), *slope = floats(gradient, x.numel(), "gradient");
  const float* values = y ? floats(*y, x.numel(), "y") : nullptr;
  Tensor for_x = new_tensor(shape_of(x), ScalarType::Float);
  Tensor for_scale = new_tensor({blocks.count()}, ScalarType::Float);
  Tensor beyond = new_tensor({blocks.count()}, ScalarType::Float);
  float* to = static_cast<float*>(for_x.mutable_data_ptr());
  std::vector<double> sums(static_cast<size_t>(2 * blocks.count() * blocks.pieces()));
  blocks.each([&](int64_t piece, int64_t block, int64_t place, int64_t count) {
    const Grid grid = blocks.grid(block);
    double* found = sums.data() + 2 * piece;
    if (values)
      gradient_piece_of(slope + place, from + place, values + place, to + place, count, grid, found);
    else
      gradient_piece(slope + place, from + place, to + place, count, grid, found);
  });
  float* of_scale = static_cast<float*>(for_scale.mutable_data_ptr());
  float* of_beyond = static_cast<float*>(beyond.mutable_data_ptr());
  for (int64_t block = 0; block < blocks.count(); ++block) {
    double total[2] = {};
    for (int64_t piece = block * blocks.pieces(); piece < (block + 1) * blocks.pieces(); ++piece)
      for (int j = 0; j < 2; ++j) total[j] += sums[static_cast<size_t>(2 * piece + j)];
    of_scale[block] = static_cast<float>(total[0]);
    of_beyond[block] = static_cast<float>(total[1]);
  }
  return {for_x, for_scale, beyond};
}

void take(int8_t& a, int8_t& b, int sign, int limit) {
  const int excess = std::max(a * sign, 0) + std::max(b * sign, 0) - limit;
  if (excess <= 0) return;
  const int half = (excess + 1) / 2;
  a = static_cast<int8_t>(a - sign * half);
  b = static_cast<int8_t>(b - sign * (excess - half));
}

Tensor bound_pairs(const Tensor& codes, const Tensor& pairs, int64_t limit) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2 && codes.is_contiguous(),
                  "fewbit: codes must be contiguous int8 [rows, columns], found ", described(codes), ".");
  STD_TORCH_CHECK(pairs.scalar_type() == ScalarType::Long && pairs.dim() == 2 && pairs.size(1) == 2,
                  "fewbit: pairs must be int64 [pairs, 2], found ", described(pairs), ".");
  const Tensor in_turn = contiguous_of(pairs);
  const int64_t rows = codes.size(0), columns = codes.size(1), count = pairs.size(0);
  const int64_t* places = static_cast<const int64_t*>(in_turn.const_data_ptr());
  for (int64_t i = 0; i < 2 * count; ++i)
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < columns, "fewbit: a pair has column ", places[i], " of ", columns, ".");
  Tensor result = torch::stable::clone(codes);
  int8_t* values = static_cast<int8_t*>(result.mutable_data_ptr());
  const int least = static_cast<int>(std::min<int64_t>(std::max<int64_t>(limit, 0), 256));
  in_parallel(rows, rows * count * 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < count; ++i) {
        int8_t &a = values[row * columns + places[2 * i]], &b = values[row * columns + places[2 * i + 1]];
        take(a, b, 1, least);
        take(a, b, -1, least);
      }
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("bound_pairs", TORCH_BOX(&bound_pairs));
}

} // namespace fewbit
