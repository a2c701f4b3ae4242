// The linear layers' operators.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tensors.h"

namespace fewbit {

namespace {

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "ScalarType " + std::to_string(static_cast<int>(type));
  }
}

} // namespace

std::string described(const Tensor& x) {
  std::string text = name_of(x.scalar_type()) + " [";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + (x.is_contiguous() ? "]" : "], not contiguous");
}

Type type_of(const Tensor& x, const char* what) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, "fewbit: ", what, " must be float32, bfloat16 or float16, found ", described(x), ".");
  }
}

Weight weight_of(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t columns,
                 int64_t bits, int64_t group, int64_t input_group) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, "fewbit: bits must be 4 or 8, found ", bits, ".");
  STD_TORCH_CHECK(group >= 0 && group % kBlock == 0 && input_group >= 0 && input_group % kBlock == 0,
                  "fewbit: groups must be multiples of ", kBlock, ", found ", group, " and ", input_group, ".");
  STD_TORCH_CHECK(group == 0 || input_group == 0 || group == input_group,
                  "fewbit: groups of weights and inputs must agree, found ", group, " and ", input_group, ".");
  STD_TORCH_CHECK(columns > 0, "fewbit: a weight must have at least one column, found ", columns, ".");
  const auto dtype = bits == 8 ? ScalarType::Char : ScalarType::Int;
  const int64_t words = bits == 8 ? columns : ceil_div(columns, 8);
  STD_TORCH_CHECK(packed.scalar_type() == dtype && packed.dim() == 2 && packed.size(1) == words && packed.is_contiguous(),
                  "fewbit: packed must be contiguous ", bits == 8 ? "int8" : "int32", " [rows, ", words, "], found ",
                  described(packed), ".");
  Weight w;
  w.codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  w.rows = packed.size(0);
  w.columns = columns;
  w.row_bytes = words * (bits == 8 ? 1 : 4);
  w.bits = static_cast<int>(bits);
  w.group = std::max({group, input_group});
  if (w.group == 0) w.group = round_up(columns, kBlock);
  w.groups = ceil_div(columns, w.group);
  w.scale_stride = group == 0 ? 1 : w.groups;
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == w.rows && t.size(1) == w.scale_stride && t.is_contiguous();
  };
  const auto scale_type = scale.scalar_type();
  STD_TORCH_CHECK((scale_type == ScalarType::Float || scale_type == ScalarType::BFloat16) && fits(scale),
                  "fewbit: scale must be contiguous float32 or bfloat16 [", w.rows, ", ", w.scale_stride, "], found ",
                  described(scale), ".");
  w.scale_type = scale_type == ScalarType::Float ? Type::f32 : Type::bf16;
  w.scale = scale.const_data_ptr();
  w.zero_point = nullptr;
  if (zero_point) {
    STD_TORCH_CHECK(zero_point->scalar_type() == ScalarType::Char && fits(*zero_point),
                    "fewbit: zero_point must be contiguous int8 [", w.rows, ", ", w.scale_stride, "], found ",
                    described(*zero_point), ".");
    w.zero_point = static_cast<const int8_t*>(zero_point->const_data_ptr());
  }
  return w;
}

const float* float_vector(const std::optional<Tensor>& x, int64_t size, const char* what, std::optional<Tensor>& keep) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == size, "fewbit: ", what, " must be [", size, "], found ", described(*x), ".");
  keep = contiguous_of(x->scalar_type() == ScalarType::Float ? *x : torch::stable::to(*x, ScalarType::Float));
  return static_cast<const float*>(keep->const_data_ptr());
}

