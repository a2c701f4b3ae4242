// The kernels of each instruction set that this CPU has against plain loops, on random problems. Needs no torch.
// Arguments: the number of problems, then names of instruction sets (none: all).
//
// Scales are often powers of two and activations their multiples, so that every sum is an integer that float holds: then
// results have to be right to the bit, in whatever order they were added up. Others get the error bound of float sums.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "conv_check.h"
#include "kernels.h"

namespace fewbit {
namespace {

struct Random {
  uint64_t state;
  uint64_t next() { // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t of(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % (high - low + 1)); }
  bool one_in(int64_t n) { return of(1, n) == 1; }
  float signed_unit() { return static_cast<float>(of(-(1 << 24), 1 << 24)) / (1 << 24); }
};

// ---- 16-bit floats, by arithmetic

struct Format {
  int bits, least, most; // of the significand without its first bit; exponents of normal numbers
};
constexpr Format kBf16{7, -126, 127}, kF16{10, -14, 15};

Format format_of(Type type) { return type == Type::bf16 ? kBf16 : kF16; }

uint16_t encode(double x, Format f) {
  const int sign = std::signbit(x) ? 0x8000 : 0, infinity = (f.most - f.least + 2) << f.bits;
  if (std::isnan(x)) return static_cast<uint16_t>(infinity | 1 << (f.bits - 1));
  const double magnitude = std::fabs(x);
  const int e = magnitude == 0 ? f.least : std::isinf(x) ? f.most + 1 : std::max(std::ilogb(magnitude), f.least);
  if (e > f.most) return static_cast<uint16_t>(sign | infinity);
  const int significand = static_cast<int>(std::nearbyint(std::ldexp(magnitude, f.bits - e)));
  return static_cast<uint16_t>(sign | (((e - f.least) << f.bits) + significand));
}

double decode(uint16_t bits, Format f) {
  const int exponent = (bits & 0x7fff) >> f.bits, significand = bits & ((1 << f.bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == f.most - f.least + 2) return significand ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(significand, f.least - f.bits);
  return sign * std::ldexp(significand + (1 << f.bits), exponent - 1 + f.least - f.bits);
}

// Numbers as a tensor of `type` holds them.
struct Values {
  Type type;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Values(Type type, int64_t count, float fill = 0) : type(type) {
    if (type == Type::f32) {
      floats.assign(count, fill);
    } else {
      halves.assign(count, encode(fill, format_of(type)));
    }
  }
  void* data() { return type == Type::f32 ? static_cast<void*>(floats.data()) : halves.data(); }
  float operator[](int64_t i) const {
    return type == Type::f32 ? floats[i] : static_cast<float>(decode(halves[i], format_of(type)));
  }
  void set(int64_t i, float x) {
    if (type == Type::f32) {
      floats[i] = x;
    } else {
      halves[i] = encode(x, format_of(type));
    }
  }
  static float rounded(double x, Type type) {
    return type == Type::f32 ? static_cast<float>(x) : static_cast<float>(decode(encode(x, format_of(type)), format_of(type)));
  }
};

// ---- a problem and its solution

enum class Kind { integers, floats, extremes, infinities };
const char* const kKinds[] = {"integers", "floats", "extremes", "infinities"};
const char* const kTypes[] = {"f32", "bf16", "f16"};
const char* const kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};

struct Problem {
  int64_t number;
  Kind kind;
  int64_t rows;
  int64_t weight_group, input_group; // 0: one scale a row
  Weight weight;
  std::vector<int32_t> codes; // [channels, columns], signed
  std::vector<uint8_t> packed;
  std::vector<int8_t> zero_point;
  Values scale{Type::f32, 0}, x{Type::f32, 0};
  std::vector<float> bias;
  Type out;
  int64_t gap; // between rows of the output
  Activation activation;

  // What quantizing the activations has to give.
  std::vector<int32_t> q;   // [rows, columns]
  std::vector<float> input_scale; // [rows, groups]
  std::vector<int32_t> sums;

  // Sums and the largest that any of their parts can be, [rows, channels]; the same with float activations.
  std::vector<double> sum, bound, float_sum, float_bound;

