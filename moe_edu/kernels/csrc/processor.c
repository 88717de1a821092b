// Whether this processor can run the compiled code.

#include "processor.h"

int is_supported(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#else
  return 1;
#endif
}
