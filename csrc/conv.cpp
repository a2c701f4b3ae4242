// The operators on uint8 codes in channels-last order.
#include <torch/csrc/stable/library.h>

#include "steps.h"

namespace fewbit {

namespace {

using Numbers = std::vector<int64_t>;

const uint8_t* bytes_of(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }

void check_codes(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, "fewbit: ", what, " must be uint8, found ", described(x), ".");
}

Tensor new_codes(const Numbers& shape) { return new_tensor(shape, ScalarType::Byte); }

uint8_t* writable(Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

Numbers shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

void set_pair(int64_t (&pair)[2], const Numbers& from, const char* what) {
  STD_TORCH_CHECK(from.size() == 2, "fewbit: ", what, " must be two numbers, of the height and the width, found ",
                  listed(from.data(), static_cast<int64_t>(from.size())), ".");
  std::copy_n(from.begin(), 2, pair);
}

Filter checked_filter(const Numbers& shape, int64_t groups) {
  STD_TORCH_CHECK(shape.size() == 4, "fewbit: a weight must be [outputs, channels, height, width], found ",
                  listed(shape.data(), static_cast<int64_t>(shape.size())), ".");
  return filter_of({shape[0], shape[1], shape[2], shape[3]}, groups);
}

const void* vector_of(const Tensor& x, int64_t size, ScalarType type, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == 1 && x.size(0) == size && x.is_contiguous(), "fewbit: ", what,
                  " must be contiguous ", type == ScalarType::Float ? "float32" : "int32", " [", size, "], found ",
                  described(x), ".");
  return x.const_data_ptr();
}

void set_weight(Conv& c, const Tensor& packed, const Tensor& multiplier, const Tensor& offset) {
  const int64_t outputs = c.filter.outputs;
  const bool is_packed = packed.scalar_type() == ScalarType::Byte && packed.is_contiguous();
  c.packed = is_packed ? bytes_of(packed) : nullptr;
  check_packed(c.filter, c.packed, packed.numel());
  set_vectors(c.result, static_cast<const float*>(vector_of(multiplier, outputs, ScalarType::Float, "multiplier")),
              static_cast<const int32_t*>(vector_of(offset, outputs, ScalarType::Int, "offset")), outputs);
}

Tensor result_of(Conv& c, const Shape& shape, std::optional<Tensor> other, double other_multiplier,
                 int64_t other_zero_point) {
  if (other) {
    check_codes(*other, "other");
    set_other(c.result, shape, Shape(*other), other_multiplier, other_zero_point);
    other = contiguous_of(*other);
    c.result.other = bytes_of(*other);
  }
  Tensor y = new_tensor(shape.vector(), c.result.codes ? ScalarType::Byte : ScalarType::Float);
  c.result.out = y.mutable_data_ptr();
  run(c);
  return y;
}

Tensor pack_uint8(Tensor weight, int64_t groups) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "fewbit: weight must be int8, found ", described(weight), ".");
  const Filter f = checked_filter(shape_of(weight), groups);
  weight = contiguous_of(weight);
  Tensor packed = new_codes({f.packed_bytes()});
  kernels().pack_filter(f, static_cast<const int8_t*>(weight.const_data_ptr()), writable(packed));
  return packed;
}

Tensor conv_uint8(Tensor x, Tensor packed, Numbers weight_shape, Tensor multiplier, Tensor offset, Numbers stride,
                  Numbers padding, Numbers dilation, int64_t groups, int64_t input_zero_point, double low, double high,
                  std::optional<int64_t> zero_point, std::optional<Tensor> other, double other_multiplier,
                  int64_t other_zero_point) {
  check_codes(x, "x");
  Conv c{};
  c.filter = checked_filter(weight_shape, groups);
  set_pair(c.stride, stride, "stride");
  set_pair(c.padding, padding, "padding");
  set_pair(c.dilation, dilation, "dilation");
  const Shape shape = set_image(c, Shape(x));
  set_weight(c, packed, multiplier, offset);
  set_bounds(c.result, low, high, zero_point);
  c.zero_point = static_cast<uint8_t>(code_of(input_zero_point, "input_zero_point"));
  x = contiguous_of(x);
  c.x = bytes_of(x);
  return result_of(c, shape, std::move(other), other_multiplier, other_zero_point);
}

Tensor linear_uint8(Tensor x, Tensor packed, Numbers weight_shape, Tensor multiplier, Tensor offset, double low, double high,
                    std::optional<int64_t> zero_point, std::optional<Tensor> other, double other_multiplier,
                    int64_t other_zero_point) {
  check_codes(x, "x");
  Conv c{};
  c.filter = checked_filter(weight_shape, 1);
  const Shape shape = set_rows(c, Shape(x));
  set_weight(c, packed, multiplier, offset);
  set_bounds(c.result, low, high, zero_point);
  x = contiguous_of(x);
  c.x = bytes_of(x);
  return result_of(c, shape, std::move(other), other_multiplier, other_zero_point);
}

