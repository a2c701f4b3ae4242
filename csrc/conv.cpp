// The operators on uint8 codes in channels-last order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors.h"

namespace fewbit {

namespace {

using Numbers = std::vector<int64_t>;

const uint8_t* bytes_of(const Tensor& x) { return static_cast<const uint8_t*>(x.const_data_ptr()); }

Numbers shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

std::string listed(const Numbers& numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

void check_codes(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, "fewbit: ", what, " must be uint8, found ", described(x), ".");
}

void check_image(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == 4,
                  "fewbit: x must be uint8 [batch, height, width, channels], found ", described(x), ".");
}

int32_t code_of(int64_t zero_point, const char* what) {
  STD_TORCH_CHECK(zero_point >= 0 && zero_point <= 255, "fewbit: ", what, " must be 0 to 255, found ", zero_point, ".");
  return static_cast<int32_t>(zero_point);
}

float scale_of(double scale) {
  const float value = static_cast<float>(scale);
  STD_TORCH_CHECK(value > 0 && std::isfinite(value), "fewbit: scale must be positive and finite, found ", scale, ".");
  return value;
}

// Two numbers, of the height and the width, each from `least` on.
void check_pair(const Numbers& pair, int64_t least, const char* what) {
  STD_TORCH_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= INT32_MAX,
                  "fewbit: ", what, " must be two numbers of at least ", least, ", found ", listed(pair), ".");
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t window = (kernel - 1) * dilation + 1;
  STD_TORCH_CHECK(window <= size + 2 * padding, "fewbit: the window of ", window, " is larger than the image of ", size,
                  " with its padding of ", padding, ".");
  return (size + 2 * padding - window) / stride + 1;
}

Filter filter_of(const Numbers& shape, int64_t groups) {
  STD_TORCH_CHECK(shape.size() == 4 && *std::min_element(shape.begin(), shape.end()) >= 1 &&
                      *std::max_element(shape.begin(), shape.end()) <= INT32_MAX,
                  "fewbit: a weight must be [outputs, channels, height, width] with at least one of each, found ",
                  listed(shape), ".");
  STD_TORCH_CHECK(groups >= 1 && shape[0] % groups == 0, "fewbit: groups must divide the outputs ", shape[0], ", found ",
                  groups, ".");
  const Filter f{shape[0], shape[1], shape[2], shape[3], groups};
  // In float64, which cannot overflow.
  const double products = static_cast<double>(shape[1]) * static_cast<double>(shape[2]) * static_cast<double>(shape[3]);
  STD_TORCH_CHECK(products * 255 * 128 <= INT32_MAX, "fewbit: sums of ", products, " products may exceed int32.");
  return f;
}

const uint8_t* packed_of(const Tensor& packed, const Filter& f) {
  PackHeader header{};
  if (packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == f.packed_bytes())
    std::memcpy(&header, packed.const_data_ptr(), sizeof(header));
  STD_TORCH_CHECK(header.magic == kPackMagic && header.lanes == kernels().conv_lanes &&
                      header.depthwise == static_cast<int32_t>(f.depthwise()),
                  "fewbit: packed must be what pack_uint8 returns here for a weight ",
                  listed({f.outputs, f.channels, f.height, f.width}), " in ", f.groups, " groups, found ",
                  described(packed), ".");
  return bytes_of(packed);
}

const void* vector_of(const Tensor& x, int64_t size, ScalarType type, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == 1 && x.size(0) == size && x.is_contiguous(), "fewbit: ", what,
                  " must be contiguous ", type == ScalarType::Float ? "float32" : "int32", " [", size, "], found ",
                  described(x), ".");
  return x.const_data_ptr();
}

void check_bounds(double low, double high) {
  STD_TORCH_CHECK(low >= 0 && low <= high && high <= 255 && low == std::floor(low) && high == std::floor(high),
                  "fewbit: low and high must be whole numbers within 0 to 255, found ", low, " and ", high, ".");
}

