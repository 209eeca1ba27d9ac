/* Products of a few float32 vectors with packed weights, which are decoded in vector registers.
 *
 *   out[t, r] = sum_g scale[r, g] * (sum_{k in g} number(code[r, k]) * x[t, k] - zero[r, g] * sums[t, g])
 *
 * A weight is read from memory once, whatever the number of vectors: for few, the time of a dense product is that of bringing its weight, four
 * to sixteen times the bytes. Codes come in blocks of 32 inputs, laid out by `blocks.to_blocks` so that one load and a shift or a
 * mask give eight neighbouring inputs. Needs GNU C (gcc, clang); the only instructions it names are those of AVX2 for widening
 * bytes and for tables, which compilers miss.
 */
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 8
#define BLOCK 32
#define VECTORS (BLOCK / LANES)
#define ROWS_OF_A_TASK 32
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

INLINE floats load_floats(const float *from) {
  floats found;
  memcpy(&found, from, sizeof found);
  return found;
}

/* Eight bytes as eight integers. */
INLINE ints load_bytes(const uint8_t *from) {
#ifdef __AVX2__
  return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
  bytes found;
  memcpy(&found, from, sizeof found);
  return __builtin_convertvector(found, ints);
#endif
}

INLINE float add_up(floats v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

/* Codes of eight inputs of a block, the i-th eight. */
INLINE ints codes_of(const int bits, const uint8_t *block, const int i) {
  if (bits == 8) return load_bytes(block + LANES * i);
  if (bits == 4) return i < 2 ? load_bytes(block + LANES * i) & 15 : load_bytes(block + LANES * (i - 2)) >> 4;
  const ints low = (load_bytes(block) >> (2 * i)) & 3;
  if (bits == 2) return low;
  int32_t high; /* the highest bits of all 32, a bit each */
  memcpy(&high, block + LANES, sizeof high);
  const ints each = {0, 1, 2, 3, 4, 5, 6, 7};
  return low | (((ints){0} + high) >> (each + LANES * i) & 1) << 2;
}

/* Entries of a table of 2^bits numbers. */
INLINE floats look_up(const int bits, const float *table, ints codes) {
#ifdef __AVX2__
  if (bits == 8) return (floats)_mm256_i32gather_ps(table, (__m256i)codes, 4);
  if (bits == 4) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
    return (floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)codes, 28)));
  }
#endif
  floats found;
  for (int i = 0; i < LANES; i++) found[i] = table[codes[i]];
  return found;
}

/* Numbers of the i-th eight inputs of a block. */
INLINE floats decode(const int bits, const int looked_up, const float *table, const uint8_t *block, const int i) {
  const ints codes = codes_of(bits, block, i);
  return looked_up ? look_up(bits, table, codes) : __builtin_convertvector(codes, floats);
}

typedef struct {
  const float *x;       /* (tokens, BLOCK * blocks), zeros where a row of the weight has ended */
  float *sums;          /* (tokens, groups), written: of x over the inputs of a group */
  const uint8_t *codes; /* (rows, 4 * bits * blocks) */
  const float *scale;   /* (rows, groups) */
  const float *zero;    /* (rows, groups), or one number where `zeros` is 0 */
  const float *table;   /* (2^bits,) where codes are looked up */
  float *out;           /* (tokens, rows) */
  int64_t tokens, rows, blocks, groups;
  int32_t bits, zeros, looked_up, threads;
} product;

/* Row `r` times TOKENS vectors from `first` on. Each result has SUMS sums under way, so that additions overlap. */
#define TILE(NAME, BITS, LOOKED_UP, TOKENS, SUMS)                                                             \
  static void NAME(const product *p, int64_t first, int64_t r) {                                              \
    const int64_t groups = p->groups, of_group = p->blocks / groups, width = BLOCK * p->blocks;               \
    const float *x = p->x + first * width, *sums = p->sums + first * groups;                                  \
    const uint8_t *at = p->codes + r * p->blocks * 4 * (BITS);                                                \
    floats total[TOKENS];                                                                                     \
    float less[TOKENS];                                                                                       \
    for (int t = 0; t < TOKENS; t++) total[t] = (floats){0}, less[t] = 0;                                     \
    for (int64_t g = 0; g < groups; g++) {                                                                    \
      floats part[TOKENS][SUMS];                                                                              \
      for (int t = 0; t < TOKENS; t++)                                                                        \
        for (int s = 0; s < SUMS; s++) part[t][s] = (floats){0};                                              \
      for (int64_t b = g * of_group; b < (g + 1) * of_group; b++, at += 4 * (BITS))                           \
        for (int i = 0; i < VECTORS; i++) {                                                                   \
          const floats w = decode(BITS, LOOKED_UP, p->table, at, i);                                          \
          for (int t = 0; t < TOKENS; t++)                                                                    \
            part[t][i % SUMS] += w * load_floats(x + t * width + b * BLOCK + LANES * i);                      \
        }                                                                                                     \
      const float scale = p->scale[r * groups + g];                                                           \
      const float zero = LOOKED_UP ? 0 : scale * (p->zeros ? p->zero[r * groups + g] : p->zero[0]);           \
      for (int t = 0; t < TOKENS; t++) {                                                                      \
        for (int s = 0; s < SUMS; s++) total[t] += scale * part[t][s];                                        \
        if (!(LOOKED_UP)) less[t] += zero * sums[t * groups + g];                                             \
      }                                                                                                       \
    }                                                                                                         \
    for (int t = 0; t < TOKENS; t++) p->out[(first + t) * p->rows + r] = add_up(total[t]) - less[t];          \
  }