  int32_t zero(int64_t n, int64_t g) const { return zero_point.empty() ? 0 : zero_point[place(n, g)]; }
  float scale_at(int64_t n, int64_t g) const { return scale[place(n, g)]; }
  int64_t place(int64_t n, int64_t g) const { return n * weight.scale_stride + (weight.scale_stride == 1 ? 0 : g); }
};

bool has_integers(const Problem& p) { return p.kind == Kind::integers || p.kind == Kind::extremes; }

std::string describe(const Problem& p) {
  char text[400];
  std::snprintf(text, sizeof(text),
                "problem %lld (%s): rows %lld, channels %lld, columns %lld, bits %d, groups %lld of weights and %lld of "
                "inputs, scales %s%s, x %s, out %s, bias %d, %s",
                static_cast<long long>(p.number), kKinds[static_cast<int>(p.kind)], static_cast<long long>(p.rows),
                static_cast<long long>(p.weight.rows), static_cast<long long>(p.weight.columns), p.weight.bits,
                static_cast<long long>(p.weight_group), static_cast<long long>(p.input_group),
                kTypes[static_cast<int>(p.scale.type)], p.zero_point.empty() ? "" : ", zero points",
                kTypes[static_cast<int>(p.x.type)], kTypes[static_cast<int>(p.out)], !p.bias.empty(),
                kActivations[static_cast<int>(p.activation)]);
  return text;
}

void make_weight(Problem& p, Random& random) {
  Weight& w = p.weight;
  const int32_t least = w.bits == 8 ? -128 : -8, most = -least - 1;
  const int64_t style = p.kind == Kind::extremes ? random.of(1, 3) : 0;
  p.codes.resize(w.rows * w.columns);
  for (auto& code : p.codes) {
    code = static_cast<int32_t>(style == 0   ? random.of(least, most)
                                : style == 1 ? least
                                : style == 2 ? most
                                             : (random.one_in(2) ? least : most));
  }
  w.row_bytes = w.bits == 8 ? w.columns : ceil_div(w.columns, 8) * 4;
  p.packed.resize(w.rows * w.row_bytes);
  for (auto& byte : p.packed) byte = static_cast<uint8_t>(random.next()); // codes beyond the columns must not matter
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t k = 0; k < w.columns; ++k) {
      const int32_t code = p.codes[n * w.columns + k];
      if (w.bits == 8) {
        p.packed[n * w.row_bytes + k] = static_cast<uint8_t>(code);
      } else {
        uint8_t& byte = p.packed[n * w.row_bytes + k / 2];
        byte = static_cast<uint8_t>(k % 2 ? (byte & 15) | (code + 8) << 4 : (byte & 0xf0) | (code + 8));
      }
    }
  }
  p.scale = Values(random.one_in(2) ? Type::f32 : Type::bf16, w.rows * w.scale_stride);
  for (int64_t i = 0; i < w.rows * w.scale_stride; ++i) {
    const float unit = 0.01f * (1.5f + random.signed_unit());
    p.scale.set(i, has_integers(p) ? static_cast<float>(random.of(1, 2)) : unit);
  }
  if (random.one_in(2)) {
    p.zero_point.resize(w.rows * w.scale_stride);
    for (auto& zero : p.zero_point) {
      const int64_t extreme = random.one_in(2) ? least : most;
      zero = static_cast<int8_t>(random.one_in(4) ? extreme : random.of(least, most));
    }
  }
}

// Activations of one scale: columns [begin, end) of a row.
void make_run(Problem& p, Random& random, int64_t row, int64_t begin, int64_t end) {
  const auto set = [&](int64_t k, float value) { p.x.set(row * p.weight.columns + k, value); };
  if (random.one_in(20)) return; // zeros
  if (!has_integers(p)) {
    int e = static_cast<int>(random.of(-8, 8));
    // Where there is one group only the same operations are expected, so any magnitude will do.
    if (p.weight.groups == 1 && p.x.type != Type::f16 && random.one_in(4)) e = static_cast<int>(random.of(-149, 127));
    for (int64_t k = begin; k < end; ++k) set(k, std::ldexp(random.signed_unit(), e));
    return;
  }
  const float scale = static_cast<float>(random.of(1, 2));
  const int64_t style = p.kind == Kind::extremes ? random.of(1, 3) : 0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t code = style == 0 ? random.of(-127, 127) : style == 1 || (style == 3 && random.one_in(2)) ? 127 : -127;
    set(k, scale * static_cast<float>(code));
  }
  set(random.of(begin, end - 1), random.one_in(2) ? 127 * scale : -127 * scale);
}

