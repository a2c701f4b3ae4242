// Convolutions of codes against plain loops.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace fewbit {

// The sum of one output: its window with its group's weights.
inline int64_t conv_sum(const Conv& c, const std::vector<int8_t>& weight, int64_t n, int64_t y, int64_t x, int64_t output) {
  const Filter& f = c.filter;
  const int64_t group = output / (f.outputs / f.groups);
  int64_t sum = 0;
  for (int64_t i = 0; i < f.depth(); ++i) {
    const int64_t channel = i / (f.height * f.width), ky = i / f.width % f.height, kx = i % f.width;
    const int64_t row = y * c.stride[0] - c.padding[0] + ky * c.dilation[0];
    const int64_t column = x * c.stride[1] - c.padding[1] + kx * c.dilation[1];
    const bool inside = row >= 0 && row < c.height && column >= 0 && column < c.width;
    const int64_t place = ((n * c.height + row) * c.width + column) * c.channels() + group * f.channels + channel;
    sum += (inside ? c.x[place] : c.zero_point) * weight[output * f.depth() + i];
  }
  return sum;
}

template <class Random> void check_conv(const Kernels& k, Random& random, int64_t number) {
  Conv c{};
  Filter& f = c.filter;
  f.groups = random.one_in(3) ? random.of(2, 70) : random.of(1, 2);
  f.channels = random.one_in(2) ? 1 : random.of(1, 40);
  f.outputs = f.groups * (random.one_in(2) ? 1 : random.of(1, f.groups > 2 ? 3 : 90));
  f.height = random.of(1, 5);
  f.width = random.of(1, 5);
  if (random.one_in(3)) f.height = f.width = 1;
  int64_t size[2], out[2];
  const int64_t kernel[2] = {f.height, f.width};
  for (int i : {0, 1}) {
    c.stride[i] = random.of(1, 3);
    c.dilation[i] = random.of(1, 2);
    c.padding[i] = random.of(0, 3);
    const int64_t window = (kernel[i] - 1) * c.dilation[i] + 1, least = window - 2 * c.padding[i];
    size[i] = (least > 1 ? least : 1) + random.of(0, 7);
    out[i] = (size[i] + 2 * c.padding[i] - window) / c.stride[i] + 1;
  }
  c.batch = random.of(1, 2);
  c.height = size[0], c.width = size[1], c.out_height = out[0], c.out_width = out[1];
  c.zero_point = static_cast<uint8_t>(random.of(0, 255));
  std::vector<uint8_t> x(c.batch * c.height * c.width * c.channels()), packed(f.packed_bytes());
  std::vector<int8_t> weight(f.outputs * f.depth());
  const int64_t kind = random.of(0, 2), most = kind == 0 ? 60 : 127; // small, any, the largest
  for (auto& code : x) code = static_cast<uint8_t>(kind == 2 ? 255 : random.of(0, 255));
  for (auto& code : weight) code = static_cast<int8_t>(kind == 2 ? (random.one_in(9) ? -128 : 127) : random.of(-most, most));
  std::vector<float> multiplier(f.outputs, 1.0f), y(c.pixels() * f.outputs);
  std::vector<int32_t> offset(f.outputs, 3);
  std::vector<uint8_t> codes(y.size()), other(y.size()), added(y.size());
  for (auto& code : other) code = static_cast<uint8_t>(random.of(0, 255));
  const int32_t other_zero_point = static_cast<int32_t>(random.of(0, 255));
  const float multipliers[] = {0.37f, -1.9f, 1e30f, -3e8f}, other_multiplier = multipliers[random.of(0, 3)];
  c.x = x.data();
  c.packed = packed.data();
  k.pack_filter(f, weight.data(), packed.data());
  const int64_t threads = random.of(1, 3);
  const auto run = [&](void* to, bool as_codes, const uint8_t* with) {
    c.result = {multiplier.data(), offset.data(), as_codes ? 5.0f : -1e30f, as_codes ? 250.0f : 1e30f, as_codes,
                as_codes, 100, to, with, other_multiplier, other_zero_point};
    const int64_t tasks = k.conv_tasks(c, threads), middle = random.of(0, tasks);
    k.conv(c, threads, middle, tasks);
    k.conv(c, threads, 0, middle);
  };
  run(y.data(), false, nullptr);
  for (auto& value : multiplier) value = 1 / 512.0f;
  run(codes.data(), true, nullptr);
  run(added.data(), true, other.data());
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const int64_t output = i % f.outputs, pixel = i / f.outputs, row = pixel / c.out_width;
    const int64_t sum = conv_sum(c, weight, row / c.out_height, row % c.out_height, pixel % c.out_width, output) + 3;
    const float t = static_cast<float>(sum) / 512, term = static_cast<float>(other[i] - other_zero_point) * other_multiplier;
    const auto code_of = [](float v) { return std::fmin(std::fmax(std::nearbyint(static_cast<double>(v)) + 100, 5), 250); };
    if (y[i] == static_cast<float>(sum) && codes[i] == code_of(t) && added[i] == code_of(t + term)) continue;
    std::printf("%s, conv %lld, output %lld: found %.9g, %d and %d, expected %lld, %g and %g\n", k.name,
                static_cast<long long>(number), static_cast<long long>(i), static_cast<double>(y[i]), codes[i], added[i],
                static_cast<long long>(sum), code_of(t), code_of(t + term));
    std::exit(1);
  }
}

} // namespace fewbit
