// From torch's tensors to the kernels' plain data, with the checks that make it safe.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>
#include <string>

#include "kernels.h"

// Two versions of a function, of which the dynamic linker takes the better one that the CPU has.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FEWBIT_VERSIONS __attribute__((target_clones("avx2", "default")))
#else
#define FEWBIT_VERSIONS
#endif
#define FEWBIT_INLINE inline __attribute__((always_inline))

namespace fewbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The two things that every call needs, without the dispatcher's microseconds.
inline Tensor contiguous_of(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// `type`: uint8 or one that Type has.
inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape);
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::Byte     ? aoti_torch_dtype_uint8()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  AtenTensorHandle made = nullptr;
  const auto failed = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                               aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(!failed, "fewbit: torch could not allocate the result.");
  return Tensor(made);
}

// Memory that a thread keeps between calls, up to a limit.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(4096, size_));
      STD_TORCH_CHECK(memory_ != nullptr, "fewbit: out of memory for a workspace of ", size_, " bytes.");
    }
    return memory_.get();
  }
  void release_if_large() {
    if (size_ > size_t{16} << 20) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// As error messages have it: float32 [2, 3].
std::string described(const Tensor& x);

Type type_of(const Tensor& x, const char* what);

// The weight in its stored layout; `group` 0: one scale a row. `input_group` is that of the activations (0: none).
Weight weight_of(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t columns,
                 int64_t bits, int64_t group, int64_t input_group);

// float32 values of an optional vector; `keep` holds what had to be converted.
const float* float_vector(const std::optional<Tensor>& x, int64_t size, const char* what, std::optional<Tensor>& keep);

// Activations [rows, columns] of `type` quantized, and all that products with them need; memory from `scratch`.
Quantized quantized_buffers(const Weight&, int64_t rows, Scratch& scratch);

// The least work, in products, that is worth another thread.
constexpr int64_t kWorthAThread = 1 << 17;

// f(begin, end) over [0, count) on as many of torch's threads as `work` products are worth.
template <class F> void in_parallel(int64_t count, int64_t work, const F& f) {
  const int64_t threads = work / kWorthAThread;
  if (count == 0) return;
  if (threads <= 1) {
    f(0, count);
  } else {
    torch::stable::parallel_for(0, count, ceil_div(count, threads), f);
  }
}

} // namespace fewbit
