// The search of scale and zero point for many blocks: methods/blocks.py, with the same operations in the same order.
//
// Plain loops that compilers vectorize, kLanes blocks at a time, element after element; results are bit-equal to the
// reference's on every instruction set.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "tensors.h"

namespace fewbit {

namespace {

constexpr int64_t kLanes = 16; // blocks that are searched at once
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Codes {
  float low, high;
  bool symmetric;
};

// [elements][kLanes] each; rows of the last two are used up by sums.
struct Tile {
  int64_t elements;
  bool weighted;
  float *w, *h, *rounded, *first, *second;
};

// The sum of rows, halves added to halves, as blocks.total has it. The result is in the first row.
FEWBIT_INLINE void fold(float* __restrict values, int64_t rows) {
  for (; rows > 1; rows /= 2) {
    const int64_t half = rows / 2 * kLanes;
    for (int64_t i = 0; i < half; ++i) values[i] += values[half + i];
    if (rows % 2)
      for (int64_t j = 0; j < kLanes; ++j) values[j] += values[2 * half + j];
  }
}

FEWBIT_INLINE float clamped(float v, float low, float high) { return std::min(std::max(v, low), high); }

// Each lane's largest magnitude, 1 for a block of zeros.
FEWBIT_INLINE void peaks(const Tile& t, float* peak) {
  for (int64_t j = 0; j < kLanes; ++j) peak[j] = 0;
  for (int64_t e = 0; e < t.elements; ++e)
    for (int64_t j = 0; j < kLanes; ++j) peak[j] = std::max(peak[j], std::fabs(t.w[e * kLanes + j]));
  for (int64_t j = 0; j < kLanes; ++j) peak[j] = peak[j] > 0 ? peak[j] : 1;
}

struct Best {
  float scale[kLanes], zero[kLanes], gain[kLanes];
};

// The grids of one scale and several zero points, with the scale that fits the codes best.
FEWBIT_INLINE void attempt(const Tile& t, const Codes& codes, const float* scale, const float* zeros, const float* shifts,
                           int64_t count, Best& best) {
  const int64_t size = t.elements * kLanes;
  for (int64_t e = 0; e < size; e += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) t.rounded[e + j] = std::rint(t.w[e + j] / scale[j]);
  for (int64_t n = 0; n < count; ++n) {
    float zero[kLanes], low[kLanes], high[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      zero[j] = zeros[j] + shifts[n];
      if (!codes.symmetric) zero[j] = clamped(zero[j], codes.low, codes.high);
      low[j] = codes.low - zero[j];
      high[j] = codes.high - zero[j];
    }
    for (int64_t e = 0; e < size; e += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        const float d = clamped(t.rounded[e + j], low[j], high[j]);
        const float hd = t.weighted ? d * t.h[e + j] : d;
        t.first[e + j] = hd * t.w[e + j];
        t.second[e + j] = hd * d;
      }
    fold(t.first, t.elements);
    fold(t.second, t.elements);
    for (int64_t j = 0; j < kLanes; ++j) {
      const float wd = t.first[j], dd = t.second[j];
      const bool fits = (dd > 0) & (wd > 0);
      const float gain = fits ? wd * wd / dd : 0.0f;
      const bool better = gain > best.gain[j];
      best.gain[j] = better ? gain : best.gain[j];
      best.scale[j] = better ? (fits ? wd / dd : scale[j]) : best.scale[j];
      best.zero[j] = better ? zero[j] : best.zero[j];
    }
  }
}

// Slope and intercept of the weights over the codes of the best grid.
FEWBIT_INLINE void regression(const Tile& t, const Codes& codes, const Best& best, float* slope, float* zero) {
  const int64_t size = t.elements * kLanes;
  float sums[5][kLanes]; // of h, h d, h d^2, h w, h w d
  for (int64_t e = 0; e < size; e += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float low = codes.low - best.zero[j], high = codes.high - best.zero[j];
      t.rounded[e + j] = clamped(std::rint(t.w[e + j] / best.scale[j]), low, high);
    }
  for (int which = 0; which < 5; ++which) {
    for (int64_t e = 0; e < size; ++e) {
      const float d = t.rounded[e], w = t.w[e];
      const float value = which == 0 ? 1.0f : which == 1 ? d : which == 2 ? d * d : which == 3 ? w : w * d;
      t.first[e] = t.weighted ? value * t.h[e] : value;
    }
    fold(t.first, t.elements);
    for (int64_t j = 0; j < kLanes; ++j) sums[which][j] = t.first[j];
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    const float one = t.weighted ? sums[0][j] : static_cast<float>(t.elements);
    const float sd = sums[1][j], sdd = sums[2][j], sw = sums[3][j], swd = sums[4][j];
    const float determinant = one * sdd - sd * sd;
    const float found = (one * swd - sd * sw) / determinant;
    const bool usable = determinant > 0 && found > 0 && found < kInfinity;
    slope[j] = usable ? found : best.scale[j];
    const float intercept = (sw - slope[j] * sd) / one;
    const float moved = std::rint(best.zero[j] - intercept / slope[j]);
    zero[j] = usable && std::fabs(moved) < kInfinity ? moved : best.zero[j];
  }
}

FEWBIT_VERSIONS void search_tile(const Tile& tile, const Codes& codes, const float* shares, int64_t share_count,
                                 const float* shifts, int64_t shift_count, int64_t rounds, float* scale, float* zero) {
  const Tile t = tile;
  float unit[kLanes], full[kLanes], start[kLanes];
  peaks(t, unit);
  const int64_t size = t.elements * kLanes;
  float low[kLanes] = {}, high[kLanes] = {};
  for (int64_t e = 0; e < size; e += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const float u = t.w[e + j] / unit[j];
      t.w[e + j] = u;
      low[j] = std::min(low[j], u);
      high[j] = std::max(high[j], u);
    }
  Best best;
  for (int64_t j = 0; j < kLanes; ++j) {
    if (codes.symmetric) {
      full[j] = std::max(-low[j], high[j]) / std::min(-codes.low, codes.high);
      start[j] = 0;
    } else {
      full[j] = (high[j] - low[j]) / (codes.high - codes.low);
      start[j] = std::rint(codes.low - low[j] / (full[j] > 0 ? full[j] : 1.0f));
    }
    full[j] = full[j] > 0 ? full[j] : 1 / unit[j];
    best.scale[j] = full[j];
    best.zero[j] = start[j];
    best.gain[j] = -kInfinity;
  }
  for (int64_t n = 0; n < share_count; ++n) {
    float trial[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) trial[j] = full[j] * shares[n];
    attempt(t, codes, trial, start, shifts, shift_count, best);
  }
  const float none = 0;
  for (int64_t n = 0; n < rounds; ++n) {
    float trial[kLanes], moved[kLanes];
    if (codes.symmetric) {
      std::copy(best.scale, best.scale + kLanes, trial);
      std::copy(best.zero, best.zero + kLanes, moved);
    } else {
      regression(t, codes, best, trial, moved);
    }
    attempt(t, codes, trial, moved, &none, 1, best);
  }
  for (int64_t j = 0; j < kLanes; ++j) {
    scale[j] = best.scale[j] * unit[j];
    zero[j] = best.zero[j];
  }
}

// `scales` and `zeros`: [options][kLanes].
FEWBIT_VERSIONS void choose_tile(const Tile& tile, const Codes& codes, const float* scales, const float* zeros,
                                 int64_t options, const float* shifts, int64_t shift_count, float* index, float* zero) {
  const Tile t = tile;
  const int64_t size = t.elements * kLanes;
  float peak[kLanes], least[kLanes];
  peaks(t, peak);
  for (int64_t j = 0; j < kLanes; ++j) {
    least[j] = kInfinity;
    index[j] = 0;
    zero[j] = zeros[j];
  }
  for (int64_t k = 0; k < options; ++k) {
    const float* scale = scales + k * kLanes;
    float inverse[kLanes], weight[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      inverse[j] = scale[j] > 0 ? 1 / scale[j] : 0.0f;
      weight[j] = scale[j] / peak[j];
    }
    for (int64_t e = 0; e < size; e += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        const float v = t.w[e + j] * inverse[j];
        t.second[e + j] = v;
        t.rounded[e + j] = std::rint(v);
      }
    for (int64_t n = 0; n < shift_count; ++n) {
      float moved[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        moved[j] = zeros[k * kLanes + j];
        if (!codes.symmetric) moved[j] = clamped(moved[j] + shifts[n], codes.low, codes.high);
      }
      for (int64_t e = 0; e < size; e += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) {
          const float d = clamped(t.rounded[e + j], codes.low - moved[j], codes.high - moved[j]);
          const float error = (t.second[e + j] - d) * weight[j], square = error * error;
          t.first[e + j] = t.weighted ? square * t.h[e + j] : square;
        }
      fold(t.first, t.elements);
      for (int64_t j = 0; j < kLanes; ++j) {
        const float error = scale[j] > 0 ? t.first[j] : kInfinity;
        const bool better = error < least[j];
        least[j] = better ? error : least[j];
        index[j] = better ? static_cast<float>(k) : index[j];
        zero[j] = better ? moved[j] : zero[j];
      }
    }
  }
}

const float* floats(const Tensor& x, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 2 && x.size(0) == rows &&
                      x.size(1) == columns,
                  "fewbit: ", what, " must be contiguous float32 [", rows, ", ", columns, "], found ", described(x), ".");
  return static_cast<const float*>(x.const_data_ptr());
}

// Blocks [elements, count] in tiles of kLanes; f(tile, first block, blocks in it).
template <class F> void each_tile(const Tensor& w, const std::optional<Tensor>& h, const F& f) {
  STD_TORCH_CHECK(w.dim() == 2 && w.size(0) > 0, "fewbit: w must be [elements, blocks], found ", described(w), ".");
  const int64_t elements = w.size(0), count = w.size(1);
  const float* values = floats(w, elements, count, "w");
  const float* weights = h ? floats(*h, elements, count, "h") : nullptr;
  in_parallel(ceil_div(count, kLanes), elements * count * 64, [&](int64_t begin, int64_t end) {
    const int64_t size = elements * kLanes;
    std::vector<float> memory(static_cast<size_t>(5 * size));
    float* m = memory.data();
    const Tile tile{elements, weights != nullptr, m, m + size, m + 2 * size, m + 3 * size, m + 4 * size};
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = number * kLanes, lanes = std::min(kLanes, count - first);
      for (int64_t e = 0; e < elements; ++e)
        for (int64_t j = 0; j < kLanes; ++j) { // beyond the last block: zeros
          tile.w[e * kLanes + j] = j < lanes ? values[e * count + first + j] : 0.0f;
          if (weights) tile.h[e * kLanes + j] = j < lanes ? weights[e * count + first + j] : 0.0f;
        }
      f(tile, first, lanes);
    }
  });
}

