// What the operators on uint8 codes do, as steps on plain arrays: alone for conv.cpp, one after the other for program.cpp.
//
// A step is described with checks that make any operands safe, whoever wrote the description; then it runs.
#pragma once

#include "tensors.h"

namespace fewbit {

// Of a tensor of up to kMost axes, all of whose sizes together stay far from overflow.
class Shape {
 public:
  static constexpr int kMost = 8;

  Shape() = default;
  Shape(const int64_t* sizes, int64_t axes);
  Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.begin(), static_cast<int64_t>(sizes.size())) {}
  explicit Shape(const Tensor& x) : Shape(x.sizes().data(), x.dim()) {}

  int axes() const { return axes_; }
  int64_t operator[](int axis) const { return sizes_[axis]; }
  int64_t count() const { return count_; }
  int64_t last() const { return axes_ ? sizes_[axes_ - 1] : 1; }
  Shape with(int axis, int64_t size) const;
  std::vector<int64_t> vector() const { return {sizes_, sizes_ + axes_}; }
  bool operator==(const Shape& other) const { return axes_ == other.axes_ && std::equal(sizes_, sizes_ + axes_, other.sizes_); }

 private:
  int axes_ = 0;
  int64_t count_ = 1;
  int64_t sizes_[kMost] = {};
};

std::string listed(const int64_t* numbers, int64_t count); // [1, 2]
inline std::string listed(const Shape& shape) { return listed(shape.vector().data(), shape.axes()); }

int32_t code_of(int64_t zero_point, const char* what);
float scale_of(double scale);

// The weight's shape is [outputs, channels, height, width].
Filter filter_of(const int64_t (&shape)[4], int64_t groups);
void check_packed(const Filter&, const uint8_t* packed, int64_t bytes); // `packed` null: it is no packed weight

// The clamp and, for codes, their zero point.
void set_bounds(Rescale&, double low, double high, const std::optional<int64_t>& zero_point);
void set_vectors(Rescale&, const float* multiplier, const int32_t* offset, int64_t outputs); // bounded too
// Codes of `shape` that are added to a result of shape `result`: all but where they are; after set_bounds.
void set_other(Rescale&, const Shape& result, const Shape& shape, double multiplier, int64_t zero_point);

// What depends on the shape of the input, for which the rest must be set; returns that of the result.
Shape set_image(Conv&, const Shape& x);
Shape set_rows(Conv&, const Shape& x); // of a linear layer: 1 x 1 over an image of one row
Shape set_image(Average&, const Shape& x);
Shape set_image(Pool&, const Shape& x, bool ceil_mode);

// [batch, channels, height, width] of what lies like that in memory and is seen channels-last; none for other tensors.
std::optional<Shape> planes_of(const Tensor& x);

void quantize(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* out);
// From [batch, channels, height, width] to channels-last.
void quantize_planes(const float* x, const Shape&, float scale, int32_t zero_point, uint8_t* out);
void dequantize(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* out);
void lookup(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out);
void run(const Conv&);
void run(const Add&, int64_t count);
void run(const Average&);
void run(const Pool&);

} // namespace fewbit
