#include "steps.h"

#include <cmath>

namespace fewbit {

Shape::Shape(const int64_t* sizes, int64_t axes) {
  constexpr int64_t kLargest = int64_t{1} << 40; // times the products of a sum and of bytes it is still in int64
  STD_TORCH_CHECK(axes <= kMost, "fewbit: tensors of codes may have ", kMost, " axes, found ", axes, ".");
  axes_ = static_cast<int>(axes);
  bool fits = true;
  for (int i = 0; i < axes_; ++i) {
    sizes_[i] = sizes[i];
    fits = fits && sizes[i] >= 0 && !__builtin_mul_overflow(count_, sizes[i], &count_) && count_ <= kLargest;
  }
  STD_TORCH_CHECK(fits, "fewbit: a tensor of codes cannot be ", listed(sizes, axes), ".");
}

Shape Shape::with(int axis, int64_t size) const {
  int64_t sizes[kMost];
  std::copy_n(sizes_, axes_, sizes);
  sizes[axis] = size;
  return Shape(sizes, axes_);
}

std::string listed(const int64_t* numbers, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
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

namespace {

void check_image(const Shape& x) {
  STD_TORCH_CHECK(x.axes() == 4, "fewbit: x must be uint8 [batch, height, width, channels], found ", listed(x), ".");
}

// Of the height and the width.
void check_pair(const int64_t (&pair)[2], int64_t least, const char* what) {
  STD_TORCH_CHECK(std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= INT32_MAX, "fewbit: ", what,
                  " must be two numbers of at least ", least, ", found ", listed(pair, 2), ".");
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t window = (kernel - 1) * dilation + 1;
  STD_TORCH_CHECK(window <= size + 2 * padding, "fewbit: the window of ", window, " is larger than the image of ", size,
                  " with its padding of ", padding, ".");
  const int64_t count = (size + 2 * padding - window + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (count - 1) * stride >= size + padding ? count - 1 : count; // none starts behind the image
}

Shape set_windows(Pool& p, const Shape& x, bool ceil_mode) {
  check_image(x);
  check_pair(p.kernel, 1, "kernel");
  check_pair(p.stride, 1, "stride");
  check_pair(p.padding, 0, "padding");
  check_pair(p.dilation, 1, "dilation");
  p.batch = x[0], p.height = x[1], p.width = x[2], p.channels = x[3];
  p.out_height = output_size(x[1], p.kernel[0], p.stride[0], p.padding[0], p.dilation[0], ceil_mode);
  p.out_width = output_size(x[2], p.kernel[1], p.stride[1], p.padding[1], p.dilation[1], ceil_mode);
  return {x[0], p.out_height, p.out_width, x[3]};
}

} // namespace

Filter filter_of(const int64_t (&shape)[4], int64_t groups) {
  STD_TORCH_CHECK(*std::min_element(shape, shape + 4) >= 1 && *std::max_element(shape, shape + 4) <= INT32_MAX,
                  "fewbit: a weight must be [outputs, channels, height, width] with at least one of each, found ",
                  listed(shape, 4), ".");
  STD_TORCH_CHECK(groups >= 1 && shape[0] % groups == 0, "fewbit: groups must divide the outputs ", shape[0], ", found ",
                  groups, ".");
  // In float64, which cannot overflow.
  const double products = static_cast<double>(shape[1]) * static_cast<double>(shape[2]) * static_cast<double>(shape[3]);
  STD_TORCH_CHECK(products * 255 * 128 <= INT32_MAX, "fewbit: sums of ", products, " products may exceed int32.");
  return {shape[0], shape[1], shape[2], shape[3], groups};
}

void check_packed(const Filter& f, const uint8_t* packed, int64_t bytes) {
  PackHeader header{};
  if (packed && bytes == f.packed_bytes()) std::memcpy(&header, packed, sizeof(header));
  STD_TORCH_CHECK(header.magic == kPackMagic && header.lanes == kernels().conv_lanes &&
                      header.depthwise == static_cast<int32_t>(f.depthwise()),
                  "fewbit: packed must be what pack_uint8 returns here for a weight [", f.outputs, ", ", f.channels, ", ",
                  f.height, ", ", f.width, "] in ", f.groups, " groups.");
}

void set_bounds(Rescale& r, double low, double high, const std::optional<int64_t>& zero_point) {
  r.codes = zero_point.has_value();
  if (r.codes) {
    STD_TORCH_CHECK(low >= 0 && low <= high && high <= 255 && low == std::floor(low) && high == std::floor(high),
                    "fewbit: low and high must be whole numbers within 0 to 255, found ", low, " and ", high, ".");
    r.zero_point = code_of(*zero_point, "zero_point");
  } else {
    STD_TORCH_CHECK(low <= high, "fewbit: low must be at most high, found ", low, " and ", high, ".");
  }
  r.low = static_cast<float>(low);
  r.high = static_cast<float>(high);
}

void set_vectors(Rescale& r, const float* multiplier, const int32_t* offset, int64_t outputs) {
  r.multiplier = multiplier;
  r.offset = offset;
  r.bounded = true;
  for (int64_t i = 0; i < outputs; ++i) r.bounded &= std::fabs(multiplier[i]) <= 0.25f;
}

void set_other(Rescale& r, const Shape& result, const Shape& shape, double multiplier, int64_t zero_point) {
  STD_TORCH_CHECK(r.codes, "fewbit: where other codes are added the result must be codes too: zero_point is missing.");
  STD_TORCH_CHECK(shape == result, "fewbit: other must be of the result's shape ", listed(result), ", found ",
                  listed(shape), ".");
  r.other_multiplier = static_cast<float>(multiplier);
  r.other_zero_point = code_of(zero_point, "other_zero_point");
}

Shape set_image(Conv& c, const Shape& x) {
  check_image(x);
  const Filter& f = c.filter;
  STD_TORCH_CHECK(x[3] == c.channels(), "fewbit: x must have ", c.channels(), " channels, found ", listed(x), ".");
  check_pair(c.stride, 1, "stride");
  check_pair(c.padding, 0, "padding");
  check_pair(c.dilation, 1, "dilation");
  c.batch = x[0], c.height = x[1], c.width = x[2];
  c.out_height = output_size(c.height, f.height, c.stride[0], c.padding[0], c.dilation[0], false);
  c.out_width = output_size(c.width, f.width, c.stride[1], c.padding[1], c.dilation[1], false);
  return {c.batch, c.out_height, c.out_width, f.outputs};
}

Shape set_rows(Conv& c, const Shape& x) {
  const Filter& f = c.filter;
  STD_TORCH_CHECK(f.height == 1 && f.width == 1 && f.groups == 1, "fewbit: the weight of a linear layer must be ",
                  "[outputs, inputs, 1, 1], found a window of ", f.height, " x ", f.width, ".");
  STD_TORCH_CHECK(x.axes() >= 1 && x.last() == f.channels, "fewbit: x must be [..., ", f.channels, "], found ", listed(x), ".");
  c.batch = c.height = c.out_height = 1;
  c.width = c.out_width = x.count() / f.channels;
  for (int i : {0, 1}) c.stride[i] = c.dilation[i] = 1;
  return x.with(x.axes() - 1, f.outputs);
}

Shape set_image(Average& a, const Shape& x) {
  Pool& p = a.pool;
  for (int64_t& step : p.dilation) step = 1;
  const Shape shape = set_windows(p, x, false);
  // So that no window is outside the image, where there is no mean.
  STD_TORCH_CHECK(p.padding[0] < p.kernel[0] && p.padding[1] < p.kernel[1], "fewbit: padding must be less than the kernel ",
                  listed(p.kernel, 2), ", found ", listed(p.padding, 2), ".");
  STD_TORCH_CHECK(static_cast<double>(p.kernel[0]) * static_cast<double>(p.kernel[1]) * 255 <= INT32_MAX,
                  "fewbit: sums over windows ", listed(p.kernel, 2), " may exceed int32.");
  return shape;
}

Shape set_image(Pool& p, const Shape& x, bool ceil_mode) { return set_windows(p, x, ceil_mode); }

std::optional<Shape> planes_of(const Tensor& x) {
  if (x.dim() != 4 || x.numel() == 0 || x.is_contiguous()) return std::nullopt;
  const int64_t height = x.size(1), width = x.size(2), channels = x.size(3);
  const bool found = x.stride(2) == 1 && x.stride(1) == width && x.stride(3) == height * width &&
                     (x.size(0) == 1 || x.stride(0) == channels * height * width);
  return found ? std::optional<Shape>({x.size(0), channels, height, width}) : std::nullopt;
}

void quantize(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* out) {
  const Kernels& k = kernels();
  in_parallel(ceil_div(count, kPadding), count * 8, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPadding, last = std::min(end * kPadding, count);
    k.quantize_codes(x + first, last - first, scale, zero_point, out + first);
  });
}

void quantize_planes(const float* x, const Shape& shape, float scale, int32_t zero_point, uint8_t* out) {
  const Kernels& k = kernels();
  const int64_t channels = shape[1], height = shape[2], width = shape[3], plane = height * width;
  if (channels == 1 || plane == 1) return quantize(x, shape.count(), scale, zero_point, out);
  // A row is not split, so that it is in one image.
  in_parallel(shape.count() ? shape[0] * height : 0, shape.count() * 8, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / height, last = std::min(end, (image + 1) * height), first = image * height;
      const int64_t start = image * plane * channels;
      k.quantize_planes(x + start, plane, channels, (begin - first) * width, (last - first) * width, scale, zero_point,
                        out + start);
      begin = last;
    }
  });
}

