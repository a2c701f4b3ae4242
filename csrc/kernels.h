// What an instruction set offers, and the plain data that its kernels work on.
//
// Weights are read as the checkpoint stores them: one row an output channel, nothing is repacked and no second copy is
// kept. Products with a few rows of activations read the rows of the weight as they stream by; products with many rows
// rearrange one panel of columns at a time into a thread's own cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fewbit {

constexpr int64_t kBlock = 32;    // activations that are summed in one go; groups are multiples of it
constexpr int64_t kPadding = 128; // rows of activation codes are filled up with zeros to a multiple of this

enum class Type : int32_t { f32, bf16, f16 };
enum class Activation : int32_t { none, relu, gelu, gelu_tanh, silu };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A quantized weight [rows, columns]: value = (code - zero_point) * scale.
struct Weight {
  const uint8_t* codes; // 8 bits: int8; 4 bits: two codes a byte, the first in the low bits, as code + 8
  int64_t row_bytes;
  int64_t rows, columns;
  int bits;
  int64_t group;  // columns that share a scale: a multiple of kBlock
  int64_t groups; // of a row, at least 1
  const void* scale;
  Type scale_type;         // f32 or bf16
  int64_t scale_stride;    // scales of a row: groups, or 1 where all share one
  const int8_t* zero_point; // of the scales' shape; null where all are 0
};

// Activations quantized to int8, symmetric. Each row has what its products need; see multiply_inl.h.
struct Quantized {
  int8_t* codes;   // [rows, stride], rows filled up with zeros
  int64_t stride;
  float* scale;    // [rows, groups]
  int32_t* sums;   // [rows, groups]: sums of codes, where the products need them
  int32_t* bonus;  // [rows, groups]: to be added to sums of products
  int32_t* starts; // [rows, starts_stride]: what accumulators start from
  int64_t starts_stride;
  int64_t rows;
};

// y[m, n] = activation(sum + bias[n])
struct Output {
  void* data;
  int64_t stride; // elements from row to row
  Type type;
  const float* bias; // null: none
  Activation activation;
};

// The weight of a convolution, int8 [outputs, channels, height, width], where `channels` are those of one of its groups.
struct Filter {
  int64_t outputs, channels, height, width, groups;

  bool depthwise() const { return channels == 1 && outputs == groups && groups > 1; }
  int64_t depth() const { return channels * height * width; }
  // The same on every instruction set: see conv_inl.h and depthwise_inl.h.
  int64_t packed_bytes() const {
    return kPackHeader + (depthwise() ? round_up(outputs, 16) * width * round_up(height, 4)
                                      : groups * round_up(outputs / groups, 16) * round_up(depth(), 4));
  }
  static constexpr int64_t kPackHeader = 64;
};

struct PackHeader {
  uint32_t magic;
  int32_t lanes;      // output channels of a panel: what the layout depends on
  int32_t depthwise;
  int32_t fits_int16; // whether products of two neighbouring weights, with any codes, add up within int16
};
constexpr uint32_t kPackMagic = 0x38627766;

// What becomes of int32 sums [pixels, outputs]: t = (sum + offset) * multiplier; the result is clamp(round(t) + zero_point,
// low, high) as uint8, or clamp(t, low, high) as float32. With codes `other` of the result's shape, t is that and
// (other - other_zero_point) * other_multiplier; such results are codes.
struct Rescale {
  const float* multiplier; // [outputs], as is offset
  const int32_t* offset;
  float low, high;
  bool codes;   // else float32
  bool bounded; // whether every sum times its multiplier is within int32
  int32_t zero_point;
  void* out;
  const uint8_t* other = nullptr; // of convolutions alone; apart from `out`
  float other_multiplier = 0;
  int32_t other_zero_point = 0;
};

// A convolution of uint8 codes [batch, height, width, channels of all groups]; pairs are of the height and the width.
struct Conv {
  Filter filter;
  const uint8_t* packed;
  const uint8_t* x;
  int64_t batch, height, width;
  int64_t out_height, out_width;
  int64_t stride[2], padding[2], dilation[2];
  uint8_t zero_point; // of x: the code of what surrounds the image
  Rescale result;

  int64_t channels() const { return filter.channels * filter.groups; }
  int64_t pixels() const { return batch * out_height * out_width; }
};

