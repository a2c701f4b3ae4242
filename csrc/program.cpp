// A list of steps on codes as one operator: see ops/program.py, which writes programs, for what their words are.
//
// A program is only data: nothing in it is trusted but numbers that can make no more than a result wrong. It is read twice,
// first without running anything, to check each step for these inputs and to see how large the slots of memory must be.
// Slots are a thread's own and stay from call to call: what one step writes, the next finds in the cache.
#include <torch/csrc/stable/library.h>

#include "steps.h"

namespace fewbit {

namespace {

constexpr int64_t kMagic = 0x316d6172676f7270, kAlignment = 64;

struct Header {
  int64_t magic, bytes, words, steps, inputs, results, slots, reserved;
};
static_assert(sizeof(Header) == kAlignment);

enum class Kind : int64_t { quantize, codes, conv, linear, add, average, lookup, max_pool, cat, reshape, dequantize };

Scratch& arena() {
  thread_local Scratch memory;
  return memory;
}

class Program {
 public:
  explicit Program(const Tensor& blob) {
    bool valid = blob.scalar_type() == ScalarType::Byte && blob.dim() == 1 && blob.is_contiguous();
    valid = valid && blob.numel() >= static_cast<int64_t>(sizeof(Header));
    data_ = valid ? static_cast<const uint8_t*>(blob.const_data_ptr()) : nullptr;
    valid = valid && reinterpret_cast<uintptr_t>(data_) % kAlignment == 0;
    if (valid) std::memcpy(&header_, data_, sizeof(header_));
    const int64_t most = valid ? blob.numel() / 8 : 0;
    valid = valid && header_.magic == kMagic && header_.bytes == blob.numel();
    for (const int64_t count : {header_.steps, header_.inputs, header_.results, header_.slots, header_.words})
      valid = valid && count >= 0 && count <= most - static_cast<int64_t>(sizeof(Header)) / 8;
    STD_TORCH_CHECK(valid, "fewbit: the program is not one that fewbit.ops.program makes, or was changed: found ",
                    described(blob), ".");
    restart();
  }

  const Header& header() const { return header_; }
  void restart() { next_ = sizeof(Header) / 8; }

  int64_t word() {
    STD_TORCH_CHECK(next_ < static_cast<int64_t>(sizeof(Header)) / 8 + header_.words,
                    "fewbit: the program ends within a step.");
    int64_t value;
    std::memcpy(&value, data_ + 8 * next_++, 8);
    return value;
  }
  double number() {
    const int64_t bits = word();
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
  }
  void pair(int64_t (&values)[2]) {
    for (int64_t& value : values) value = word();
  }
  // The constant of `bytes` whose place is the next word.
  const uint8_t* constant(int64_t bytes) {
    const int64_t place = word();
    STD_TORCH_CHECK(place >= 0 && place % kAlignment == 0 && place <= header_.bytes && bytes <= header_.bytes - place,
                    "fewbit: the program has no constant of ", bytes, " bytes at ", place, ".");
    return data_ + place;
  }

 private:
  Header header_{};
  const uint8_t* data_;
  int64_t next_ = 0; // word
};

struct Value {
  Shape shape;
  const uint8_t* data = nullptr; // null where nothing can read it: float32
};

class Run {
 public:
  Run(const Tensor& blob, std::vector<Tensor>& inputs)
      : program_(blob), inputs_(inputs), values_(program_.header().steps), slots_(program_.header().slots) {
    const int64_t wanted = program_.header().inputs, given = static_cast<int64_t>(inputs.size());
    STD_TORCH_CHECK(given == wanted, "fewbit: the program has ", wanted, " inputs, found ", given, ".");
  }

  std::vector<Tensor> results() {
    results_.resize(program_.header().results);
    all_steps();
    int64_t bytes = 0;
    for (Slot& slot : slots_) {
      slot.place = bytes;
      bytes += round_up(slot.bytes, kAlignment);
    }
    memory_ = static_cast<uint8_t*>(arena().get(static_cast<size_t>(bytes)));
    running_ = true;
    all_steps();
    arena().release_if_large();
    std::vector<Tensor> found;
    for (std::optional<Tensor>& result : results_) {
      STD_TORCH_CHECK(result, "fewbit: the program does not make each of its results.");
      found.push_back(std::move(*result));
    }
    return found;
  }

