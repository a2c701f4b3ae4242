// Four lanes as plain arrays, for codes where there is nothing better.
#pragma once

#include "quantize_inl.h"

namespace fewbit {
namespace {

struct PlainCodes {
  static constexpr int kLanes = 4;
  static constexpr int kBytes = 16;
  static constexpr int kTileRows[] = {4, 2};
  static constexpr int kTileColumns = 2;
  using Narrower = void;
  typedef int32_t I __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));
  typedef uint8_t B __attribute__((vector_size(16)));

  template <class R, class O> static R each(O value) {
    R r;
    for (int i = 0; i < static_cast<int>(16 / sizeof(r[0])); ++i) r[i] = value(i);
    return r;
  }
  static uint8_t byte(I v, int i) {
    uint8_t bytes[16];
    std::memcpy(bytes, &v, 16);
    return bytes[i];
  }
  template <class O> static I from_bytes(O value) {
    const B b = each<B>(value);
    return load(&b);
  }
  static int32_t within(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

  static void pin(I&) {}
  static I zero() { return all(0); }
  static I load(const void* p) {
    I r;
    std::memcpy(&r, p, 16);
    return r;
  }
  static I load_part(const void* p, int64_t count) { return load(Filled<16>(p, count).bytes); }
  static F floats(const float* p) {
    F r;
    std::memcpy(&r, p, 16);
    return r;
  }
  static F floats_part(const float* p, int64_t count) {
    F r = {};
    std::memcpy(&r, p, count * 4);
    return r;
  }
  static void store(void* p, I v) { std::memcpy(p, &v, 16); }
  static void store(void* p, F v) { std::memcpy(p, &v, 16); }
  static void store_part(void* p, I v, int64_t count) { std::memcpy(p, &v, count); }
  static void store_part(void* p, F v, int64_t count) { std::memcpy(p, &v, count); }
  static I four(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return all(v);
  }
  static I bytes(const uint8_t* p) { return each<I>([=](int i) { return p[i]; }); } // kLanes of them
  static I bytes_part(const uint8_t* p, int64_t count) { return bytes(Filled<kLanes>(p, count).bytes); }
  static I all(int32_t v) { return I{v, v, v, v}; }
  static F all(float v) { return F{v, v, v, v}; }
  static I all8(int v) { return all(static_cast<int32_t>(0x01010101u * static_cast<uint32_t>(v))); }
  static I all16(int v) { return all(static_cast<int32_t>(0x00010001u * static_cast<uint32_t>(v))); }
  static I subtract(I a, I b) { return a - b; }
  static I add(I a, I b) { return a + b; }
  static F add(F a, F b) { return a + b; }
  static F times(F a, F b) { return a * b; }
  static F divide(F a, F b) { return a / b; }
  static F least(F a, F b) { return each<F>([=](int i) { return a[i] < b[i] ? a[i] : b[i]; }); }
  static F most(F a, F b) { return each<F>([=](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
  static F to_float(I v) { return each<F>([=](int i) { return static_cast<float>(v[i]); }); }
  static I round(F v) {
    return each<I>([=](int i) { return v[i] > -1e9f ? static_cast<int32_t>(__builtin_rintf(v[i])) : INT32_MIN; });
  }
  static void widen(I v, I (&out)[4]) {
    for (int q = 0; q < 4; ++q) out[q] = each<I>([=](int i) { return byte(v, 4 * q + i); });
  }
  static void interleave(const I (&rows)[4], I (&out)[4]) {
    for (int q = 0; q < 4; ++q) out[q] = from_bytes([&](int i) { return byte(rows[i % 4], 4 * q + i / 4); });
  }
  static I narrow(const I (&t)[4], I zero_point) {
    const int32_t z = zero_point[0] & 0xffff;
    return from_bytes([&](int i) { return static_cast<uint8_t>(within(within(t[i / 4][i % 4], -32768, 32767) + z, 0, 255)); });
  }
  static I least_bytes(I a, I b) {
    return from_bytes([&](int i) { return byte(a, i) < byte(b, i) ? byte(a, i) : byte(b, i); });
  }
  static I most_bytes(I a, I b) {
    return from_bytes([&](int i) { return byte(a, i) > byte(b, i) ? byte(a, i) : byte(b, i); });
  }
  static I ordered(I v) { return v; }
  template <int Bytes> static void put(uint8_t* p, I v, int place, int64_t count) {
    std::memcpy(p, reinterpret_cast<const uint8_t*>(&v) + place * Bytes, count < Bytes ? count : Bytes);
  }
};

struct PlainCodesDot {
  static PlainCodes::I step(PlainCodes::I acc, PlainCodes::I x, PlainCodes::I w) {
    uint8_t a[16];
    int8_t b[16];
    std::memcpy(a, &x, 16);
    std::memcpy(b, &w, 16);
    for (int i = 0; i < 4; ++i) {
      int32_t sum = 0;
      for (int j = 4 * i; j < 4 * i + 4; ++j) sum += a[j] * b[j];
      acc[i] = static_cast<int32_t>(static_cast<uint32_t>(acc[i]) + static_cast<uint32_t>(sum));
    }
    return acc;
  }
};

} // namespace
} // namespace fewbit
