/* Products of a few vectors, rounded to bytes, with packed integer weights: multiplied as bytes, added up as integers.
 *
 *   out[t, r] = sum_g scale[r, g] * step[t, g] * (sum_{k in g} code[r, k] * byte[t, k] - zero[r, g] * sums[t, g])
 *
 * Each vector has a step for each group of the weight, max |x| / 127. Thirty-two inputs take one multiplication and one addition for
 * each vector, a quarter of what float32 takes (`few_tokens.c`). Codes are laid out by `blocks.to_blocks`. Two blocks are
 * decoded at once, since both halves of a register then come from one load, a shift and a mask; bytes of x are stored in the order in
 * which that gives the codes. One vector is multiplied by four rows at once, two by two, four by one: as many numbers are under way
 * as registers hold, and of one vector, where memory is what takes time, four rows are being loaded. Needs GNU C and AVX2.
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
  int8_t *rounded;      /* the same as bytes, written, in the order of the decoded codes */
  float *step;          /* (tokens, groups), written: what a one of the bytes stands for */
  float *sums;          /* (tokens, groups), written: of the rounded x of a group */
  const uint8_t *codes; /* (rows, 4 * bits * blocks) */
  const float *scale;   /* (rows, groups) */
  const float *zero;    /* (rows, groups), whole numbers, or one where `zeros` is 0 */
  float *out;           /* (tokens, rows) */
  int64_t tokens, rows, blocks, groups;
  int32_t bits, zeros, threads, unused;
} product;

INLINE __m256i halves(__m128i low, __m128i high) { return _mm256_set_m128i(high, low); }
INLINE __m256i twice(__m128i both) { return _mm256_broadcastsi128_si256(both); }

/* The highest bits of 32 codes, a bit each: `bits` has them in four bytes of either half, which `own` sends to their places. */
INLINE __m256i highest(__m256i bits, __m256i own) {
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  const __m256i alone = _mm256_and_si256(_mm256_shuffle_epi8(bits, own), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(alone, bit), _mm256_set1_epi8(4));
}

/* Codes of the 32 inputs of a block, in order; of eight bits the numbers themselves, with their signs. */
INLINE __m256i codes_of(const int bits, const uint8_t *block) {
  if (bits == 8) return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)block), _mm256_set1_epi8(-128));
  if (bits == 4) {
    const __m128i both = _mm_loadu_si128((const __m128i *)block), mask = _mm_set1_epi8(15);
    return halves(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
  }
  const __m256i four = _mm256_set1_epi64x(*(const int64_t *)memcpy(&(int64_t){0}, block, 8));
  const __m256i low = _mm256_and_si256(_mm256_srlv_epi64(four, _mm256_setr_epi64x(0, 2, 4, 6)), _mm256_set1_epi8(3));
  if (bits == 2) return low;
  int32_t high;
  memcpy(&high, block + 8, sizeof high);
  const __m256i own = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  return _mm256_or_si256(low, highest(_mm256_set1_epi32(high), own));
}

/* Codes of two blocks, a (bits, two) and b: with four bits the first sixteen of a and of b, then the others; with two and three the
 * first eight of a, of b, the next eight of a and of b, then the others; with eight in order. */
INLINE void codes_of_two(const int bits, const uint8_t *block, __m256i two[2]) {
  if (bits == 8) {
    two[0] = codes_of(8, block), two[1] = codes_of(8, block + BLOCK);
  } else if (bits == 4) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)block), mask = _mm256_set1_epi8(15);
    two[0] = _mm256_and_si256(both, mask), two[1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  } else {
    const __m128i a = _mm_loadl_epi64((const __m128i *)block), b = _mm_loadl_epi64((const __m128i *)(block + 4 * bits));
    const __m256i four = twice(bits == 2 ? _mm_loadu_si128((const __m128i *)block) : _mm_unpacklo_epi64(a, b));
    const __m256i mask = _mm256_set1_epi8(3);
    two[0] = _mm256_and_si256(_mm256_srlv_epi64(four, _mm256_setr_epi64x(0, 0, 2, 2)), mask);
    two[1] = _mm256_and_si256(_mm256_srlv_epi64(four, _mm256_setr_epi64x(4, 4, 6, 6)), mask);
    if (bits == 2) return;
    int32_t high[2];
    memcpy(high, block + 8, 4), memcpy(high + 1, block + 20, 4);
    const __m256i bits_of = _mm256_setr_epi32(high[0], high[1], 0, 0, high[0], high[1], 0, 0), next = _mm256_set1_epi8(2);
    const __m256i own = _mm256_setr_epi64x(0, 0x0404040404040404, 0x0101010101010101, 0x0505050505050505);
    two[0] = _mm256_or_si256(two[0], highest(bits_of, own));
    two[1] = _mm256_or_si256(two[1], highest(bits_of, _mm256_add_epi8(own, next)));
  }
}

