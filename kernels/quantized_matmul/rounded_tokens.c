/* Products of a few vectors, rounded to bytes, with packed integer weights: multiplied as bytes, added up as integers.
 *
 *   out[t, r] = sum_g scale[r, g] * step[t, g] * (sum_{k in g} code[r, k] * byte[t, k] - zero[r, g] * sums[t, g])
 *
 * Each vector has a step for each group of the weight, max |x| / 127. Thirty-two inputs take one multiplication and one addition for
 * each vector, a quarter of what float32 takes (`few_tokens.c`): it pays where more than one vector shares the decoding. Codes are
 * laid out by `blocks.to_blocks`. Needs GNU C and AVX2.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifndef __AVX2__
#error "needs AVX2"
#endif

#define BLOCK 32
#define ROWS_OF_A_TASK 32
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  const float *x;       /* (tokens, BLOCK * blocks), zeros where a row of the weight has ended */
  int8_t *rounded;      /* the same as bytes, written */
  float *step;          /* (tokens, groups), written: what a one of the bytes stands for */
  int32_t *sums;        /* (tokens, groups), written: of the bytes of a group */
  const uint8_t *codes; /* (rows, 4 * bits * blocks) */
  const float *scale;   /* (rows, groups) */
  const float *zero;    /* (rows, groups), whole numbers, or one where `zeros` is 0 */
  float *out;           /* (tokens, rows) */
  int64_t tokens, rows, blocks, groups;
  int32_t bits, zeros, threads, unused;
} product;

INLINE __m256i halves(__m128i low, __m128i high) { return _mm256_set_m128i(high, low); }

/* Codes of the 32 inputs of a block, in order; of eight bits the numbers themselves, with their signs. */
INLINE __m256i codes_of(const int bits, const uint8_t *block) {
  if (bits == 8) return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)block), _mm256_set1_epi8(-128));
  if (bits == 4) {
    const __m128i both = _mm_loadu_si128((const __m128i *)block), mask = _mm_set1_epi8(15);
    return halves(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
  }
  const __m128i four = _mm_loadl_epi64((const __m128i *)block), mask = _mm_set1_epi8(3);
  const __m128i a = _mm_and_si128(four, mask), b = _mm_and_si128(_mm_srli_epi16(four, 2), mask);
  const __m128i c = _mm_and_si128(_mm_srli_epi16(four, 4), mask), d = _mm_and_si128(_mm_srli_epi16(four, 6), mask);
  const __m256i low = halves(_mm_unpacklo_epi64(a, b), _mm_unpacklo_epi64(c, d));
  if (bits == 2) return low;
  int32_t high; /* the highest bits of all 32, a bit each */
  memcpy(&high, block + 8, sizeof high);
  const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(high), byte), bit);
  return _mm256_or_si256(low, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(4)));
}