// What Rescale says for a result of this shape, which is made here.
Rescale rescale_of(const Numbers& shape, const Tensor& multiplier, const Tensor& offset, std::optional<Tensor>& other,
                   double other_multiplier, int64_t other_zero_point, double low, double high,
                   const std::optional<int64_t>& zero_point, std::optional<Tensor>& result) {
  Rescale r{};
  r.multiplier = static_cast<const float*>(vector_of(multiplier, shape.back(), ScalarType::Float, "multiplier"));
  r.offset = static_cast<const int32_t*>(vector_of(offset, shape.back(), ScalarType::Int, "offset"));
  if (other) {
    STD_TORCH_CHECK(other->scalar_type() == ScalarType::Byte && shape_of(*other) == shape, "fewbit: other must be uint8 ",
                    listed(shape), ", found ", described(*other), ".");
    other = contiguous_of(*other);
    r.other = bytes_of(*other);
    r.other_multiplier = static_cast<float>(other_multiplier);
    r.other_zero_point = code_of(other_zero_point, "other_zero_point");
  }
  r.codes = zero_point.has_value();
  r.bounded = true;
  for (int64_t i = 0; i < shape.back(); ++i) r.bounded &= std::fabs(r.multiplier[i]) <= 0.25f;
  if (r.codes) {
    check_bounds(low, high);
    r.zero_point = code_of(*zero_point, "zero_point");
  } else {
    STD_TORCH_CHECK(low <= high, "fewbit: low must be at most high, found ", low, " and ", high, ".");
  }
  r.low = static_cast<float>(low);
  r.high = static_cast<float>(high);
  result = new_tensor(shape, r.codes ? ScalarType::Byte : ScalarType::Float);
  r.out = result->mutable_data_ptr();
  return r;
}

void run(const Conv& c) {
  const Kernels& k = kernels();
  if (c.pixels() == 0) return;
  const int64_t work = c.pixels() * c.filter.outputs * c.filter.depth();
  const int64_t threads = work < 2 * kWorthAThread ? 1 : torch::stable::get_num_threads();
  in_parallel(k.conv_tasks(c, threads), work, [&](int64_t begin, int64_t end) { k.conv(c, threads, begin, end); });
}

Tensor pack_uint8(Tensor weight, int64_t groups) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "fewbit: weight must be int8, found ", described(weight), ".");
  const Filter f = filter_of(shape_of(weight), groups);
  weight = contiguous_of(weight);
  Tensor packed = new_tensor({f.packed_bytes()}, ScalarType::Byte);
  kernels().pack_filter(f, static_cast<const int8_t*>(weight.const_data_ptr()),
                        static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor conv_uint8(Tensor x, Tensor packed, Numbers weight_shape, Tensor multiplier, Tensor offset, Numbers stride,
                  Numbers padding, Numbers dilation, int64_t groups, int64_t input_zero_point, std::optional<Tensor> other,
                  double other_multiplier, int64_t other_zero_point, double low, double high,
                  std::optional<int64_t> zero_point) {
  check_image(x);
  Conv c{};
  c.filter = filter_of(weight_shape, groups);
  STD_TORCH_CHECK(x.size(3) == c.channels(), "fewbit: x must have ", c.channels(), " channels, found ", described(x), ".");
  check_pair(stride, 1, "stride");
  check_pair(padding, 0, "padding");
  check_pair(dilation, 1, "dilation");
  c.packed = packed_of(packed, c.filter);
  c.zero_point = static_cast<uint8_t>(code_of(input_zero_point, "input_zero_point"));
  x = contiguous_of(x);
  c.x = bytes_of(x);
  c.batch = x.size(0);
  c.height = x.size(1);
  c.width = x.size(2);
  c.out_height = output_size(c.height, c.filter.height, stride[0], padding[0], dilation[0]);
  c.out_width = output_size(c.width, c.filter.width, stride[1], padding[1], dilation[1]);
  std::copy_n(stride.begin(), 2, c.stride);
  std::copy_n(padding.begin(), 2, c.padding);
  std::copy_n(dilation.begin(), 2, c.dilation);
  std::optional<Tensor> y;
  c.result = rescale_of({c.batch, c.out_height, c.out_width, c.filter.outputs}, multiplier, offset, other, other_multiplier,
                        other_zero_point, low, high, zero_point, y);
  run(c);
  return *y;
}

// As a convolution of 1 x 1 over an image of one row.
Tensor linear_uint8(Tensor x, Tensor packed, Numbers weight_shape, Tensor multiplier, Tensor offset,
                    std::optional<Tensor> other, double other_multiplier, int64_t other_zero_point, double low, double high,
                    std::optional<int64_t> zero_point) {
  check_codes(x, "x");
  Conv c{};
  c.filter = filter_of(weight_shape, 1);
  STD_TORCH_CHECK(c.filter.height == 1 && c.filter.width == 1, "fewbit: the weight of a linear layer must be ",
                  "[outputs, inputs, 1, 1], found ", listed(weight_shape), ".");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == c.filter.channels, "fewbit: x must be [..., ", c.filter.channels,
                  "], found ", described(x), ".");
  c.packed = packed_of(packed, c.filter);
  x = contiguous_of(x);
  c.x = bytes_of(x);
  c.batch = c.height = c.out_height = 1;
  c.width = c.out_width = x.numel() / c.filter.channels;
  for (int i : {0, 1}) c.stride[i] = c.dilation[i] = 1;
  std::optional<Tensor> y;
  Numbers shape = shape_of(x);
  shape.back() = c.filter.outputs;
  c.result = rescale_of(shape, multiplier, offset, other, other_multiplier, other_zero_point, low, high, zero_point, y);
  run(c);
  return *y;
}