std::tuple<Tensor, Tensor> search_grid(const Tensor& w, const std::optional<Tensor>& h, double low, double high,
                                       bool symmetric, const Tensor& shares, const Tensor& shifts, int64_t rounds) {
  const Codes codes{static_cast<float>(low), static_cast<float>(high), symmetric};
  const int64_t share_count = shares.numel(), shift_count = shifts.numel();
  const float* share = floats(shares, 1, share_count, "shares");
  const float* shift = floats(shifts, 1, shift_count, "shifts");
  Tensor scale = new_tensor({w.size(1)}, ScalarType::Float), zero = new_tensor({w.size(1)}, ScalarType::Float);
  float *scales = static_cast<float*>(scale.mutable_data_ptr()), *zeros = static_cast<float*>(zero.mutable_data_ptr());
  each_tile(w, h, [&](const Tile& tile, int64_t first, int64_t lanes) {
    float found[2][kLanes];
    search_tile(tile, codes, share, share_count, shift, shift_count, rounds, found[0], found[1]);
    std::copy(found[0], found[0] + lanes, scales + first);
    std::copy(found[1], found[1] + lanes, zeros + first);
  });
  return {scale, zero};
}

std::tuple<Tensor, Tensor> choose_grid(const Tensor& w, const std::optional<Tensor>& h, const Tensor& scale,
                                       const Tensor& zero, double low, double high, bool symmetric,
                                       const Tensor& shifts) {
  const Codes codes{static_cast<float>(low), static_cast<float>(high), symmetric};
  const int64_t options = scale.dim() == 2 ? scale.size(0) : 0, count = w.dim() == 2 ? w.size(1) : 0;
  STD_TORCH_CHECK(options > 0, "fewbit: scale must be [options, blocks], found ", described(scale), ".");
  const float *scales = floats(scale, options, count, "scale"), *zeros = floats(zero, options, count, "zero");
  const int64_t shift_count = shifts.numel();
  const float* shift = floats(shifts, 1, shift_count, "shifts");
  Tensor index = new_tensor({count}, ScalarType::Float), best = new_tensor({count}, ScalarType::Float);
  float *to = static_cast<float*>(index.mutable_data_ptr()), *moved = static_cast<float*>(best.mutable_data_ptr());
  each_tile(w, h, [&](const Tile& tile, int64_t first, int64_t lanes) {
    std::vector<float> own(static_cast<size_t>(2 * options * kLanes));
    for (int64_t k = 0; k < options; ++k)
      for (int64_t j = 0; j < lanes; ++j) {
        own[static_cast<size_t>(k * kLanes + j)] = scales[k * count + first + j];
        own[static_cast<size_t>((options + k) * kLanes + j)] = zeros[k * count + first + j];
      }
    float found[2][kLanes];
    choose_tile(tile, codes, own.data(), own.data() + options * kLanes, options, shift, shift_count, found[0], found[1]);
    std::copy(found[0], found[0] + lanes, to + first);
    std::copy(found[1], found[1] + lanes, moved + first);
  });
  return {index, best};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("search_grid", TORCH_BOX(&search_grid));
  m.impl("choose_grid", TORCH_BOX(&choose_grid));
}

} // namespace fewbit