/* Sums of pairs of products, sixteen of 16 bits: none exceeds 2 * 127 * (2^bits - 1), with eight bits 2 * 127 * 128. */
INLINE __m256i products(const int bits, const __m256i codes, const __m256i x) {
  if (bits == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
  return _mm256_maddubs_epi16(codes, x);
}

INLINE float add_up(__m256 v) {
  float each[8], total = 0;
  _mm256_storeu_ps(each, v);
  for (int i = 0; i < 8; i++) total += each[i];
  return total;
}

/* Row `r` times TOKENS vectors from `first` on; RUN blocks are added up in 16 bits. */
#define TILE(NAME, BITS, RUN, TOKENS)                                                                                     \
  static void NAME(const product *p, int64_t first, int64_t r) {                                                          \
    const int64_t groups = p->groups, of_group = p->blocks / groups, width = BLOCK * p->blocks;                           \
    const int8_t *x = p->rounded + first * width;                                                                         \
    const float *step = p->step + first * groups;                                                                         \
    const int32_t *sums = p->sums + first * groups;                                                                       \
    const uint8_t *at = p->codes + r * p->blocks * 4 * (BITS);                                                            \
    const __m256i ones = _mm256_set1_epi16(1);                                                                            \
    __m256 total[TOKENS];                                                                                                 \
    for (int t = 0; t < TOKENS; t++) total[t] = _mm256_setzero_ps();                                                      \
    for (int64_t g = 0, b = 0; g < groups; g++) {                                                                         \
      __m256i sum[TOKENS];                                                                                                \
      for (int t = 0; t < TOKENS; t++) sum[t] = _mm256_setzero_si256();                                                   \
      for (const int64_t end = b + of_group; b < end;) {                                                                  \
        __m256i part[TOKENS];                                                                                             \
        for (int t = 0; t < TOKENS; t++) part[t] = _mm256_setzero_si256();                                                \
        for (const int64_t stop = b + (RUN) < end ? b + (RUN) : end; b < stop; b++, at += 4 * (BITS)) {                   \
          const __m256i codes = codes_of(BITS, at);                                                                       \
          for (int t = 0; t < TOKENS; t++)                                                                                \
            part[t] = _mm256_add_epi16(                                                                                   \
                part[t], products(BITS, codes, _mm256_loadu_si256((const __m256i *)(x + t * width + b * BLOCK))));        \
        }                                                                                                                 \
        for (int t = 0; t < TOKENS; t++) sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(part[t], ones));             \
      }                                                                                                                   \
      const float scale = p->scale[r * groups + g];                                                                       \
      const int32_t zero = (int32_t)(p->zeros ? p->zero[r * groups + g] : p->zero[0]) - ((BITS) == 8 ? 128 : 0);          \
      for (int t = 0; t < TOKENS; t++) {                                                                                  \
        const __m256i less = _mm256_setr_epi32(zero * sums[t * groups + g], 0, 0, 0, 0, 0, 0, 0);                         \
        const __m256 each = _mm256_set1_ps(scale * step[t * groups + g]);                                                 \
        total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t], less)), each, total[t]);                   \
      }                                                                                                                   \
    }                                                                                                                     \
    for (int t = 0; t < TOKENS; t++) p->out[(first + t) * p->rows + r] = add_up(total[t]);                                \
  }

#define KIND(NAME, BITS, RUN)    \
  TILE(NAME##_1, BITS, RUN, 1)   \
  TILE(NAME##_2, BITS, RUN, 2)   \
  TILE(NAME##_4, BITS, RUN, 4)

KIND(integer2, 2, 32)
KIND(integer3, 3, 16)
KIND(integer4, 4, 8)
KIND(integer8, 8, 1)

typedef void tile(const product *, int64_t, int64_t);
#define TILES(NAME) {NAME##_1, NAME##_2, NAME##_4}
static tile *const tiles[4][3] = {TILES(integer2), TILES(integer3), TILES(integer4), TILES(integer8)};

/* One group of one vector: its bytes, their step, and their sum. */
static void round_group(const product *p, int64_t i, int64_t count) {
  const float *x = p->x + i * count;
  int8_t *to = p->rounded + i * count;
  float most = 0, none = 0;
  for (int64_t k = 0; k < count; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most, none += 0 * x[k];
  const float step = most / 127 + none, inverse = most > 1e-35f ? 127 / most : 0; /* none: NaN where x holds one, or infinity */
  int32_t sum = 0;
  for (int64_t k = 0; k < count; k++) {
    const int32_t rounded = (int32_t)rintf(x[k] * inverse);
    to[k] = (int8_t)rounded;
    sum += rounded;
  }
  p->step[i] = step;
  p->sums[i] = sum;
}

void rounded_tokens(const product *p) {
  tile *const *own = tiles[p->bits == 8 ? 3 : p->bits - 2];
  const int64_t of_group = BLOCK * (p->blocks / p->groups);
#pragma omp parallel num_threads(p->threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->tokens * p->groups; i++) round_group(p, i, of_group);
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