// Whether x is [batch, height, width, channels] of planes in memory.
bool has_planes(const Tensor& x) {
  if (x.dim() != 4 || x.numel() == 0) return false;
  const int64_t height = x.size(1), width = x.size(2), channels = x.size(3);
  return x.stride(2) == 1 && x.stride(1) == width && x.stride(3) == height * width &&
         (x.size(0) == 1 || x.stride(0) == channels * height * width);
}

Tensor quantize_uint8(Tensor x, double scale, int64_t zero_point) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "fewbit: x must be float32, found ", described(x), ".");
  const Kernels& k = kernels();
  const float step = scale_of(scale);
  const int32_t zero = code_of(zero_point, "zero_point");
  Tensor y = new_tensor(shape_of(x), ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t count = x.numel();
  if (!x.is_contiguous() && has_planes(x)) {
    const int64_t plane = x.size(1) * x.size(2), channels = x.size(3);
    const float* from = static_cast<const float*>(x.const_data_ptr());
    const int64_t rows = x.size(0) * x.size(1), width = x.size(2); // a row is not split, so that it is in one image
    in_parallel(rows, count * 8, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / x.size(1), last = std::min(end, (image + 1) * x.size(1)), first = image * x.size(1);
        const int64_t start = image * plane * channels;
        k.quantize_planes(from + start, plane, channels, (begin - first) * width, (last - first) * width, step, zero,
                          out + start);
        begin = last;
      }
    });
    return y;
  }
  x = contiguous_of(x);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  in_parallel(ceil_div(count, kPadding), count * 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPadding, last = std::min(end * kPadding, count);
    k.quantize_codes(from + first, last - first, step, zero, out + first);
  });
  return y;
}

Tensor dequantize_uint8(Tensor codes, double scale, int64_t zero_point) {
  check_codes(codes, "codes");
  const Kernels& k = kernels();
  const int32_t zero = code_of(zero_point, "zero_point");
  codes = contiguous_of(codes);
  Tensor y = new_tensor(shape_of(codes), ScalarType::Float);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const uint8_t* from = bytes_of(codes);
  in_parallel(codes.numel(), codes.numel() * 4, [&](int64_t begin, int64_t end) {
    k.dequantize_codes(from + begin, end - begin, static_cast<float>(scale), zero, out + begin);
  });
  return y;
}