// Sums of two tensors of codes; as Rescale has it, with t = (a - a_zero_point) * a_multiplier + the same of b.
struct Add {
  const uint8_t *a, *b;
  float a_multiplier, b_multiplier;
  int32_t a_zero_point, b_zero_point;
  Rescale result;
};

// Windows of images [batch, height, width, channels], each of which becomes one pixel: of the largest codes, or of means.
struct Pool {
  const uint8_t* x;
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  uint8_t* out;

  int64_t rows() const { return batch * out_height; }
};

// Means of codes; as Rescale has it, with t = sum * multiplier / count.
struct Average {
  Pool pool; // without dilation
  bool count_padding;
  float multiplier;
  int32_t input_zero_point, zero_point;
};

struct Kernels {
  const char* name;
  int64_t panel_columns; // output channels that are computed together from a packed panel
  int64_t gemv_rows;     // up to this many activation rows `gemv` is used

  // Row `row` of x, read with `type`, to codes, scales and sums; the order of codes is that of `gemv` or of panels.
  void (*quantize)(const void* x, Type type, int64_t row, int64_t columns, int64_t input_group, const Weight&, bool gemv,
                   const Quantized&);
  int64_t (*code_bytes)(const Weight&); // that `quantize` writes to codes, a row
  int64_t (*starts)(const Weight&);     // int32 that it writes to starts, a row

  // Output channels [begin, end) for all rows of the input (at most gemv_rows).
  void (*gemv)(const Weight&, const Quantized&, int64_t begin, int64_t end, const Output&);

  int64_t (*panel_bytes)(const Weight&);
  void (*pack)(const Weight&, int64_t first, void* panel);
  // Output channels of the panel for the input's rows [begin, end). Meanwhile `next_bytes` of memory from `next` on, needed
  // after this, are brought nearer.
  void (*multiply)(const Weight&, int64_t first, const void* panel, const Quantized&, int64_t begin, int64_t end,
                   const void* next, int64_t next_bytes, const Output&);

  // Activations stay float: output channels [begin, end) for all rows of x [rows, columns], of which there are at most
  // float_rows. `scratch` has float_scratch() floats. float_columns of the channels are made float together.
  int64_t float_rows;
  int64_t float_columns;
  void (*linear_float)(const Weight&, const float* x, int64_t rows, int64_t begin, int64_t end, float* scratch,
                       const Output&);
  int64_t (*float_scratch)();
  void (*finish)(float* sums, int64_t count, const Output&, int64_t row, int64_t first); // what Output says, for one row

  // Rows of a table: out[i] = row indices[i], float32.
  void (*rows)(const Weight&, const int64_t* indices, int64_t begin, int64_t end, float* out);
  void (*to_float)(const void* x, Type type, int64_t count, float* out);

  // One step for hidden units [begin, end) of one sequence: gates from the input (biases included) and recurrent sums.
  void (*lstm)(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* h, float* c);
  void (*gru)(const float* input, const float* recurrent, int64_t hidden, int64_t begin, int64_t end, float* h);

  // Convolutions of codes, in tasks that may run in any order.
  int32_t conv_lanes;
  void (*pack_filter)(const Filter&, const int8_t* weight, uint8_t* packed);
  int64_t (*conv_tasks)(const Conv&, int64_t threads);
  void (*conv)(const Conv&, int64_t threads, int64_t begin, int64_t end);

  // Codes one by one.
  void (*quantize_codes)(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* out);
  // Pixels [begin, end) of planes [channels][plane] to [plane][channels].
  void (*quantize_planes)(const float* x, int64_t plane, int64_t channels, int64_t begin, int64_t end, float scale,
                          int32_t zero_point, uint8_t* out);
  void (*dequantize_codes)(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* out);
  void (*add_codes)(const Add&, int64_t begin, int64_t end);   // elements
  void (*average)(const Average&, int64_t begin, int64_t end); // rows of the output, of all images
  void (*max_pool)(const Pool&, int64_t begin, int64_t end);   // the same; what surrounds the image does not count
  void (*lookup)(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* out);
};

float* row_scratch(int64_t count); // this thread's, at a multiple of 64 bytes, valid until its next call

const Kernels& kernels();                // the best that this CPU has, or what FEWBIT_ISA names
std::vector<const Kernels*> available(); // all that it has, the best first

// Whether `kernels` computes what `reference` does on the operands that come nearest to overflow.
bool agree(const Kernels& kernels, const Kernels& reference);

} // namespace fewbit