 private:
  struct Slot {
    int64_t bytes = 0, place = 0;
  };

  void all_steps() {
    program_.restart();
    for (step_ = 0; step_ < program_.header().steps; ++step_) {
      const int64_t kind = program_.word();
      place_ = program_.word();
      switch (static_cast<Kind>(kind)) {
        case Kind::quantize: quantize_step(); break;
        case Kind::codes: codes_step(); break;
        case Kind::conv: conv_step(false); break;
        case Kind::linear: conv_step(true); break;
        case Kind::add: add_step(); break;
        case Kind::average: average_step(); break;
        case Kind::lookup: lookup_step(); break;
        case Kind::max_pool: max_pool_step(); break;
        case Kind::cat: cat_step(); break;
        case Kind::reshape: reshape_step(); break;
        case Kind::dequantize: dequantize_step(); break;
        default: STD_TORCH_CHECK(false, "fewbit: the program has a step of unknown kind ", kind, ".");
      }
    }
  }

  const Tensor& input(ScalarType type, const char* name) {
    const int64_t index = program_.word();
    STD_TORCH_CHECK(index >= 0 && index < program_.header().inputs, "fewbit: the program has no input ", index, ".");
    const Tensor& x = inputs_[index];
    STD_TORCH_CHECK(x.scalar_type() == type, "fewbit: input ", index, " of the program must be ", name, ", found ",
                    described(x), ".");
    return x;
  }

  // Codes that an earlier step made.
  const Value& value() { return value(program_.word()); }
  const Value& value(int64_t index) {
    STD_TORCH_CHECK(index >= 0 && index < step_ && (!running_ || values_[index].data || !values_[index].shape.count()),
                    "fewbit: step ", step_, " of the program cannot read value ", index, ".");
    return values_[index];
  }

  // Where this step writes its result: null if it does not run.
  uint8_t* result(const Shape& shape, bool codes = true) {
    values_[step_].shape = shape;
    values_[step_].data = nullptr;
    if (place_ < 0) return returned(shape, codes);
    STD_TORCH_CHECK(codes && place_ < program_.header().slots, "fewbit: the program has no slot ", place_, ".");
    Slot& slot = slots_[place_];
    if (!running_) {
      slot.bytes = std::max(slot.bytes, shape.count());
      return nullptr;
    }
    STD_TORCH_CHECK(shape.count() <= slot.bytes, "fewbit: the program was changed while it ran.");
    uint8_t* out = memory_ + slot.place;
    values_[step_].data = out;
    return out;
  }

  uint8_t* returned(const Shape& shape, bool codes) {
    const int64_t index = -1 - place_;
    STD_TORCH_CHECK(index < program_.header().results && !results_[index], "fewbit: the program has no result ", index,
                    " to be made.");
    if (!running_) return nullptr;
    results_[index] = new_tensor(shape.vector(), codes ? ScalarType::Byte : ScalarType::Float);
    uint8_t* out = static_cast<uint8_t*>(results_[index]->mutable_data_ptr());
    if (codes) values_[step_].data = out;
    return out;
  }

  std::optional<int64_t> zero_point() { // -1: float32
    const int64_t zero_point = program_.word();
    return zero_point < 0 ? std::nullopt : std::optional<int64_t>(zero_point);
  }

  void set_bounds(Rescale& r) {
    const double low = program_.number(), high = program_.number();
    fewbit::set_bounds(r, low, high, zero_point());
  }