Quantized quantized_buffers(const Weight& w, int64_t rows, Scratch& scratch) {
  // Not a multiple of a page, so that the rows of a tile do not fight for the same places in the cache.
  const int64_t stride = round_up(kernels().code_bytes(w), 64) + 64, starts = kernels().starts(w);
  const size_t codes = rows * stride, scales = rows * w.groups * 4;
  uint8_t* memory = static_cast<uint8_t*>(scratch.get(codes + 3 * scales + rows * starts * 4));
  const auto ints = [&](size_t place) { return reinterpret_cast<int32_t*>(memory + place); };
  float* scale = reinterpret_cast<float*>(memory + codes);
  return {reinterpret_cast<int8_t*>(memory),
          stride,
          scale,
          ints(codes + scales),
          ints(codes + 2 * scales),
          ints(codes + 3 * scales),
          starts,
          rows};
}

namespace {

// y = activation(x W^T + bias) for rows [rows, columns] of `type`.
void multiply_rows(const Weight& w, const void* x, Type type, int64_t rows, int64_t input_group, const Output& y) {
  thread_local Scratch activations;
  const Kernels& k = kernels();
  const bool gemv = rows <= k.gemv_rows;
  const Quantized q = quantized_buffers(w, rows, activations);
  in_parallel(rows, rows * w.columns * 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) k.quantize(x, type, row, w.columns, input_group, w, gemv, q);
  });
  const int64_t work = rows * w.rows * w.columns;
  if (gemv) {
    in_parallel(w.rows, work, [&](int64_t begin, int64_t end) { k.gemv(w, q, begin, end, y); });
  } else {
    // A task is a panel for a share of the rows, whose codes stay in a core's cache while panel after panel meets them.
    constexpr int64_t kCached = 512 << 10, kLeastRows = 48; // bytes of codes; rows that are worth packing a panel
    const int64_t panel_count = ceil_div(w.rows, k.panel_columns);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::max(ceil_div(rows * q.stride, kCached), ceil_div(4 * threads, panel_count));
    const int64_t share = ceil_div(rows, std::min(wanted, ceil_div(rows, kLeastRows)));
    in_parallel(panel_count * ceil_div(rows, share), work, [&](int64_t begin, int64_t end) {
      thread_local Scratch panels; // here, so that each thread frees its own
      void* panel = panels.get(k.panel_bytes(w));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % panel_count * k.panel_columns, top = task / panel_count * share;
        k.pack(w, first, panel);
        const int64_t next_first = std::min(first + k.panel_columns, w.rows);
        const int64_t next_rows = std::min(k.panel_columns, w.rows - next_first);
        k.multiply(w, first, panel, q, top, std::min(top + share, rows), w.codes + next_first * w.row_bytes,
                   next_rows * w.row_bytes, y);
      }
      panels.release_if_large();
    });
  }
  activations.release_if_large();
}

std::vector<int64_t> output_shape(const Tensor& x, const Weight& w) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.columns, "fewbit: x must be [..., ", w.columns, "], found ",
                  described(x), ".");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.rows;
  return shape;
}

Output output_of(Tensor& y, const Weight& w, Type type, const float* bias, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "fewbit: activation must be 0 to 4, found ", activation, ".");
  return {y.mutable_data_ptr(), w.rows, type, bias, static_cast<Activation>(activation)};
}

Tensor linear_dynamic(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero_point, std::optional<Tensor> bias,
                      int64_t in_features, int64_t bits, int64_t weight_group, int64_t input_group, int64_t activation) {
  const Weight w = weight_of(packed, scale, zero_point, in_features, bits, weight_group, input_group);
  const Type type = type_of(x, "x");
  x = contiguous_of(x);
  Tensor y = new_tensor(output_shape(x, w), x.scalar_type());
  std::optional<Tensor> keep;
  const Output out = output_of(y, w, type, float_vector(bias, w.rows, "bias", keep), activation);
  const int64_t rows = w.rows == 0 ? 0 : y.numel() / w.rows;
  if (rows) multiply_rows(w, x.const_data_ptr(), type, rows, input_group, out);
  return y;
}

