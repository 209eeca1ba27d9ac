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
  int32_t *sums;        /* (tokens, groups), written: of the bytes of a group, times the zero point where all have the same */
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

/* What the zero points take from the sum of a group of a row, in the lowest of eight numbers. */
INLINE __m256i less(const product *p, const int bits, const int zeros, int64_t r, int64_t g, int32_t sum) {
  if (zeros) sum *= (int32_t)p->zero[r * p->groups + g] - (bits == 8 ? 128 : 0);
  return _mm256_zextsi128_si256(_mm_cvtsi32_si128(-sum));
}

/* Sums of 16 bits as sums of 32; of eight-bit codes two products fill 16 bits, and theirs are 32 already. */
INLINE __m256i widened(const int bits, const __m256i part) {
  return bits == 8 ? part : _mm256_madd_epi16(part, _mm256_set1_epi16(1));
}

INLINE __m256i add(const int bits, const __m256i part, const __m256i found) {
  return bits == 8 ? _mm256_add_epi32(part, _mm256_madd_epi16(found, _mm256_set1_epi16(1))) : _mm256_add_epi16(part, found);
}

#define ALL(I, COUNT) _Pragma("GCC unroll 4") for (int I = 0; I < (COUNT); I++)

/* Adds `count` blocks of `rows` rows and `tokens` vectors to their sums, two blocks at a time. */
INLINE void add_pairs(const int bits, const int rows, const int tokens, const int64_t count, const uint8_t *at, int64_t row,
                      const int8_t *x, int64_t width, __m256i part[4][4]) {
  for (int64_t b = 0; b < count; b += 2)
    ALL(i, rows) {
      __m256i two[2];
      codes_of_two(bits, at + i * row + b * 4 * bits, two);
      ALL(t, tokens) {
        const int8_t *own = x + t * width + b * BLOCK;
        part[i][t] = add(bits, add(bits, part[i][t], products(bits, two[0], own)), products(bits, two[1], own + BLOCK));
      }
    }
}

/* `rows` rows from `r` on times `tokens` vectors from `first` on; `run` blocks are added up in 16 bits. Groups have `of` blocks, 0: any
 * number. What is constant where it is called is so in the code that is made of it. */
INLINE void multiply(const product *p, int64_t first, int64_t r, const int bits, const int run, const int rows, const int tokens,
                     const int of, const int zeros) {
  const int64_t groups = p->groups, of_group = of ? of : p->blocks / groups, width = BLOCK * p->blocks, row = p->blocks * 4 * bits;
  const int8_t *x = p->rounded + first * width;
  const float *step = p->step + first * groups, *scale = p->scale + r * groups;
  const int32_t *sums = p->sums + first * groups;
  const uint8_t *at = p->codes + r * row;
  __m256 total[4][4];
  ALL(i, rows) ALL(t, tokens) total[i][t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g++, at += of_group * 4 * bits, x += of_group * BLOCK) {
    __m256i sum[4][4], part[4][4];
    ALL(i, rows) ALL(t, tokens) sum[i][t] = less(p, bits, zeros, r + i, g, sums[t * groups + g]);
    if (of) { /* all in 16 bits, whatever the codes */
      ALL(i, rows) ALL(t, tokens) part[i][t] = _mm256_setzero_si256();
      _Pragma("GCC unroll 2") for (int b = 0; b < of; b += 2)
        add_pairs(bits, rows, tokens, 2, at + b * 4 * bits, row, x + b * BLOCK, width, part);
      ALL(i, rows) ALL(t, tokens) sum[i][t] = _mm256_add_epi32(sum[i][t], widened(bits, part[i][t]));
    } else {
      for (int64_t b = 0; b < of_group; b += run) {
        const int64_t count = b + run < of_group ? run : of_group - b;
        ALL(i, rows) ALL(t, tokens) part[i][t] = _mm256_setzero_si256();
        if (of_group % 2 == 0)
          add_pairs(bits, rows, tokens, count, at + b * 4 * bits, row, x + b * BLOCK, width, part);
        else
          for (int64_t k = b; k < b + count; k++)
            ALL(i, rows) {
              const __m256i codes = codes_of(bits, at + i * row + k * 4 * bits);
              ALL(t, tokens) part[i][t] = add(bits, part[i][t], products(bits, codes, x + t * width + k * BLOCK));
            }
        ALL(i, rows) ALL(t, tokens) sum[i][t] = _mm256_add_epi32(sum[i][t], widened(bits, part[i][t]));
      }
    }
    ALL(i, rows) {
      const __m256 own = _mm256_broadcast_ss(scale + i * groups + g);
      ALL(t, tokens) {
        const __m256 each = _mm256_mul_ps(own, _mm256_broadcast_ss(step + t * groups + g));
        total[i][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][t]), each, total[i][t]);
      }
    }
  }
  ALL(i, rows) ALL(t, tokens) p->out[(first + t) * p->rows + r + i] = add_up(total[i][t]);
}