/* Sums of pairs of products, sixteen of 16 bits: none exceeds 2 * 127 * (2^bits - 1), with eight bits 2 * 127 * 128. */
INLINE __m256i products(const int bits, const __m256i codes, const int8_t *x) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i *)x);
  if (bits == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(bytes, codes));
  return _mm256_maddubs_epi16(codes, bytes);
}

INLINE float add_up(__m256 v) {
  float each[8], total = 0;
  _mm256_storeu_ps(each, v);
  for (int i = 0; i < 8; i++) total += each[i];
  return total;
}

/* sum_g scale[g] * zero[g] * sums[g] */
static float shift(const product *p, int64_t r, const float *sums, float middle) {
  const float *scale = p->scale + r * p->groups, *zero = p->zeros ? p->zero + r * p->groups : 0;
  __m256 total = _mm256_setzero_ps();
  float rest = 0;
  int64_t g = 0;
  for (; g + 8 <= p->groups; g += 8) {
    const __m256 from = _mm256_add_ps(zero ? _mm256_loadu_ps(zero + g) : _mm256_setzero_ps(), _mm256_set1_ps(middle));
    total = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_loadu_ps(scale + g), from), _mm256_loadu_ps(sums + g), total);
  }
  for (; g < p->groups; g++) rest += scale[g] * ((zero ? zero[g] : 0) + middle) * sums[g];
  return rest + add_up(total);
}

/* ROWS rows from `r` on times TOKENS vectors from `first` on; products of PAIRS * 2 + 1 blocks at most are added up in 16 bits,
 * `two` blocks decoded at once where groups are a multiple of two. */
#define TILE(NAME, BITS, RUN, ROWS, TOKENS)                                                                                  \
  static void NAME(const product *p, int64_t first, int64_t r) {                                                             \
    const int64_t groups = p->groups, of_group = p->blocks / groups, width = BLOCK * p->blocks, row = p->blocks * 4 * (BITS); \
    const int8_t *x = p->rounded + first * width;                                                                            \
    const float *step = p->step + first * groups, *scale = p->scale + r * groups;                                            \
    const uint8_t *at = p->codes + r * row;                                                                                  \
    const __m256i ones = _mm256_set1_epi16(1);                                                                               \
    __m256 total[ROWS][TOKENS];                                                                                              \
    for (int i = 0; i < ROWS; i++)                                                                                           \
      for (int t = 0; t < TOKENS; t++) total[i][t] = _mm256_setzero_ps();                                                    \
    for (int64_t g = 0, b = 0; g < groups; g++) {                                                                            \
      __m256i sum[ROWS][TOKENS];                                                                                             \
      for (int i = 0; i < ROWS; i++)                                                                                         \
        for (int t = 0; t < TOKENS; t++) sum[i][t] = _mm256_setzero_si256();                                                 \
      for (const int64_t end = b + of_group; b < end;) {                                                                     \
        __m256i part[ROWS][TOKENS];                                                                                          \
        for (int i = 0; i < ROWS; i++)                                                                                       \
          for (int t = 0; t < TOKENS; t++) part[i][t] = _mm256_setzero_si256();                                              \
        const int64_t stop = b + (RUN) < end ? b + (RUN) : end;                                                              \
        if (of_group % 2 == 0)                                                                                               \
          for (; b < stop; b += 2, at += 8 * (BITS))                                                                         \
            for (int i = 0; i < ROWS; i++) {                                                                                 \
              __m256i two[2];                                                                                                \
              codes_of_two(BITS, at + i * row, two);                                                                         \
              for (int t = 0; t < TOKENS; t++) {                                                                             \
                const int8_t *own = x + t * width + b * BLOCK;                                                               \
                if ((BITS) == 8) /* two sums of 16 bits have no room for each other */                                       \
                  part[i][t] = _mm256_add_epi32(_mm256_madd_epi16(products(BITS, two[0], own), ones),                        \
                                                _mm256_madd_epi16(products(BITS, two[1], own + BLOCK), ones));               \
                else                                                                                                         \
                  part[i][t] = _mm256_add_epi16(part[i][t], _mm256_add_epi16(products(BITS, two[0], own),                    \
                                                                             products(BITS, two[1], own + BLOCK)));          \
              }                                                                                                              \
            }                                                                                                                \
        else                                                                                                                 \
          for (; b < stop; b++, at += 4 * (BITS))                                                                            \
            for (int i = 0; i < ROWS; i++) {                                                                                 \
              const __m256i codes = codes_of(BITS, at + i * row);                                                            \
              for (int t = 0; t < TOKENS; t++) {                                                                             \
                const __m256i found = products(BITS, codes, x + t * width + b * BLOCK);                                      \
                part[i][t] = (BITS) == 8 ? _mm256_add_epi32(part[i][t], _mm256_madd_epi16(found, ones))                      \
                                         : _mm256_add_epi16(part[i][t], found);                                              \
              }                                                                                                              \
            }                                                                                                                \
        for (int i = 0; i < ROWS; i++)                                                                                       \
          for (int t = 0; t < TOKENS; t++)                                                                                   \
            sum[i][t] = _mm256_add_epi32(sum[i][t], (BITS) == 8 ? part[i][t] : _mm256_madd_epi16(part[i][t], ones));         \
      }                                                                                                                      \
      for (int i = 0; i < ROWS; i++) {                                                                                       \
        const __m256 own = _mm256_broadcast_ss(scale + i * groups + g);                                                      \
        for (int t = 0; t < TOKENS; t++) {                                                                                   \
          const __m256 each = _mm256_mul_ps(own, _mm256_broadcast_ss(step + t * groups + g));                                \
          total[i][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][t]), each, total[i][t]);                                   \
        }                                                                                                                    \
      }                                                                                                                      \
    }                                                                                                                        \
    const float middle = (p->zeros ? 0 : p->zero[0]) - ((BITS) == 8 ? 128 : 0);                                              \
    for (int i = 0; i < ROWS; i++)                                                                                           \
      for (int t = 0; t < TOKENS; t++)                                                                                       \
        p->out[(first + t) * p->rows + r + i] = add_up(total[i][t]) - shift(p, r + i, p->sums + (first + t) * groups, middle); \
  }