void make_input(Problem& p, Random& random) {
  const int64_t columns = p.weight.columns, run = p.input_group ? p.input_group : columns;
  p.x = Values(static_cast<Type>(random.of(0, 2)), p.rows * columns);
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t k = 0; k < columns; k += run) make_run(p, random, row, k, std::min(k + run, columns));
  if (p.kind != Kind::infinities) return;
  for (int64_t i = random.of(1, 2 * p.rows); i > 0; --i) {
    const float unusual[] = {HUGE_VALF, -HUGE_VALF, std::nanf("")};
    p.x.set(random.of(0, p.rows * columns - 1), unusual[random.of(0, 2)]);
  }
}

// Symmetric int8: the scale is max|x| / 127, no less than the least normal number; codes are rounded half to even.
void quantize_plainly(Problem& p) {
  const Weight& w = p.weight;
  p.q.assign(p.rows * w.columns, 0);
  p.input_scale.assign(p.rows * w.groups, 0);
  p.sums.assign(p.rows * w.groups, 0);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int64_t begin = g * w.group, end = std::min(begin + w.group, w.columns);
      float most = 0;
      bool usable = true;
      for (int64_t k = p.input_group ? begin : 0; k < (p.input_group ? end : w.columns); ++k) {
        const float x = p.x[row * w.columns + k];
        usable = usable && std::isfinite(x);
        most = std::max(most, std::fabs(x));
      }
      float& scale = p.input_scale[row * w.groups + g];
      scale = most == 0 ? 1 : static_cast<float>(std::max(static_cast<double>(most) / 127, static_cast<double>(FLT_MIN)));
      if (!usable) scale = std::nanf("");
      for (int64_t k = begin; usable && k < end; ++k) {
        const float code = std::nearbyint(p.x[row * w.columns + k] / scale);
        p.q[row * w.columns + k] = static_cast<int32_t>(std::clamp(code, -127.0f, 127.0f));
        p.sums[row * w.groups + g] += p.q[row * w.columns + k];
      }
    }
  }
}

void multiply_plainly(Problem& p) {
  const Weight& w = p.weight;
  const int64_t count = p.rows * w.rows, offset = w.bits == 8 ? 128 : 8;
  for (auto* values : {&p.sum, &p.bound, &p.float_sum, &p.float_bound}) values->assign(count, 0);
  std::vector<double> x(w.columns);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t k = 0; k < w.columns; ++k) x[k] = p.x[row * w.columns + k];
    for (int64_t n = 0; n < w.rows; ++n) {
      const int32_t* codes = &p.codes[n * w.columns];
      const int32_t* q = &p.q[row * w.columns];
      const int64_t i = row * w.rows + n;
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t begin = g * w.group, end = std::min(begin + w.group, w.columns), zero = p.zero(n, g);
        const double scale = p.scale_at(n, g), input_scale = p.input_scale[row * w.groups + g];
        int64_t sum = 0, magnitudes = 0;
        double float_sum = 0, float_magnitudes = 0;
        for (int64_t k = begin; k < end; ++k) {
          sum += (codes[k] - zero) * q[k];
          magnitudes += std::abs(q[k]);
          float_sum += static_cast<double>(codes[k] - zero) * x[k];
          float_magnitudes += std::fabs(x[k]);
        }
        const int64_t most = 2 * offset + std::abs(zero); // kernels may raise codes, and take that away later
        if (w.groups == 1) { // the same operations, in float
          p.sum[i] = static_cast<float>(sum) * static_cast<float>(input_scale) * static_cast<float>(scale);
        } else {
          p.sum[i] += static_cast<double>(sum) * input_scale * scale;
          p.bound[i] += static_cast<double>(magnitudes * most) * input_scale * scale;
        }
        p.float_sum[i] += float_sum * scale;
        p.float_bound[i] += float_magnitudes * static_cast<double>(most) * scale;
      }
    }
  }
}