Tensor quantize_uint8(Tensor x, double scale, int64_t zero_point) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "fewbit: x must be float32, found ", described(x), ".");
  const float step = scale_of(scale);
  const int32_t zero = code_of(zero_point, "zero_point");
  Tensor y = new_codes(shape_of(x));
  if (const std::optional<Shape> planes = planes_of(x)) {
    quantize_planes(static_cast<const float*>(x.const_data_ptr()), *planes, step, zero, writable(y));
    return y;
  }
  x = contiguous_of(x);
  quantize(static_cast<const float*>(x.const_data_ptr()), x.numel(), step, zero, writable(y));
  return y;
}

Tensor dequantize_uint8(Tensor codes, double scale, int64_t zero_point) {
  check_codes(codes, "codes");
  codes = contiguous_of(codes);
  Tensor y = new_tensor(shape_of(codes), ScalarType::Float);
  dequantize(bytes_of(codes), codes.numel(), static_cast<float>(scale), code_of(zero_point, "zero_point"),
             static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

Tensor add_uint8(Tensor a, Tensor b, double a_multiplier, int64_t a_zero_point, double b_multiplier, int64_t b_zero_point,
                 double low, double high, int64_t zero_point) {
  check_codes(a, "a");
  check_codes(b, "b");
  STD_TORCH_CHECK(shape_of(a) == shape_of(b), "fewbit: a and b must be of the same shape, found ", described(a), " and ",
                  described(b), ".");
  a = contiguous_of(a);
  b = contiguous_of(b);
  Tensor y = new_codes(shape_of(a));
  Add add{bytes_of(a), bytes_of(b), static_cast<float>(a_multiplier), static_cast<float>(b_multiplier),
          code_of(a_zero_point, "a_zero_point"), code_of(b_zero_point, "b_zero_point"), {}};
  set_bounds(add.result, low, high, zero_point);
  add.result.out = writable(y);
  run(add, a.numel());
  return y;
}

Tensor average_uint8(Tensor x, Numbers kernel, Numbers stride, Numbers padding, bool count_include_pad, double multiplier,
                     int64_t input_zero_point, int64_t zero_point) {
  check_codes(x, "x");
  Average a{};
  set_pair(a.pool.kernel, kernel, "kernel");
  set_pair(a.pool.stride, stride, "stride");
  set_pair(a.pool.padding, padding, "padding");
  a.count_padding = count_include_pad;
  a.multiplier = static_cast<float>(multiplier);
  a.input_zero_point = code_of(input_zero_point, "input_zero_point");
  a.zero_point = code_of(zero_point, "zero_point");
  Tensor y = new_codes(set_image(a, Shape(x)).vector());
  x = contiguous_of(x);
  a.pool.x = bytes_of(x);
  a.pool.out = writable(y);
  run(a);
  return y;
}

Tensor lookup_uint8(Tensor x, Tensor table) {
  check_codes(x, "x");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Byte && table.dim() == 1 && table.size(0) == 256,
                  "fewbit: table must be uint8 [256], found ", described(table), ".");
  x = contiguous_of(x);
  table = contiguous_of(table);
  Tensor y = new_codes(shape_of(x));
  lookup(bytes_of(x), x.numel(), bytes_of(table), writable(y));
  return y;
}

Tensor max_pool_uint8(Tensor x, Numbers kernel, Numbers stride, Numbers padding, Numbers dilation, bool ceil_mode) {
  check_codes(x, "x");
  Pool p{};
  set_pair(p.kernel, kernel, "kernel");
  set_pair(p.stride, stride, "stride");
  set_pair(p.padding, padding, "padding");
  set_pair(p.dilation, dilation, "dilation");
  Tensor y = new_codes(set_image(p, Shape(x), ceil_mode).vector());
  x = contiguous_of(x);
  p.x = bytes_of(x);
  p.out = writable(y);
  run(p);
  return y;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("quantize_uint8", TORCH_BOX(&quantize_uint8));
  m.impl("dequantize_uint8", TORCH_BOX(&dequantize_uint8));
  m.impl("pack_uint8", TORCH_BOX(&pack_uint8));
  m.impl("conv_uint8", TORCH_BOX(&conv_uint8));
  m.impl("linear_uint8", TORCH_BOX(&linear_uint8));
  m.impl("add_uint8", TORCH_BOX(&add_uint8));
  m.impl("average_uint8", TORCH_BOX(&average_uint8));
  m.impl("max_pool_uint8", TORCH_BOX(&max_pool_uint8));
  m.impl("lookup_uint8", TORCH_BOX(&lookup_uint8));
}

} // namespace fewbit
