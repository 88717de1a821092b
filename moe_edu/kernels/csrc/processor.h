// What all files of compiled code share: types, and macros that make one version of a function per kind of processor.

#include <stddef.h>

typedef ptrdiff_t index;

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f")))
#define VERSIONS(version) \
  AVX2 version(avx2) \
  AVX512 version(avx512)
#define FOR_THIS_PROCESSOR(function, ...) \
  (__builtin_cpu_supports("avx512f") ? function##_avx512 : function##_avx2)(__VA_ARGS__)
#else
#define VERSIONS(version) version(generic)
#define FOR_THIS_PROCESSOR(function, ...) function##_generic(__VA_ARGS__)
#endif