  void quantize_step() {
    const Tensor& x = input(ScalarType::Float, "float32");
    const bool to_last = program_.word() != 0; // channels, from the second axis
    const float scale = scale_of(program_.number());
    const int32_t zero = code_of(program_.word(), "zero_point");
    const Shape shape(x);
    STD_TORCH_CHECK(!to_last || shape.axes() == 4, "fewbit: an image must be [batch, channels, height, width], found ",
                    described(x), ".");
    uint8_t* out = result(to_last ? Shape{shape[0], shape[2], shape[3], shape[1]} : shape);
    if (!running_) return;
    const bool in_order = !to_last || is_channels_last(x);
    const Tensor y = in_order && to_last ? x : contiguous_of(x);
    const float* from = static_cast<const float*>(y.const_data_ptr());
    in_order ? quantize(from, shape.count(), scale, zero, out) : quantize_planes(from, shape, scale, zero, out);
  }

  static bool is_channels_last(const Tensor& x) {
    const int64_t channels = x.size(1), width = x.size(3);
    const int64_t strides[4] = {x.size(2) * width * channels, 1, width * channels, channels};
    for (int axis = 0; axis < 4; ++axis)
      if (x.size(axis) != 1 && x.stride(axis) != strides[axis]) return false;
    return true;
  }

  void codes_step() {
    const Tensor& x = input(ScalarType::Byte, "uint8");
    values_[step_] = {Shape(x), nullptr};
    if (!running_) return;
    kept_.push_back(contiguous_of(x));
    values_[step_].data = static_cast<const uint8_t*>(kept_.back().const_data_ptr());
  }

  void conv_step(bool linear) {
    const Value& x = value();
    Conv c{};
    int64_t shape[4];
    for (int64_t& size : shape) size = program_.word();
    const int64_t groups = program_.word();
    c.filter = filter_of(shape, groups);
    const int64_t bytes = c.filter.packed_bytes(), outputs = c.filter.outputs;
    c.packed = program_.constant(bytes);
    c.result.multiplier = reinterpret_cast<const float*>(program_.constant(outputs * 4));
    c.result.offset = reinterpret_cast<const int32_t*>(program_.constant(outputs * 4));
    c.result.bounded = program_.word() != 0;
    set_bounds(c.result);
    const int64_t other = program_.word(); // -1: none
    const double other_multiplier = program_.number();
    const int64_t other_zero_point = program_.word();
    if (!linear) {
      program_.pair(c.stride);
      program_.pair(c.padding);
      program_.pair(c.dilation);
      c.zero_point = static_cast<uint8_t>(code_of(program_.word(), "input_zero_point"));
    }
    check_packed(c.filter, c.packed, bytes);
    const Shape y = linear ? set_rows(c, x.shape) : set_image(c, x.shape);
    if (other != -1) {
      set_other(c.result, y, value(other).shape, other_multiplier, other_zero_point);
      c.result.other = value(other).data;
    }
    c.x = x.data;
    c.result.out = result(y, c.result.codes);
    if (running_) run(c);
  }

  void add_step() {
    const Value &a = value(), &b = value();
    STD_TORCH_CHECK(a.shape == b.shape, "fewbit: the terms of a sum must be of the same shape, found ", listed(a.shape),
                    " and ", listed(b.shape), ".");
    Add add{a.data, b.data, 0, 0, 0, 0, {}};
    add.a_multiplier = static_cast<float>(program_.number());
    add.a_zero_point = code_of(program_.word(), "a_zero_point");
    add.b_multiplier = static_cast<float>(program_.number());
    add.b_zero_point = code_of(program_.word(), "b_zero_point");
    set_bounds(add.result);
    STD_TORCH_CHECK(add.result.codes, "fewbit: the program has a sum without a zero point.");
    add.result.out = result(a.shape);
    if (running_) run(add, a.shape.count());
  }

  void average_step() {
    const Value& x = value();
    Average a{};
    program_.pair(a.pool.kernel);
    program_.pair(a.pool.stride);
    program_.pair(a.pool.padding);
    a.count_padding = program_.word() != 0;
    a.multiplier = static_cast<float>(program_.number());
    a.input_zero_point = code_of(program_.word(), "input_zero_point");
    a.zero_point = code_of(program_.word(), "zero_point");
    a.pool.x = x.data;
    a.pool.out = result(set_image(a, x.shape));
    if (running_) run(a);
  }