Problem make_problem(int64_t number) {
  Random random{static_cast<uint64_t>(number) * 1000003};
  Problem p;
  p.number = number;
  p.kind = static_cast<Kind>(random.of(0, 3));
  p.rows = random.one_in(2) ? random.of(1, 6) : random.of(1, 40);
  Weight& w = p.weight;
  w.rows = random.one_in(2) ? random.of(1, 100) : random.of(1, 34);
  w.columns = random.one_in(4) ? random.of(1, 1100) : random.one_in(2) ? random.of(1, 300) : random.of(1, 9) * 32;
  if (random.one_in(50)) w.columns = random.of(1, 8) * 512;
  w.bits = random.one_in(2) ? 4 : 8;
  const int64_t groups[] = {0, 32, 64, 96, 128, 1024};
  p.weight_group = groups[random.of(0, 5)];
  p.input_group = p.weight_group == 0 ? groups[random.of(0, 5)] : random.one_in(2) ? p.weight_group : 0;
  w.group = std::max(p.weight_group, p.input_group);
  if (w.group == 0) w.group = round_up(w.columns, kBlock);
  w.groups = ceil_div(w.columns, w.group);
  w.scale_stride = p.weight_group == 0 ? 1 : w.groups;
  make_weight(p, random);
  make_input(p, random);
  w.codes = p.packed.data();
  w.scale = p.scale.data();
  w.scale_type = p.scale.type;
  w.zero_point = p.zero_point.empty() ? nullptr : p.zero_point.data();
  if (random.one_in(2)) {
    p.bias.resize(w.rows);
    for (auto& bias : p.bias) bias = static_cast<float>(random.of(-1000, 1000));
  }
  p.out = static_cast<Type>(random.of(0, 2));
  p.gap = random.one_in(2) ? 0 : random.of(1, 9);
  p.activation = random.one_in(2) ? Activation::none : static_cast<Activation>(random.of(0, 4));
  quantize_plainly(p);
  multiply_plainly(p);
  return p;
}

// ---- comparisons

[[noreturn]] void fail(const Problem& p, const Kernels& k, const std::string& what, double found, double low, double high) {
  std::printf("%s, %s: found %.9g, expected %.9g to %.9g\n%s\n", k.name, what.c_str(), found, low, high, describe(p).c_str());
  std::exit(1);
}

void expect(const Problem& p, const Kernels& k, const std::string& what, double found, double low, double high) {
  if (std::isnan(low) ? !std::isnan(found) : !(low <= found && found <= high)) fail(p, k, what, found, low, high);
}

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < 0 ? 0 : x;
    case Activation::gelu: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
  }
  return 0;
}

constexpr float kUntouched = -3.0f;

Output output_of(const Problem& p, Values& y) {
  return {y.data(), p.weight.rows + p.gap, p.out, p.bias.empty() ? nullptr : p.bias.data(), p.activation};
}

Values empty_output(const Problem& p, int64_t rows) { return {p.out, rows * (p.weight.rows + p.gap), kUntouched}; }

// Rows [0, rows) of the output. `exact`: where the bound allows, results are right to the bit.
void check_output(const Problem& p, const Kernels& k, const std::string& what, const Values& y, int64_t rows,
                  const std::vector<double>& sums, const std::vector<double>& bounds, bool exact) {
  const int64_t stride = p.weight.rows + p.gap;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < stride; ++n) {
      const std::string where = what + ", row " + std::to_string(row) + ", channel " + std::to_string(n);
      const double found = y[row * stride + n];
      if (n >= p.weight.rows) {
        expect(p, k, where + " (beyond the last)", found, kUntouched, kUntouched);
        continue;
      }
      const double bias = p.bias.empty() ? 0 : p.bias[n], sum = sums[row * p.weight.rows + n];
      const double bound = bounds[row * p.weight.rows + n];
      if (bound > FLT_MAX / 4) continue; // may overflow on the way
      const bool to_the_bit = exact && bound + std::fabs(bias) < 1 << 24;
      double error = to_the_bit ? 0 : (bound + std::fabs(bias)) * 4 * FLT_EPSILON + FLT_MIN / 1000;
      // A float sum of an exact sum and the bias is what the kernels have, too.
      const double value = to_the_bit ? static_cast<double>(static_cast<float>(sum) + static_cast<float>(bias)) : sum + bias;
      const double expected = activated(value, p.activation);
      error *= 1.2; // the steepest of the activations
      if (p.activation > Activation::relu) error += 1e-6 * (1 + std::fabs(value));
      if (std::isinf(value) && p.activation > Activation::relu) continue; // inf * 0 or not
      expect(p, k, where, found, Values::rounded(expected - error, p.out), Values::rounded(expected + error, p.out));
    }
  }
}

