// Which kernels this CPU gets.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM // older kernels' headers
#define HWCAP2_I8MM (1 << 13)
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace fewbit {

extern const Kernels kScalar;
#ifdef FEWBIT_HAS_AVX2
extern const Kernels kAvx2;
#endif
#ifdef FEWBIT_HAS_AVXVNNI
extern const Kernels kAvxVnni;
#endif
#ifdef FEWBIT_HAS_AVX512VNNI
extern const Kernels kAvx512Vnni;
#endif
#ifdef FEWBIT_HAS_NEON_DOTPROD
extern const Kernels kNeonDotprod;
#endif
#ifdef FEWBIT_HAS_NEON_I8MM
extern const Kernels kNeonI8mm;
#endif

namespace {

#if defined(__x86_64__)
// Older compilers do not know it by name.
[[maybe_unused]] bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
#elif defined(__aarch64__)
[[maybe_unused]] bool has(const char* feature) {
#ifdef __APPLE__
  int value = 0;
  size_t size = sizeof(value);
  const std::string name = std::string("hw.optional.arm.FEAT_") + (std::strcmp(feature, "i8mm") ? "DotProd" : "I8MM");
  return sysctlbyname(name.c_str(), &value, &size, nullptr, 0) == 0 && value;
#else
  return std::strcmp(feature, "i8mm") ? getauxval(AT_HWCAP) & HWCAP_ASIMDDP : getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#endif
}
#endif

} // namespace

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef FEWBIT_HAS_AVX512VNNI
  if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&kAvx512Vnni);
#endif
#ifdef FEWBIT_HAS_AVXVNNI
  if (avx2 && has_avxvnni()) found.push_back(&kAvxVnni);
#endif
#ifdef FEWBIT_HAS_AVX2
  if (avx2) found.push_back(&kAvx2);
#endif
#elif defined(__aarch64__)
#ifdef FEWBIT_HAS_NEON_I8MM
  if (has("dotprod") && has("i8mm")) found.push_back(&kNeonI8mm);
#endif
#ifdef FEWBIT_HAS_NEON_DOTPROD
  if (has("dotprod")) found.push_back(&kNeonDotprod);
#endif
#endif
  found.push_back(&kScalar);
  return found;
}

namespace {

const Kernels& chosen() {
  const char* wanted = std::getenv("FEWBIT_ISA");
  const bool any = !wanted || !*wanted;
  std::string names;
  for (const Kernels* kernels : available()) {
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
    if (!any && std::strcmp(kernels->name, wanted)) continue;
    if (agree(*kernels, kScalar)) return *kernels;
    std::fprintf(stderr, "fewbit: the kernels for %s fail their self-test on this CPU and are not used. Please report it.\n",
                 kernels->name);
    if (!any) return kScalar;
  }
  throw std::runtime_error(std::string("FEWBIT_ISA: found '") + wanted + "', this CPU and build allow: " + names + ".");
}

} // namespace

const Kernels& kernels() {
  static const Kernels& best = chosen();
  return best;
}

float* row_scratch(int64_t count) {
  thread_local std::vector<float> row;
  if (static_cast<int64_t>(row.size()) < count + 16) row.resize(count + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(row.data()) + 63) / 64 * 64); // for whole vectors
}

} // namespace fewbit
