// The products for one kind of processor. `grouped_gemm.c` includes this file once for each kind, having defined
//
//   TARGET    the attribute that lets the compiler use the processor's instructions
//   LANES     floats in one of its vectors
//   TILE      rows of a tile: 2 * TILE sums and their factors fill its registers
//   NAMED(x)  `x` with the processor's name appended
//
// All three products are made of the same tile: TILE numbers, one from each row, times a strip of PANEL numbers, summed
// over the product's inner dimension. The strips of one tile lie in the cache one after the other: they form a panel.

enum { NAMED(PANEL) = 2 * LANES };
#define PANEL NAMED(PANEL)

typedef float NAMED(vector) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define vector NAMED(vector)

// The numbers that a tile multiplies: the one of row r at step k is `at[r * row + k * step]`.
typedef struct {
  const float *at;
  index row, step;
} NAMED(factors);
#define factors NAMED(factors)

// Rows of memory that are needed next: a tile of depth d, while it is computed, fetches d numbers of each.
typedef struct {
  const float *at;
  index row, count;
} NAMED(upcoming);
#define upcoming NAMED(upcoming)

// out[r][0:PANEL] = sum over k of a[r][k] * panel[k][0:PANEL], added to `out` unless `fresh`; with `half`, only the
// first LANES of them.
INLINE TARGET void NAMED(multiply)(
    factors a, const float *panel, index depth, upcoming next, const int rows, const int half, int fresh, float *out,
    index out_row) {
  vector left[TILE], right[TILE];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) {
    left[r] = fresh ? (vector){0} : *(const vector *)(out + r * out_row);
    if (!half) right[r] = fresh ? (vector){0} : *(const vector *)(out + r * out_row + LANES);
  }
  for (index start = 0; start < depth; start += LINE) {
    for (index r = 0; r < next.count; r++) __builtin_prefetch(next.at + r * next.row + start);
    const index stop = MIN(start + LINE, depth);
    for (index k = start; k < stop; k++) {
      const vector l = *(const vector *)(panel + k * PANEL);
      const vector h = half ? l : *(const vector *)(panel + k * PANEL + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        const float factor = a.at[r * a.row + k * a.step];
        left[r] += factor * l;
        if (!half) right[r] += factor * h;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) {
    *(vector *)(out + r * out_row) = left[r];
    if (!half) *(vector *)(out + r * out_row + LANES) = right[r];
  }
}

// `multiply` for up to TILE rows: each number of rows has its own code, in which the sums stay in registers.
TARGET static void NAMED(tile)(
    factors a, const float *panel, index depth, upcoming next, index rows, int half, int fresh, float *out,
    index out_row) {
#define CASE(n) \
  case n: \
    if (half) NAMED(multiply)(a, panel, depth, next, n, 1, fresh, out, out_row); \
    else NAMED(multiply)(a, panel, depth, next, n, 0, fresh, out, out_row); \
    break;
  switch (rows) {
    CASE(1)
    CASE(2)
    CASE(3)
    CASE(4)
    CASE(5)
    CASE(6)
#if TILE > 6
    CASE(7)
    CASE(8)
    CASE(9)
    CASE(10)
    CASE(11)
    CASE(12)
#endif
  }
#undef CASE
}

// to[c][r] = from[r][c] for up to four rows and columns
INLINE TARGET void NAMED(transpose)(
    const float *from, index from_row, index rows, index columns, float *to, index to_row) {
  if (rows < 4 || columns < 4) {
    for (index r = 0; r < MIN(4, rows); r++)
      for (index c = 0; c < MIN(4, columns); c++) to[c * to_row + r] = from[r * from_row + c];
    return;
  }
  const four a = *(const four *)from, b = *(const four *)(from + from_row);
  const four c = *(const four *)(from + 2 * from_row), d = *(const four *)(from + 3 * from_row);
  const four ab = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
  const four cd = SHUFFLE(c, d, 0, 4, 1, 5), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
  *(four *)to = SHUFFLE(ab, cd, 0, 1, 4, 5);
  *(four *)(to + to_row) = SHUFFLE(ab, cd, 2, 3, 6, 7);
  *(four *)(to + 2 * to_row) = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
  *(four *)(to + 3 * to_row) = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
}

// Cut `[depth, columns]` of `from` into panels, padding the last one with zeros. A gap of one strip separates panels,
// so that the same step of different panels does not map to the same place in the cache.
TARGET static void NAMED(pack)(const float *from, index from_row, index depth, index columns, float *panels) {
  for (index k = 0; k < depth; k++)
    for (index c = 0; c < columns; c += PANEL) {
      const float *f = from + k * from_row + c;
      float *to = panels + c * (depth + 1) + k * PANEL;
      if (columns - c >= PANEL) {
        *(vector *)to = *(const vector *)f;
        *(vector *)(to + LANES) = *(const vector *)(f + LANES);
      } else {
        for (int j = 0; j < PANEL; j++) to[j] = j < columns - c ? f[j] : 0;
      }
    }
}

// `tile` for an `out` that may be narrower than the panel: it has `columns` columns.
INLINE TARGET void NAMED(tile_within)(
    factors a, const float *panel, index depth, upcoming next, index rows, index columns, int fresh, float *out,
    index out_row) {
  if (columns >= PANEL) {
    NAMED(tile)(a, panel, depth, next, rows, 0, fresh, out, out_row);
    return;
  }
  float sums[TILE * PANEL];
  NAMED(tile)(a, panel, depth, next, rows, columns <= LANES, 1, sums, PANEL);
  for (index r = 0; r < rows; r++)
    for (index c = 0; c < columns; c++) out[r * out_row + c] = sums[r * PANEL + c] + (fresh ? 0 : out[r * out_row + c]);
}

// y[m][n] = bias[n] + sum over k of x[m][k] * w[n][k], for all `rows` m and for n from `from` to `to`.
//
// The panels hold the rows side by side, and the weights are the factors: each is read in place, once for all rows.
TARGET static void NAMED(linear)(
    const float *x, const float *w, const float *bias, float *y, index rows, index from, index to, index N, index K) {
  float panels[ROWS * DEPTH] __attribute__((aligned(64)));
  float sums[ROWS / PANEL][COLUMNS][PANEL] __attribute__((aligned(64)));
  const index count = (rows + PANEL - 1) / PANEL;
  for (index p = 0; p < count; p++)
    for (index n = from; n < to; n++)
      for (int m = 0; m < PANEL; m++) sums[p][n - from][m] = bias ? bias[n] : 0;
  // Few rows leave room for deeper panels, and memory is read faster in long runs.
  const index deepest = MIN(4 * DEPTH, ROWS * DEPTH / (count * PANEL));
  for (index k = 0; k < K; k += deepest) {
    const index depth = MIN(deepest, K - k);
    for (index i = rows / PANEL * PANEL * depth; i < count * PANEL * depth; i++) panels[i] = 0;
    for (index m = 0; m < rows; m += 4) {
      float *panel = panels + m / PANEL * PANEL * depth + m % PANEL;
      for (index i = 0; i < depth; i += 4)
        NAMED(transpose)(x + m * K + k + i, K, rows - m, depth - i, panel + i * PANEL, PANEL);
    }
    for (index n = from; n < to; n += TILE) {
      const factors a = {w + n * K + k, K, 1};
      const index ahead = MAX(0, MIN(TILE, to - n - TILE));
      for (index p = 0; p < count; p++) {
        const index first = ahead * p / count, last = ahead * (p + 1) / count;
        const upcoming next = {a.at + (TILE + first) * K, K, last - first};
        const int half = rows - p * PANEL <= LANES;
        const float *panel = panels + p * PANEL * depth;
        NAMED(tile)(a, panel, depth, next, MIN(TILE, to - n), half, 0, sums[p][n - from], PANEL);
      }
    }
  }
  for (index m = 0; m < rows; m += 4)
    for (index n = from; n < to; n += 4)
      NAMED(transpose)(sums[m / PANEL][n - from] + m % PANEL, PANEL, to - n, rows - m, y + m * N + n, N);
}

// grad_x[m][k] = sum over n of grad_y[m][n] * w[n][k], for all `rows` m and for k from `from` to `to`.
//
// The weights are packed block by block; while one block is multiplied, the next is fetched.
TARGET static void NAMED(grad_input)(
    const float *grad_y, const float *w, float *grad_x, index rows, index from, index to, index N, index K) {
  float panels[(BLOCK + 1) * COLUMNS] __attribute__((aligned(64)));
  float sums[COLUMNS / PANEL][ROWS][PANEL] __attribute__((aligned(64)));
  enum { PARTS = COLUMNS / BLOCK };  // a tile is BLOCK deep: this many tiles fetch a row
  const index columns = to - from, tiles = (rows + TILE - 1) / TILE;
  const index height = (rows + tiles - 1) / tiles;  // tiles of about equal height
  const index shares = tiles * (COLUMNS / PANEL / PARTS);
  for (index n = 0; n < N; n += BLOCK) {
    const index depth = MIN(BLOCK, N - n), ahead = MAX(0, MIN(BLOCK, N - n - BLOCK));
    NAMED(pack)(w + n * K + from, K, depth, columns, panels);
    for (index k = 0; k < columns; k += PANEL)
      for (index m = 0; m < rows; m += height) {
        const factors a = {grad_y + m * N + n, N, 1};
        const index p = k / PANEL, share = p / PARTS * tiles + m / height;  // this tile's share of the next block
        const index first = ahead * share / shares, last = ahead * (share + 1) / shares;
        const upcoming next = {w + (n + BLOCK + first) * K + from + p % PARTS * BLOCK, K, last - first};
        const float *panel = panels + k * (depth + 1);
        NAMED(tile)
        (a, panel, depth, next, MIN(height, rows - m), columns - k <= LANES, n == 0, sums[p][m], PANEL);
      }
  }
  for (index m = 0; m < rows; m++)
    for (index k = 0; k < columns; k++) grad_x[m * K + from + k] = sums[k / PANEL][m][k % PANEL];
}

// grad_w[n][k] = sum over m of grad_y[m][n] * x[m][k], for n from `from` to `to`, all `rows` m and all `columns` k.
TARGET static void NAMED(grad_weight)(
    const float *grad_y, const float *x, float *grad_w, index rows, index from, index to, index columns, index N,
    index K) {
  enum { STRIP = 4 * LINE };  // this many n at a time, so that whole cache lines of grad_y are read
  float panels[(BLOCK + 4) * COLUMNS] __attribute__((aligned(64)));
  float strip[(STRIP + TILE) * BLOCK + LANES] __attribute__((aligned(64)));  // tiles one after the other
  for (index m = 0; m == 0 || m < rows; m += BLOCK) {
    const index depth = MIN(BLOCK, rows - m);
    NAMED(pack)(x + m * K, K, depth, columns, panels);
    for (index n0 = from; n0 < to; n0 += STRIP) {
      const index end = MIN(n0 + STRIP, to);
      for (index n = n0; n < end; n += TILE) {
        float *t = strip + (n - n0) * depth;
        for (index i = 0; i < depth; i++) {
          const float *source = grad_y + (m + i) * N + n;
          if (n + LANES <= N)  // the next copy overwrites any surplus
            *(vector *)(t + i * TILE) = *(const vector *)source;
          else
            for (index r = 0; r < MIN(TILE, end - n); r++) t[i * TILE + r] = source[r];
        }
      }
      for (index n = n0; n < end; n += TILE) {
        const index tile = MIN(TILE, end - n);
        const factors a = {strip + (n - n0) * depth, 1, TILE};
        const index ahead = m == 0 ? MAX(0, MIN(TILE, to - n - TILE)) : 0;
        for (index k = 0; k < columns; k += PANEL) {
          float *out = grad_w + n * K + k;
          const upcoming next = {out + TILE * K, K, ahead};  // fetched although it is only written
          NAMED(tile_within)(a, panels + k * (depth + 1), depth, next, tile, columns - k, m == 0, out, K);
        }
      }
    }
  }
}

#undef upcoming
#undef factors
#undef vector
#undef PANEL