  void lookup_step() {
    const Value& x = value();
    const uint8_t* table = program_.constant(256);
    uint8_t* out = result(x.shape);
    if (running_) lookup(x.data, x.shape.count(), table, out);
  }

  void max_pool_step() {
    const Value& x = value();
    Pool p{};
    program_.pair(p.kernel);
    program_.pair(p.stride);
    program_.pair(p.padding);
    program_.pair(p.dilation);
    const bool ceil_mode = program_.word() != 0;
    p.x = x.data;
    p.out = result(set_image(p, x.shape, ceil_mode));
    if (running_) run(p);
  }

  void cat_step() {
    const int64_t axis = program_.word(), count = program_.word();
    std::vector<const Value*> parts;
    int64_t total = 0, outer = 1;
    for (int64_t i = 0; i < count; ++i) {
      parts.push_back(&value());
      const Shape &shape = parts.back()->shape, &first = parts[0]->shape;
      STD_TORCH_CHECK(axis >= 0 && axis < shape.axes() && shape.axes() == first.axes() &&
                          shape.with(static_cast<int>(axis), first[static_cast<int>(axis)]) == first,
                      "fewbit: only axis ", axis, " may differ in a concatenation, found ", listed(first), " and ",
                      listed(shape), ".");
      total += shape[static_cast<int>(axis)];
    }
    STD_TORCH_CHECK(count > 0, "fewbit: the program has an empty concatenation.");
    const Shape y = parts[0]->shape.with(static_cast<int>(axis), total);
    for (int i = 0; i < axis; ++i) outer *= y[i];
    uint8_t* out = result(y);
    if (!running_ || y.count() == 0) return;
    const int64_t row = y.count() / outer;
    for (const Value* part : parts) {
      const int64_t bytes = part->shape.count() / outer;
      for (int64_t i = 0; i < outer; ++i) std::memmove(out + i * row, part->data + i * bytes, bytes);
      out += bytes;
    }
  }

  // Axes from the second on are known; no byte moves.
  void reshape_step() {
    const Value& x = value();
    Shape before = rest(x.shape.count()), after = rest(x.shape.count());
    STD_TORCH_CHECK(before == x.shape, "fewbit: the program was made for a value ", listed(before), ", found ",
                    listed(x.shape), ".");
    values_[step_] = {after, x.data};
  }

  // A shape of `count` elements, of which the program has all sizes but the first.
  Shape rest(int64_t count) {
    int64_t sizes[Shape::kMost], axes = program_.word();
    STD_TORCH_CHECK(axes >= 1 && axes <= Shape::kMost, "fewbit: the program has a value with ", axes, " axes.");
    sizes[0] = 1;
    for (int64_t i = 1; i < axes; ++i) sizes[i] = program_.word();
    const int64_t one = Shape(sizes, axes).count();
    STD_TORCH_CHECK(one > 0 && count % one == 0, "fewbit: the program was made for values of a multiple of ", one,
                    " elements, found ", count, ".");
    sizes[0] = count / one;
    return Shape(sizes, axes);
  }

  void dequantize_step() {
    const Value& x = value();
    const float scale = static_cast<float>(program_.number());
    const int32_t zero = code_of(program_.word(), "zero_point");
    STD_TORCH_CHECK(place_ < 0, "fewbit: the program keeps float32 for itself.");
    uint8_t* out = result(x.shape, false);
    if (running_) dequantize(x.data, x.shape.count(), scale, zero, reinterpret_cast<float*>(out));
  }

  Program program_;
  std::vector<Tensor>& inputs_;
  std::vector<Tensor> kept_;
  std::vector<Value> values_;
  std::vector<Slot> slots_;
  std::vector<std::optional<Tensor>> results_;
  uint8_t* memory_ = nullptr;
  bool running_ = false;
  int64_t step_ = 0, place_ = 0; // of its result
};

std::vector<Tensor> run_program(std::vector<Tensor> inputs, Tensor program) { return Run(program, inputs).results(); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) { m.impl("run_program", TORCH_BOX(&run_program)); }

} // namespace fewbit