void dequantize(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* out) {
  const Kernels& k = kernels();
  in_parallel(count, count * 4, [&](int64_t begin, int64_t end) {
    k.dequantize_codes(x + begin, end - begin, scale, zero_point, out + begin);
  });
}

void lookup(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out) {
  const Kernels& k = kernels();
  in_parallel(count, count * 4, [&](int64_t begin, int64_t end) { k.lookup(x + begin, end - begin, table, out + begin); });
}

void run(const Conv& c) {
  const Kernels& k = kernels();
  if (c.pixels() == 0) return;
  const int64_t work = c.pixels() * c.filter.outputs * c.filter.depth();
  const int64_t threads = work < 2 * kWorthAThread ? 1 : torch::stable::get_num_threads();
  in_parallel(k.conv_tasks(c, threads), work, [&](int64_t begin, int64_t end) { k.conv(c, threads, begin, end); });
}

void run(const Add& a, int64_t count) {
  const Kernels& k = kernels();
  in_parallel(ceil_div(count, kPadding), count * 8, [&](int64_t begin, int64_t end) {
    k.add_codes(a, begin * kPadding, std::min(end * kPadding, count));
  });
}

void run(const Average& a) {
  const Kernels& k = kernels();
  const Pool& p = a.pool;
  const int64_t count = p.rows() * p.out_width * p.channels;
  in_parallel(count ? p.rows() : 0, count * p.kernel[0] * p.kernel[1],
              [&](int64_t begin, int64_t end) { k.average(a, begin, end); });
}

void run(const Pool& p) {
  const Kernels& k = kernels();
  const int64_t count = p.rows() * p.out_width * p.channels, window = std::min(p.kernel[0] * p.kernel[1], int64_t{1} << 20);
  in_parallel(count ? p.rows() : 0, count * window / 4,
              [&](int64_t begin, int64_t end) { k.max_pool(p, begin, end); });
}

} // namespace fewbit
