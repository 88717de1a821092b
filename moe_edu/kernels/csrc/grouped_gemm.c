// Grouped products in fp32 on the CPU: for every expert, the rows that belong to it times its weights.
//
// PyTorch's libraries copy each weight matrix into an order that suits their inner loop, which pays off when hundreds
// of rows are multiplied by it. An expert often has 8 to 64. Here the few rows are reordered instead, and the weights
// are read in place, once, as the factors of a tile of sums that stays in registers (the tiles are those of Goto and
// van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", with the roles of the operands exchanged).
//
// Shapes, all contiguous: x, grad_x `[rows, K]`; y, grad_y `[rows, N]`; w, grad_w `[experts, N, K]`;
// bias `[experts, N]`. Rows `first[e]` to `first[e + 1]` belong to expert e; other rows are neither read nor written.
// The order of every sum does not depend on the number of threads.

#include "processor.h"

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int four_indices __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_indices){__VA_ARGS__})
#endif

enum {
  LINE = 16,  // floats in a cache line
  // The rows and columns of the result that one task computes, and the depth of its panels: DEPTH where the weights are
  // read in place, BLOCK where they are packed. Panels and sums, 512 KiB, are on the stack and fit into the L2 cache.
  ROWS = 128,
  COLUMNS = 512,
  DEPTH = 512,
  BLOCK = 128,
};

#if defined(__x86_64__)

#define TARGET AVX2
#define LANES 8
#define TILE 6
#define NAMED(x) x##_avx2
#include "grouped_gemm_kernels.h"
#undef TARGET
#undef LANES
#undef TILE
#undef NAMED

#define TARGET AVX512
#define LANES 16
#define TILE 12
#define NAMED(x) x##_avx512
#include "grouped_gemm_kernels.h"

#else  // 64-bit ARM has 32 registers of four floats

#define TARGET
#define LANES 8
#define TILE 6
#define NAMED(x) x##_generic
#include "grouped_gemm_kernels.h"

#endif

static index most_rows(const index *first, index experts) {
  index most = 0;
  for (index e = 0; e < experts; e++) most = MAX(most, first[e + 1] - first[e]);
  return most;
}

// y = x w^T + bias; a NULL bias adds nothing.
void grouped_gemm_linear(
    const float *x, const float *w, const float *bias, float *y, const index *first, index experts, index N, index K,
    int threads) {
  const index most = most_rows(first, experts);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
  for (index e = 0; e < experts; e++)
    for (index n = 0; n < N; n += COLUMNS)
      for (index m = 0; m < most; m += ROWS) {
        const index start = first[e] + m, rows = MIN(ROWS, first[e + 1] - start);
        if (rows > 0)
          FOR_THIS_PROCESSOR(
              linear, x + start * K, w + e * N * K, bias ? bias + e * N : NULL, y + start * N, rows, n,
              MIN(n + COLUMNS, N), N, K);
      }
}

// grad_x = grad_y w
void grouped_gemm_grad_input(
    const float *grad_y, const float *w, float *grad_x, const index *first, index experts, index N, index K,
    int threads) {
  const index most = most_rows(first, experts);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
  for (index e = 0; e < experts; e++)
    for (index k = 0; k < K; k += COLUMNS)
      for (index m = 0; m < most; m += ROWS) {
        const index start = first[e] + m, rows = MIN(ROWS, first[e + 1] - start);
        if (rows > 0)
          FOR_THIS_PROCESSOR(
              grad_input, grad_y + start * N, w + e * N * K, grad_x + start * K, rows, k, MIN(k + COLUMNS, K), N, K);
      }
}

// grad_w = grad_y^T x, which is zero for experts without rows.
void grouped_gemm_grad_weight(
    const float *grad_y, const float *x, float *grad_w, const index *first, index experts, index N, index K,
    int threads) {
  // Few rows leave room for more columns, and memory is written faster in long runs.
  const index columns = COLUMNS * MAX(1, MIN(4, BLOCK / MAX(1, most_rows(first, experts))));
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
  for (index e = 0; e < experts; e++)
    for (index n = 0; n < N; n += COLUMNS)
      for (index k = 0; k < K; k += columns)
        FOR_THIS_PROCESSOR(
            grad_weight, grad_y + first[e] * N, x + first[e] * K + k, grad_w + e * N * K + k, first[e + 1] - first[e],
            n, MIN(n + COLUMNS, N), MIN(columns, K - k), N, K);
}
