// The recurrent part of LSTM and GRU: all steps of one layer in one direction.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace fewbit {
namespace {

constexpr int64_t kResident = 1 << 20; // bytes that are taken to stay in a core's cache from step to step
constexpr int64_t kRowsForPanels = 3;
constexpr int64_t kStepsForPanels = 4;
constexpr int64_t kWaiting = 4; // so much more work is worth another thread where threads wait for each other at each step

const float* floats(Tensor& x, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
                  "fewbit: ", what, " must be float32 [", rows, ", ", columns, "], found ", described(x), ".");
  x = contiguous_of(x);
  return static_cast<const float*>(x.const_data_ptr());
}

// A state that the steps change in place: a copy of the initial one.
Tensor state_of(Tensor initial, int64_t rows, int64_t columns, const char* what) {
  const float* from = floats(initial, rows, columns, what);
  Tensor state = new_tensor({rows, columns}, ScalarType::Float);
  std::copy_n(from, rows * columns, static_cast<float*>(state.mutable_data_ptr()));
  return state;
}

// Rows [first, first + rows) of a weight.
Weight rows_of(Weight w, int64_t first, int64_t rows) {
  const int64_t scales = first * w.scale_stride;
  w.codes += first * w.row_bytes;
  w.rows = rows;
  w.scale = static_cast<const uint8_t*>(w.scale) + scales * (w.scale_type == Type::f32 ? 4 : 2);
  if (w.zero_point) w.zero_point += scales;
  return w;
}

// Runs the steps: `cell(input, recurrent, row, begin, end)` computes hidden units [begin, end) of a sequence's state. A
// thread has some hidden units in all gates, so that a step is one parallel loop; the states that it overwrites have been
// quantized before. Returns the outputs.
template <int Gates, class Cell>
Tensor scan(const Weight& w, Tensor gates, const Tensor& h, const float* bias, int64_t input_group,
            const std::vector<int64_t>& sizes, bool reverse, const Cell& cell) {
  thread_local Scratch codes, sums;
  const Kernels& k = kernels();
  const int64_t hidden = w.columns, width = Gates * hidden;
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  for (int64_t size : sizes)
    STD_TORCH_CHECK(size >= 0 && size <= h.size(0), "fewbit: sizes must be 0 to ", h.size(0), ", found ", size, ".");
  const float* input = floats(gates, total, width, "gates");
  const float* state = static_cast<const float*>(h.const_data_ptr());
  Tensor outputs = new_tensor({total, hidden}, ScalarType::Float);
  float* y = static_cast<float*>(outputs.mutable_data_ptr());
  Weight gate[Gates];
  for (int g = 0; g < Gates; ++g) gate[g] = rows_of(w, g * hidden, hidden);

  // Hidden units are shared out in blocks of a panel's columns. Packed panels are faster than the weight as it is stored from
  // three rows on, and even with one if they stay in a core's cache; to pack all of them takes as long as a few steps.
  const int64_t blocks = ceil_div(hidden, k.panel_columns), bytes = round_up(k.panel_bytes(w), 64);
  const int64_t all = blocks * Gates * bytes, least = all <= kResident ? 1 : kRowsForPanels;
  const bool repeated = std::count_if(sizes.begin(), sizes.end(), [=](int64_t n) { return n >= least; }) >= kStepsForPanels;
  Scratch memory;
  uint8_t* panels = nullptr;
  if (repeated) {
    panels = static_cast<uint8_t*>(memory.get(all));
    in_parallel(blocks * Gates, w.rows * w.columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) k.pack(gate[i / blocks], i % blocks * k.panel_columns, panels + i * bytes);
    });
  }

  int64_t first_row = reverse ? total : 0;
  for (size_t step = 0; step < sizes.size(); ++step) {
    const int64_t rows = sizes[reverse ? sizes.size() - 1 - step : step];
    if (reverse) first_row -= rows;
    if (rows > 0) {
      const bool gemv = rows < (panels ? least : k.gemv_rows + 1);
      const Quantized q = quantized_buffers(w, rows, codes);
      in_parallel(rows, rows * hidden * 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) k.quantize(state, Type::f32, row, hidden, input_group, w, gemv, q);
      });
      float* recurrent = static_cast<float*>(sums.get(rows * width * sizeof(float)));
      in_parallel(blocks, rows * w.rows * w.columns / kWaiting, [&](int64_t begin, int64_t end) {
        thread_local Scratch panel; // here, so that each thread frees its own
        const int64_t first = begin * k.panel_columns, last = std::min(end * k.panel_columns, hidden);
        for (int g = 0; g < Gates; ++g) {
          const Output out{recurrent + g * hidden, width, Type::f32, bias ? bias + g * hidden : nullptr, Activation::none};
          if (gemv) {
            k.gemv(gate[g], q, first, last, out);
            continue;
          }
          for (int64_t block = begin; block < end; ++block) {
            void* packed = panels ? panels + (g * blocks + block) * bytes : panel.get(bytes);
            if (!panels) k.pack(gate[g], block * k.panel_columns, packed);
            const bool more = panels && block + 1 < end; // which follows this one
            const void* next = more ? panels + (g * blocks + block + 1) * bytes : nullptr;
            k.multiply(gate[g], block * k.panel_columns, packed, q, 0, rows, next, more ? bytes : 0, out);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          cell(input + (first_row + row) * width, recurrent + row * width, row, first, last);
          std::copy(state + row * hidden + first, state + row * hidden + last, y + (first_row + row) * hidden + first);
        }
        panel.release_if_large();
      });
    }
    if (!reverse) first_row += rows;
  }
  codes.release_if_large();
  sums.release_if_large();
  return outputs;
}

