// Attention of a few queries, as in generation, where each hypothesis has one new token: for products this small, one
// per sentence and head, PyTorch's libraries take longer to start than to compute.

#include <math.h>

#include "exponential.h"

enum {
  // What fits on the stack: keys that a query attends to, and numbers per head.
  KEYS = 1024,
  HEAD = 256,
};

// Elements between one sentence, head or token and the next; the numbers of a head are contiguous.
typedef struct {
  index sentence, head, token;
} strides;

// Eight independent sums: none waits for another.
INLINE float dot(const float *a, const float *b, index D) {
  enum { PARTS = 8 };
  float parts[PARTS] = {0};
  index d = 0;
  for (; d + PARTS <= D; d += PARTS)
#pragma omp simd
    for (index i = 0; i < PARTS; i++) parts[i] += a[d + i] * b[d + i];
  for (; d < D; d++) parts[d % PARTS] += a[d] * b[d];
  return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

// out = softmax(query keys^T / sqrt(D) + bias) values for one query; bias is NULL or holds one number per key.
INLINE void attend(
    const float *query, const float *keys, index key_stride, const float *values, index value_stride, const float *bias,
    float *out, index S, index D) {
  float weights[KEYS], mixed[HEAD];
  float most = -INFINITY, sum = 0;
  const float scale = 1 / sqrtf(D);
  for (index s = 0; s < S; s++) weights[s] = dot(query, keys + s * key_stride, D) * scale;
  if (bias)
    for (index s = 0; s < S; s++) weights[s] += bias[s];
#pragma omp simd reduction(max : most)
  for (index s = 0; s < S; s++) most = MAX(most, weights[s]);
#pragma omp simd reduction(+ : sum)
  for (index s = 0; s < S; s++) {
    weights[s] = exponential(weights[s] - most);
    sum += weights[s];
  }
  for (index d = 0; d < D; d++) mixed[d] = 0;
  for (index s = 0; s < S; s++)
#pragma omp simd
    for (index d = 0; d < D; d++) mixed[d] += weights[s] * values[s * value_stride + d];
  for (index d = 0; d < D; d++) out[d] = mixed[d] / sum;
}

// The usual head sizes have their own code, whose sums stay in registers.
#define VERSION(processor) \
  static void attend_##processor( \
      const float *query, const float *keys, index key_stride, const float *values, index value_stride, \
      const float *bias, float *out, index S, index D) { \
    if (D == 32) attend(query, keys, key_stride, values, value_stride, bias, out, S, 32); \
    else if (D == 64) attend(query, keys, key_stride, values, value_stride, bias, out, S, 64); \
    else attend(query, keys, key_stride, values, value_stride, bias, out, S, D); \
  }
VERSIONS(VERSION)

// query, out `[B, H, L, D]`; key, value `[B, H, S, D]`; bias `[B, H, L, S]` or NULL.
void attention(
    const float *query, const float *key, const float *value, const float *bias, float *out, const strides *query_at,
    const strides *key_at, const strides *value_at, const strides *bias_at, const strides *out_at, index B, index H,
    index L, index S, index D, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (index b = 0; b < B; b++)
    for (index h = 0; h < H; h++)
      for (index l = 0; l < L; l++)
        FOR_THIS_PROCESSOR(
            attend, query + b * query_at->sentence + h * query_at->head + l * query_at->token,
            key + b * key_at->sentence + h * key_at->head, key_at->token,
            value + b * value_at->sentence + h * value_at->head, value_at->token,
            bias ? bias + b * bias_at->sentence + h * bias_at->head + l * bias_at->token : NULL,
            out + b * out_at->sentence + h * out_at->head + l * out_at->token, S, D);
}
