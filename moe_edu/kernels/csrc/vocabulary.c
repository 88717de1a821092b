// The most probable tokens of a large vocabulary. Logits are computed block by block, in the cache; from block to
// block, each row keeps only its largest logits so far and the sum of all exponentials (Milakov and Gimelshein 2018,
// "Online normalizer calculation for softmax", section 4).

#include <math.h>

#include "exponential.h"

enum {
  // Rows and columns of a block of logits, which fits into the L2 cache together with its weights.
  ROWS = 64,
  COLUMNS = 512,
  RUN = 32,  // logits that are compared together
};

void grouped_gemm_linear(
    const float *x, const float *w, const float *bias, float *y, const index *first, index experts, index N, index K,
    int threads);

// What one row keeps of the logits so far: the `count` largest, sorted, their tokens, and the sum of exp(logit - most).
typedef struct {
  index count;
  float *logits;
  index *tokens;
  float most, sum;
} row_state;

static void insert(row_state *row, index limit, float logit, index token) {
  index place = row->count < limit ? row->count++ : limit - 1;
  for (; place > 0 && row->logits[place - 1] < logit; place--) {
    row->logits[place] = row->logits[place - 1];
    row->tokens[place] = row->tokens[place - 1];
  }
  row->logits[place] = logit;
  row->tokens[place] = token;
}

// Update a row with `columns` more logits, the first being that of `first_token`; the row keeps the `limit` largest.
INLINE void add_block(row_state *row, index limit, const float *logits, index columns, index first_token) {
  float most = row->most;
  for (index start = 0; start < columns; start += RUN) {
    const index stop = MIN(start + RUN, columns);
    float largest = -INFINITY;
    if (stop == start + RUN) {
#pragma omp simd reduction(max : largest)
      for (index n = 0; n < RUN; n++) largest = MAX(largest, logits[start + n]);
    } else {
      for (index n = start; n < stop; n++) largest = MAX(largest, logits[n]);
    }
    most = MAX(most, largest);
    if (row->count == limit && !(largest > row->logits[limit - 1])) continue;
    for (index n = start; n < stop; n++)
      if (row->count < limit || logits[n] > row->logits[limit - 1]) insert(row, limit, logits[n], first_token + n);
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (index n = 0; n < columns; n++) sum += exponential(logits[n] - most);
  row->sum = row->sum * expf(row->most - most) + sum;
  row->most = most;
}

#define VERSION(processor) \
  static void add_block_##processor( \
      row_state *row, index limit, const float *logits, index columns, index first_token) { \
    add_block(row, limit, logits, columns, first_token); \
  }
VERSIONS(VERSION)

// log_probs[m], tokens[m] `[count]`: the largest of log_softmax(hidden[m] weight^T) and their places, largest first;
// among equals, the first. Shapes, all contiguous: hidden `[rows, K]`, weight `[V, K]`; count is at most V.
void most_probable(
    const float *hidden, const float *weight, float *log_probs, index *tokens, index rows, index V, index K,
    index count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (index m = 0; m < rows; m += ROWS) {
    const index height = MIN(ROWS, rows - m), own[] = {0, height};
    float logits[ROWS * COLUMNS] __attribute__((aligned(64)));
    row_state states[ROWS];
    for (index r = 0; r < height; r++)
      states[r] = (row_state){0, log_probs + (m + r) * count, tokens + (m + r) * count, -INFINITY, 0};
    for (index n = 0; n < V; n += COLUMNS) {
      const index columns = MIN(COLUMNS, V - n);
      grouped_gemm_linear(hidden + m * K, weight + n * K, NULL, logits, own, 1, columns, K, 1);
      for (index r = 0; r < height; r++)
        FOR_THIS_PROCESSOR(add_block, states + r, count, logits + r * columns, columns, n);
    }
    for (index r = 0; r < height; r++) {
      const float log_sum = logf(states[r].sum);
      for (index i = 0; i < count; i++) states[r].logits[i] = states[r].logits[i] - states[r].most - log_sum;
    }
  }
}