#define KIND(NAME, BITS, LOOKED_UP)     \
  TILE(NAME##_1, BITS, LOOKED_UP, 1, 4) \
  TILE(NAME##_2, BITS, LOOKED_UP, 2, 2) \
  TILE(NAME##_4, BITS, LOOKED_UP, 4, 1)

KIND(integer2, 2, 0)
KIND(integer3, 3, 0)
KIND(integer4, 4, 0)
KIND(integer8, 8, 0)
KIND(table2, 2, 1)
KIND(table3, 3, 1)
KIND(table4, 4, 1)
KIND(table8, 8, 1)

typedef void tile(const product *, int64_t, int64_t);
#define TILES(NAME) {NAME##_1, NAME##_2, NAME##_4}
static tile *const tiles[2][4][3] = {{TILES(integer2), TILES(integer3), TILES(integer4), TILES(integer8)},
                                     {TILES(table2), TILES(table3), TILES(table4), TILES(table8)}};

void few_tokens(const product *p) {
  tile *const *own = tiles[p->looked_up != 0][p->bits == 8 ? 3 : p->bits - 2];
  const int64_t of_group = BLOCK * (p->blocks / p->groups), all = p->looked_up ? 0 : p->tokens * p->groups;
#pragma omp parallel num_threads(p->threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; i++) {
      floats sum = {0};
      for (int64_t k = 0; k < of_group; k += LANES) sum += load_floats(p->x + i * of_group + k);
      p->sums[i] = add_up(sum);
    }
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < p->rows; begin += ROWS_OF_A_TASK) {
      const int64_t end = begin + ROWS_OF_A_TASK < p->rows ? begin + ROWS_OF_A_TASK : p->rows;
      int64_t t = 0;
      for (int step = 2; step >= 0; step--)
        for (; t + (1 << step) <= p->tokens; t += 1 << step)
          for (int64_t r = begin; r < end; r++) own[step](p, t, r);
    }
  }
}

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* To bfloat16, to the nearest, ties to even; of numbers. */
INLINE halves narrowed(floats v) {
  const ints bits = (ints)v;
  return __builtin_convertvector(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) & 0xffff, halves);
}

/* Rows `begin` to `end` of the weight as float32, or bfloat16 if `half`, each `width` numbers long; x, sums and out are not read. */
void write_out(const product *p, void *out, int64_t begin, int64_t end, int64_t width, int half) {
#pragma omp parallel for num_threads(p->threads) schedule(static)
  for (int64_t r = begin; r < end; r++) {
    for (int64_t b = 0; b < p->blocks; b++) {
      const int64_t g = r * p->groups + b / (p->blocks / p->groups), at = b * BLOCK;
      const float scale = p->scale[g], less = p->looked_up ? 0 : scale * (p->zeros ? p->zero[g] : p->zero[0]);
      const uint8_t *codes = p->codes + (r * p->blocks + b) * 4 * p->bits;
      floats numbers[VECTORS];
#define WRITTEN(BITS, LOOKED_UP) \
  for (int i = 0; i < VECTORS; i++) numbers[i] = decode(BITS, LOOKED_UP, p->table, codes, i); \
  break
      switch (p->bits + 16 * (p->looked_up != 0)) {
        case 2: WRITTEN(2, 0);
        case 3: WRITTEN(3, 0);
        case 4: WRITTEN(4, 0);
        case 8: WRITTEN(8, 0);
        case 18: WRITTEN(2, 1);
        case 19: WRITTEN(3, 1);
        case 20: WRITTEN(4, 1);
        default: WRITTEN(8, 1);
      }
      for (int i = 0; i < VECTORS; i++) numbers[i] = scale * numbers[i] - less;
      const int64_t left = width - at, to = (r - begin) * width + at;
      halves narrow[VECTORS];
      if (half)
        for (int i = 0; i < VECTORS; i++) narrow[i] = narrowed(numbers[i]);
      if (left >= BLOCK) { /* apart: a copy of a number of bytes that is known late is slow */
        if (half)
          memcpy((uint16_t *)out + to, narrow, sizeof narrow);
        else
          memcpy((float *)out + to, numbers, sizeof numbers);
      } else if (left > 0) { /* a last group may be a few blocks short */
        if (half)
          memcpy((uint16_t *)out + to, narrow, 2 * left);
        else
          memcpy((float *)out + to, numbers, 4 * left);
      }
    }
  }
}