struct Activations {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> sums, bonus, starts;
  Quantized to;
};

Activations quantize(const Problem& p, const Kernels& k, Random& random, int64_t rows, bool gemv) {
  const Weight& w = p.weight;
  const int64_t stride = k.code_bytes(w) + random.of(0, 64), starts = k.starts(w);
  Activations q;
  q.codes.assign(rows * stride, 77);
  q.scale.assign(rows * w.groups, 0);
  q.sums.assign(rows * w.groups, 0);
  q.bonus.assign(rows * w.groups, 0);
  q.starts.assign(rows * starts, 0);
  q.to = {q.codes.data(), stride, q.scale.data(), q.sums.data(), q.bonus.data(), q.starts.data(), starts, rows};
  const void* x = const_cast<Values&>(p.x).data();
  for (int64_t row = 0; row < rows; ++row) k.quantize(x, p.x.type, row, w.columns, p.input_group, w, gemv, q.to);
  for (int64_t i = 0; i < rows * w.groups; ++i) {
    expect(p, k, "input scale " + std::to_string(i), q.scale[i], p.input_scale[i], p.input_scale[i]);
    if (gemv || w.zero_point) expect(p, k, "sum of codes " + std::to_string(i), q.sums[i], p.sums[i], p.sums[i]);
  }
  const int64_t written = round_up(w.columns, kPadding);
  if (w.bits == 4 || k.code_bytes(w) != written) return q; // else they are in natural order
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < written; ++i) {
      const int32_t code = i < w.columns ? p.q[row * w.columns + i] : 0;
      expect(p, k, "code " + std::to_string(i) + " of row " + std::to_string(row), q.codes[row * stride + i], code, code);
    }
  }
  return q;
}

void check_gemv(const Problem& p, const Kernels& k, Random& random) {
  const int64_t rows = std::min(p.rows, k.gemv_rows), middle = random.of(0, p.weight.rows);
  const Activations q = quantize(p, k, random, rows, true);
  Values y = empty_output(p, rows);
  k.gemv(p.weight, q.to, 0, middle, output_of(p, y));
  k.gemv(p.weight, q.to, middle, p.weight.rows, output_of(p, y));
  check_output(p, k, "gemv", y, rows, p.sum, p.bound, p.weight.groups == 1 || has_integers(p));
}

void check_multiply(const Problem& p, const Kernels& k, Random& random) {
  const int64_t middle = random.of(0, p.rows);
  const Activations q = quantize(p, k, random, p.rows, false);
  Values y = empty_output(p, p.rows);
  for (int64_t first = 0; first < p.weight.rows; first += k.panel_columns) {
    std::vector<uint8_t> panel(k.panel_bytes(p.weight), 0x55);
    k.pack(p.weight, first, panel.data());
    k.multiply(p.weight, first, panel.data(), q.to, 0, middle, panel.data(), static_cast<int64_t>(panel.size()), output_of(p, y));
    k.multiply(p.weight, first, panel.data(), q.to, middle, p.rows, nullptr, 0, output_of(p, y));
  }
  check_output(p, k, "multiply", y, p.rows, p.sum, p.bound, p.weight.groups == 1 || has_integers(p));
}

void check_linear_float(const Problem& p, const Kernels& k, Random& random) {
  if (p.kind == Kind::infinities) return; // sums of them depend on the order
  const Weight& w = p.weight;
  std::vector<float> x(p.rows * w.columns);
  k.to_float(const_cast<Values&>(p.x).data(), p.x.type, p.rows * w.columns, x.data());
  for (int64_t i = 0; i < p.rows * w.columns; ++i) expect(p, k, "to_float " + std::to_string(i), x[i], p.x[i], p.x[i]);
  std::vector<float> scratch(k.float_scratch(), std::nanf(""));
  const int64_t rows = std::min(p.rows, k.float_rows), middle = random.of(0, w.rows);
  Values y = empty_output(p, rows);
  k.linear_float(w, x.data(), rows, 0, middle, scratch.data(), output_of(p, y));
  k.linear_float(w, x.data(), rows, middle, w.rows, scratch.data(), output_of(p, y));
  check_output(p, k, "linear_float", y, rows, p.float_sum, p.float_bound, has_integers(p));
}