Tensor add_uint8(Tensor a, Tensor b, double a_multiplier, int64_t a_zero_point, double b_multiplier, int64_t b_zero_point,
                 double low, double high, int64_t zero_point) {
  check_codes(a, "a");
  STD_TORCH_CHECK(b.scalar_type() == ScalarType::Byte && shape_of(a) == shape_of(b),
                  "fewbit: a and b must be uint8 of the same shape, found ", described(a), " and ", described(b), ".");
  check_bounds(low, high);
  const Kernels& k = kernels();
  a = contiguous_of(a);
  b = contiguous_of(b);
  Tensor y = new_tensor(shape_of(a), ScalarType::Byte);
  Rescale r{};
  r.other = bytes_of(b);
  r.other_multiplier = static_cast<float>(b_multiplier);
  r.other_zero_point = code_of(b_zero_point, "b_zero_point");
  r.low = static_cast<float>(low);
  r.high = static_cast<float>(high);
  r.codes = true;
  r.zero_point = code_of(zero_point, "zero_point");
  r.out = y.mutable_data_ptr();
  const int32_t zero = code_of(a_zero_point, "a_zero_point");
  const uint8_t* from = bytes_of(a);
  const int64_t count = a.numel();
  in_parallel(ceil_div(count, kPadding), count * 8, [&](int64_t begin, int64_t end) {
    k.add_codes(from, static_cast<float>(a_multiplier), zero, begin * kPadding, std::min(end * kPadding, count), r);
  });
  return y;
}

Tensor average_uint8(Tensor x, Numbers kernel, Numbers stride, Numbers padding, bool count_include_pad, double multiplier,
                     int64_t input_zero_point, int64_t zero_point) {
  check_image(x);
  check_pair(kernel, 1, "kernel");
  check_pair(stride, 1, "stride");
  check_pair(padding, 0, "padding");
  // So that no window is outside the image, where there is no mean.
  STD_TORCH_CHECK(padding[0] < kernel[0] && padding[1] < kernel[1], "fewbit: padding must be less than the kernel ",
                  listed(kernel), ", found ", listed(padding), ".");
  STD_TORCH_CHECK(static_cast<double>(kernel[0]) * static_cast<double>(kernel[1]) * 255 <= INT32_MAX,
                  "fewbit: sums over windows ", listed(kernel), " may exceed int32.");
  const Kernels& k = kernels();
  x = contiguous_of(x);
  Average a{};
  a.x = bytes_of(x);
  a.batch = x.size(0);
  a.height = x.size(1);
  a.width = x.size(2);
  a.channels = x.size(3);
  a.out_height = output_size(a.height, kernel[0], stride[0], padding[0], 1);
  a.out_width = output_size(a.width, kernel[1], stride[1], padding[1], 1);
  std::copy_n(kernel.begin(), 2, a.kernel);
  std::copy_n(stride.begin(), 2, a.stride);
  std::copy_n(padding.begin(), 2, a.padding);
  a.count_padding = count_include_pad;
  a.multiplier = static_cast<float>(multiplier);
  a.input_zero_point = code_of(input_zero_point, "input_zero_point");
  a.zero_point = code_of(zero_point, "zero_point");
  Tensor y = new_tensor({a.batch, a.out_height, a.out_width, a.channels}, ScalarType::Byte);
  a.out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t work = y.numel() * kernel[0] * kernel[1];
  in_parallel(y.numel() ? a.batch * a.out_height : 0, work, [&](int64_t begin, int64_t end) { k.average(a, begin, end); });
  return y;
}

Tensor lookup_uint8(Tensor x, Tensor table) {
  check_codes(x, "x");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Byte && table.dim() == 1 && table.size(0) == 256,
                  "fewbit: table must be uint8 [256], found ", described(table), ".");
  const Kernels& k = kernels();
  x = contiguous_of(x);
  table = contiguous_of(table);
  Tensor y = new_tensor(shape_of(x), ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  const uint8_t *from = bytes_of(x), *to = bytes_of(table);
  in_parallel(x.numel(), x.numel() * 4, [&](int64_t begin, int64_t end) {
    k.lookup(from + begin, end - begin, to, out + begin);
  });
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
  m.impl("lookup_uint8", TORCH_BOX(&lookup_uint8));
}

} // namespace fewbit