Weight recurrent_weight(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t gates,
                        const Tensor& h, int64_t bits, int64_t weight_group, int64_t input_group) {
  STD_TORCH_CHECK(h.dim() == 2 && packed.dim() == 2 && packed.size(0) == gates * h.size(1),
                  "fewbit: packed must have ", gates, " rows for each hidden unit of h [rows, hidden units], found ",
                  described(packed), " and h ", described(h), ".");
  return weight_of(packed, scale, zero_point, h.size(1), bits, weight_group, input_group);
}

std::tuple<Tensor, Tensor, Tensor> lstm(Tensor gates, Tensor h, Tensor c, Tensor packed, Tensor scale,
                                        std::optional<Tensor> zero_point, std::optional<Tensor> bias, int64_t bits,
                                        int64_t weight_group, int64_t input_group, std::vector<int64_t> sizes, bool reverse) {
  const Weight w = recurrent_weight(packed, scale, zero_point, 4, h, bits, weight_group, input_group);
  const int64_t hidden = w.columns;
  Tensor last_h = state_of(h, h.size(0), hidden, "h"), last_c = state_of(c, h.size(0), hidden, "c");
  float* h_data = static_cast<float*>(last_h.mutable_data_ptr());
  float* c_data = static_cast<float*>(last_c.mutable_data_ptr());
  std::optional<Tensor> keep;
  const float* offsets = float_vector(bias, w.rows, "bias", keep);
  const auto cell = [&](const float* input, const float* recurrent, int64_t row, int64_t begin, int64_t end) {
    kernels().lstm(input, recurrent, hidden, begin, end, h_data + row * hidden, c_data + row * hidden);
  };
  return {scan<4>(w, gates, last_h, offsets, input_group, sizes, reverse, cell), last_h, last_c};
}

std::tuple<Tensor, Tensor> gru(Tensor gates, Tensor h, Tensor packed, Tensor scale, std::optional<Tensor> zero_point,
                               std::optional<Tensor> bias, int64_t bits, int64_t weight_group, int64_t input_group,
                               std::vector<int64_t> sizes, bool reverse) {
  const Weight w = recurrent_weight(packed, scale, zero_point, 3, h, bits, weight_group, input_group);
  const int64_t hidden = w.columns;
  Tensor last = state_of(h, h.size(0), hidden, "h");
  float* data = static_cast<float*>(last.mutable_data_ptr());
  std::optional<Tensor> keep;
  const float* offsets = float_vector(bias, w.rows, "bias", keep);
  const auto cell = [&](const float* input, const float* recurrent, int64_t row, int64_t begin, int64_t end) {
    kernels().gru(input, recurrent, hidden, begin, end, data + row * hidden);
  };
  return {scan<3>(w, gates, last, offsets, input_group, sizes, reverse, cell), last};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("gru", TORCH_BOX(&gru));
}

} // namespace fewbit