// The same with activations that stay float; at most float_rows rows.
void linear_float(const Weight& w, const void* x, Type type, int64_t rows, const Output& y) {
  thread_local Scratch converted;
  const Kernels& k = kernels();
  const float* values = static_cast<const float*>(x);
  if (type != Type::f32) {
    float* floats = static_cast<float*>(converted.get(rows * w.columns * sizeof(float)));
    k.to_float(x, type, rows * w.columns, floats);
    values = floats;
  }
  in_parallel(ceil_div(w.rows, k.float_columns), rows * w.rows * w.columns, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* memory = static_cast<float*>(scratch.get(k.float_scratch() * sizeof(float)));
    k.linear_float(w, values, rows, begin * k.float_columns, std::min(end * k.float_columns, w.rows), memory, y);
  });
  converted.release_if_large();
}

Tensor linear_weight_only(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero_point,
                          std::optional<Tensor> bias, int64_t in_features, int64_t bits, int64_t weight_group,
                          int64_t activation) {
  const Weight w = weight_of(packed, scale, zero_point, in_features, bits, weight_group, 0);
  const Type type = type_of(x, "x");
  x = contiguous_of(x);
  Tensor y = new_tensor(output_shape(x, w), x.scalar_type());
  std::optional<Tensor> keep;
  const Output out = output_of(y, w, type, float_vector(bias, w.rows, "bias", keep), activation);
  const int64_t rows = w.rows == 0 ? 0 : y.numel() / w.rows;
  if (!rows) return y;
  const Kernels& k = kernels();
  if (rows <= k.float_rows) {
    linear_float(w, x.const_data_ptr(), type, rows, out);
    return y;
  }
  // Many rows: a piece of the weight at a time in float, for torch's own matrix product.
  Tensor rows_of_x = torch::stable::view(x, {rows, w.columns});
  if (type != Type::f32) rows_of_x = torch::stable::to(rows_of_x, ScalarType::Float);
  const int64_t piece = std::min(w.rows, std::max<int64_t>(64, (int64_t{1} << 20) / w.columns));
  std::vector<int64_t> channels(piece);
  for (int64_t first = 0; first < w.rows; first += piece) {
    const int64_t count = std::min(piece, w.rows - first);
    for (int64_t i = 0; i < count; ++i) channels[i] = first + i;
    Tensor part = new_tensor({count, w.columns}, ScalarType::Float);
    float* values = static_cast<float*>(part.mutable_data_ptr());
    in_parallel(count, count * w.columns * 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) k.rows(w, channels.data() + i, 0, 1, values + i * w.columns);
    });
    Tensor sums = torch::stable::matmul(rows_of_x, torch::stable::transpose(part, 0, 1));
    STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float && sums.dim() == 2 && sums.size(0) == rows &&
                        sums.size(1) == count && sums.is_contiguous(),
                    "fewbit: the product of float32 matrices must be float32 [", rows, ", ", count, "], found ",
                    described(sums), ".");
    float* sum = static_cast<float*>(sums.mutable_data_ptr());
    in_parallel(rows, rows * count * 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) k.finish(sum + row * count, count, out, row, first);
    });
  }
  return y;
}

Tensor embedding(Tensor indices, Tensor packed, Tensor scale, std::optional<Tensor> zero_point, int64_t columns,
                 int64_t bits, int64_t group) {
  const Weight w = weight_of(packed, scale, zero_point, columns, bits, group, 0);
  indices = contiguous_of(
      indices.scalar_type() == ScalarType::Long ? indices : torch::stable::to(indices, ScalarType::Long));
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const int64_t count = indices.numel();
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < w.rows, "fewbit: index ", index[i], " is out of range for a table of ",
                          w.rows, " rows.");
  std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(columns);
  Tensor y = new_tensor(shape, ScalarType::Float);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const Kernels& k = kernels(); // not in a thread, of which torch would not pass on the error
  in_parallel(count, count * columns, [&](int64_t begin, int64_t end) { k.rows(w, index, begin, end, out); });
  return y;
}

std::string isa() { return kernels().name; }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
  m.impl("embedding", TORCH_BOX(&embedding));
}

STABLE_TORCH_LIBRARY_IMPL(fewbit, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

} // namespace fewbit