void check_finish(const Problem& p, const Kernels& k, Random& random) {
  const int64_t channels = p.weight.rows, middle = random.of(0, channels);
  std::vector<float> sums(p.sum.begin(), p.sum.end());
  const std::vector<double> expected(sums.begin(), sums.end()), exact(sums.size(), 0);
  Values y = empty_output(p, p.rows);
  for (int64_t row = 0; row < p.rows; ++row) {
    k.finish(&sums[row * channels], middle, output_of(p, y), row, 0);
    k.finish(sums.data() + row * channels + middle, channels - middle, output_of(p, y), row, middle);
  }
  check_output(p, k, "finish", y, p.rows, expected, exact, true);
}

void check_rows(const Problem& p, const Kernels& k, Random& random) {
  const Weight& w = p.weight;
  std::vector<int64_t> indices(random.of(1, 8));
  for (auto& index : indices) index = random.of(0, w.rows - 1);
  const int64_t count = static_cast<int64_t>(indices.size()), middle = random.of(0, count);
  std::vector<float> out(count * w.columns);
  k.rows(w, indices.data(), 0, middle, out.data());
  k.rows(w, indices.data(), middle, count, out.data());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < w.columns; ++j) {
      const int64_t g = j / w.group, n = indices[i];
      const float value = static_cast<float>(p.codes[n * w.columns + j] - p.zero(n, g)) * p.scale_at(n, g);
      expect(p, k, "rows " + std::to_string(i) + ", column " + std::to_string(j), out[i * w.columns + j], value, value);
    }
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check_recurrent(const Problem& p, const Kernels& k, Random& random) {
  const int64_t hidden = random.of(1, 70), begin = random.of(0, hidden), end = random.of(begin, hidden);
  std::vector<float> input(4 * hidden), recurrent(4 * hidden), h(hidden), c(hidden);
  const int e = static_cast<int>(random.of(-2, 8));
  for (auto* values : {&input, &recurrent})
    for (auto& value : *values) value = std::ldexp(random.signed_unit(), e);
  for (auto* values : {&h, &c})
    for (auto& value : *values) value = random.signed_unit();
  const auto gate = [&](int64_t i, int64_t j) { return static_cast<double>(input[i * hidden + j]); };
  const auto again = [&](int64_t i, int64_t j) { return static_cast<double>(recurrent[i * hidden + j]); };
  std::vector<float> new_h = h, new_c = c, gru_h = h;
  k.lstm(input.data(), recurrent.data(), hidden, begin, end, new_h.data(), new_c.data());
  k.gru(input.data(), recurrent.data(), hidden, begin, end, gru_h.data());
  for (int64_t j = 0; j < hidden; ++j) {
    const bool computed = begin <= j && j < end;
    const double cell = sigmoid(gate(1, j) + again(1, j)) * c[j] +
                        sigmoid(gate(0, j) + again(0, j)) * std::tanh(gate(2, j) + again(2, j));
    const double out = sigmoid(gate(3, j) + again(3, j)) * std::tanh(cell);
    const double z = sigmoid(gate(1, j) + again(1, j));
    const double n = std::tanh(gate(2, j) + sigmoid(gate(0, j) + again(0, j)) * again(2, j));
    const auto close = [&](const char* what, double found, double expected, float before) {
      const double error = computed ? 1e-6 * std::ldexp(1, std::max(e, 0)) : 0; // gates have the error of float sums
      if (!computed) expected = before;
      const std::string where = what + (" " + std::to_string(j)) + " of " + std::to_string(hidden);
      expect(p, k, where, found, expected - error, expected + error);
    };
    close("lstm c", new_c[j], cell, c[j]);
    close("lstm h", new_h[j], out, h[j]);
    close("gru h", gru_h[j], n + z * (h[j] - n), h[j]);
  }
}

// Every number of 16 bits.
void check_to_float(const Kernels& k) {
  for (const Type type : {Type::bf16, Type::f16}) {
    std::vector<uint16_t> all(1 << 16);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> out(all.size());
    k.to_float(all.data(), type, static_cast<int64_t>(all.size()), out.data());
    for (size_t i = 0; i < all.size(); ++i) {
      const double value = decode(all[i], format_of(type));
      if (std::isnan(value) ? std::isnan(out[i]) : out[i] == value && std::signbit(out[i]) == std::signbit(value)) continue;
      std::printf("%s, to_float of %s 0x%04zx: found %.9g, expected %.9g\n", k.name, kTypes[static_cast<int>(type)], i,
                  static_cast<double>(out[i]), value);
      std::exit(1);
    }
  }
}