/* Tokens in fours, twos and ones; with each the most rows, and one for those that are left. */
#define KIND(NAME, BITS, RUN)         \
  TILE(NAME##_1_1, BITS, RUN, 1, 1)   \
  TILE(NAME##_1_2, BITS, RUN, 1, 2)   \
  TILE(NAME##_1_4, BITS, RUN, 1, 4)   \
  TILE(NAME##_2_2, BITS, RUN, 2, 2)   \
  TILE(NAME##_4_1, BITS, RUN, 4, 1)

KIND(integer2, 2, 32)
KIND(integer3, 3, 16)
KIND(integer4, 4, 8)
KIND(integer8, 8, 2)

typedef void tile(const product *, int64_t, int64_t);
#define TILES(NAME) {{NAME##_1_1, NAME##_1_2, NAME##_1_4}, {NAME##_4_1, NAME##_2_2, NAME##_1_4}}
static tile *const tiles[4][2][3] = {TILES(integer2), TILES(integer3), TILES(integer4), TILES(integer8)};
static const int64_t rows_of[3] = {4, 2, 1};

/* Where the bytes of an input stand, among those of two blocks: as `codes_of_two` gives the codes. */
INLINE int64_t place(int32_t bits, int64_t k) {
  const int64_t block = k / BLOCK, in = k % BLOCK;
  if (bits == 8) return k;
  if (bits == 4) return in / 16 * BLOCK + block * 16 + in % 16;
  return in / 8 * 16 + block * 8 + in % 8;
}

/* One group of one vector: its bytes, their step, and their sum. */
static void round_group(const product *p, int64_t i, int64_t count) {
  const float *x = p->x + i * count;
  int8_t *to = p->rounded + i * count;
  float most = 0, none = 0;
  for (int64_t k = 0; k < count; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most, none += 0 * x[k];
  const float step = most / 127 + none, inverse = most > 1e-35f ? 127 / most : 0; /* none: NaN where x holds one, or infinity */
  const int two = count % (2 * BLOCK) == 0;
  int32_t sum = 0;
  for (int64_t k = 0; k < count; k++) {
    const int32_t rounded = (int32_t)rintf(x[k] * inverse);
    to[two ? k / (2 * BLOCK) * (2 * BLOCK) + place(p->bits, k % (2 * BLOCK)) : k] = (int8_t)rounded;
    sum += rounded;
  }
  p->step[i] = step;
  p->sums[i] = step * (float)sum;
}

void rounded_tokens(const product *p) {
  tile *const(*own)[3] = tiles[p->bits == 8 ? 3 : p->bits - 2];
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
        for (; t + (1 << step) <= p->tokens; t += 1 << step) {
          int64_t r = begin;
          for (; r + rows_of[step] <= end; r += rows_of[step]) own[1][step](p, t, r);
          for (; r < end; r++) own[0][step](p, t, r);
        }
    }
  }
}