/* Tokens in fours, twos and ones, with each the most rows; groups of any size, of 64 and of 128 inputs. And a row at a time, for those
 * that are left. */
#define TILE(NAME, BITS, RUN, ROWS, TOKENS, OF)                                                                                 \
  static void NAME(const product *p, int64_t first, int64_t r) {                                                                \
    if (p->zeros)                                                                                                               \
      multiply(p, first, r, BITS, RUN, ROWS, TOKENS, OF, 1);                                                                    \
    else                                                                                                                        \
      multiply(p, first, r, BITS, RUN, ROWS, TOKENS, OF, 0);                                                                    \
  }
#define THREE(NAME, BITS, RUN, OF)         \
  TILE(NAME##_1, BITS, RUN, 4, 1, OF)      \
  TILE(NAME##_2, BITS, RUN, 2, 2, OF)      \
  TILE(NAME##_4, BITS, RUN, 1, 4, OF)
#define SINGLE(NAME, BITS, RUN)            \
  TILE(NAME##_single_1, BITS, RUN, 1, 1, 0) \
  TILE(NAME##_single_2, BITS, RUN, 1, 2, 0) \
  TILE(NAME##_single_4, BITS, RUN, 1, 4, 0)
#define KIND(NAME, BITS, RUN) THREE(NAME, BITS, RUN, 0) SINGLE(NAME, BITS, RUN)

KIND(integer2, 2, 32)
KIND(integer3, 3, 16)
KIND(integer4, 4, 8)
KIND(integer8, 8, 1 << 20)
THREE(integer2_64, 2, 32, 2)
THREE(integer3_64, 3, 16, 2)
THREE(integer4_64, 4, 8, 2)
THREE(integer2_128, 2, 32, 4)
THREE(integer3_128, 3, 16, 4)
THREE(integer4_128, 4, 8, 4)

typedef void tile(const product *, int64_t, int64_t);
#define NAMED(NAME) {NAME##_1, NAME##_2, NAME##_4}
#define TILES(NAME) {NAMED(NAME), NAMED(NAME##_64), NAMED(NAME##_128)}
static tile *const tiles[4][3][3] = {TILES(integer2), TILES(integer3), TILES(integer4),
                                     {NAMED(integer8), NAMED(integer8), NAMED(integer8)}};
static tile *const singles[4][3] = {NAMED(integer2_single), NAMED(integer3_single), NAMED(integer4_single), NAMED(integer8_single)};
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
  p->sums[i] = p->zeros ? sum : ((int32_t)p->zero[0] - (p->bits == 8 ? 128 : 0)) * sum;
}

void rounded_tokens(const product *p) {
  const int kind = p->bits == 8 ? 3 : p->bits - 2;
  const int64_t of_group = BLOCK * (p->blocks / p->groups);
  tile *const *own = tiles[kind][of_group == 64 ? 1 : of_group == 128 ? 2 : 0];
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
          for (; r + rows_of[step] <= end; r += rows_of[step]) own[step](p, t, r);
          for (; r < end; r++) singles[kind][step](p, t, r);
        }
    }
  }
}