// What an output of `type` becomes, without bias.
Values stored(const Kernels& k, std::vector<float> sums, Type type, Activation activation) {
  const int64_t count = static_cast<int64_t>(sums.size());
  Values y(type, count);
  k.finish(sums.data(), count, {y.data(), count, type, nullptr, activation}, 0, 0);
  return y;
}

// Every number of 16 bits, those half way to the next one, and their neighbours in float32.
void check_from_float(const Kernels& k) {
  for (const Type type : {Type::bf16, Type::f16}) {
    const Format f = format_of(type);
    std::vector<float> values{HUGE_VALF, -HUGE_VALF, std::nanf("")};
    for (int sign : {0, 0x8000})
      for (int bits = 0; bits < (f.most - f.least + 2) << f.bits; ++bits) {
        const double low = decode(static_cast<uint16_t>(sign | bits), f);
        const double unit = std::ldexp(1, std::max(std::ilogb(low), f.least) - f.bits);
        const float middle = static_cast<float>(low + (sign ? -unit : unit) / 2);
        for (const float x : {static_cast<float>(low), middle}) {
          values.push_back(x);
          values.push_back(std::nextafter(x, HUGE_VALF));
          values.push_back(std::nextafter(x, -HUGE_VALF));
        }
      }
    const Values found = stored(k, values, type, Activation::none);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t expected = encode(values[i], f);
      const bool both_nan = std::isnan(values[i]) && std::isnan(found[static_cast<int64_t>(i)]);
      if (both_nan || found.halves[i] == expected) continue;
      std::printf("%s, %.9g to %s: found 0x%04x, expected 0x%04x\n", k.name, static_cast<double>(values[i]),
                  kTypes[static_cast<int>(type)], found.halves[i], expected);
      std::exit(1);
    }
  }
}

// Of all magnitudes.
void check_activations(const Kernels& k) {
  std::vector<float> values{0};
  for (const float sign : {-1.0f, 1.0f})
    for (float x = 1e-6f; x < 1e37f; x *= 1.01f) values.push_back(sign * x);
  for (int i = 0; i <= static_cast<int>(Activation::silu); ++i) {
    const Values found = stored(k, values, Type::f32, static_cast<Activation>(i));
    for (size_t j = 0; j < values.size(); ++j) {
      const double expected = activated(values[j], static_cast<Activation>(i));
      if (std::fabs(found.floats[j] - expected) <= 1e-6 * std::max(1.0, std::fabs(expected))) continue;
      std::printf("%s, %s of %.9g: found %.9g, expected %.9g\n", k.name, kActivations[i], static_cast<double>(values[j]),
                  static_cast<double>(found.floats[j]), expected);
      std::exit(1);
    }
  }
}

int run(int argc, char** argv) {
  const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 1000;
  std::vector<const Kernels*> chosen;
  std::string names;
  for (const Kernels* k : available()) {
    const auto is_it = [&](const char* name) { return !std::strcmp(name, k->name); };
    if (argc > 2 && std::none_of(argv + 2, argv + argc, is_it)) continue;
    chosen.push_back(k);
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  if (argc > 2 && static_cast<int>(chosen.size()) != argc - 2) {
    std::printf("of the named instruction sets, this CPU and build have: %s\n", names.c_str());
    return 1;
  }
  for (const Kernels* k : chosen) {
    check_to_float(*k);
    check_from_float(*k);
    check_activations(*k);
  }
  for (int64_t number = 1; number <= problems; ++number) {
    const Problem p = make_problem(number);
    for (const Kernels* k : chosen) {
      Random random{static_cast<uint64_t>(number)};
      check_gemv(p, *k, random);
      check_multiply(p, *k, random);
      check_linear_float(p, *k, random);
      check_finish(p, *k, random);
      check_rows(p, *k, random);
      check_recurrent(p, *k, random);
      check_conv(*k, random, number);
    }
  }
  std::printf("%lld problems, %s, ok\n", static_cast<long long>(problems), names.c_str());
  return 0;
}

} // namespace
} // namespace fewbit

int main(int argc, char** argv) { return fewbit::run(argc, argv); }
