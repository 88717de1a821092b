// Whether this processor can run the compiled code, and how wide its vectors are.

#include "processor.h"

int is_supported(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#else
  return 1;
#endif
}

// The width in bits. Processors other than x86-64 run the code for 64-bit ARM, whose vectors have 128 bits.
int vector_bits(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") ? 512 : 256;
#else
  return 128;
#endif
}

#ifdef _WIN32
// Python's build tools export this from every extension on Windows. The package loads this file and does not import it.
void *PyInit__compiled(void) { return 0; }
#endif
