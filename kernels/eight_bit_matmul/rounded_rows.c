/* Products of vectors rounded to bytes with int8 weights on a CPU with VNNI, and what comes before and after them.
 *
 *   code[t, k] = round(x[t, k] / step[t]) + zero[t]                               unsigned bytes
 *   y[t, r] = f(step[t] scale[r] (sum_k code[t, k] weight[r, k] - zero[t] sums[r]) + bias[r]) factor[t, r] + residual[t, r]
 *
 * The sums of some rows of x and 64 outputs stay in registers from the first input to the last, and what is done with them
 * before they are stored is done there: nothing but x and y goes through memory. Weights are laid out so that one step of the
 * loop reads 256 bytes in a row: four inputs of each of 64 outputs. Where the result is to be rounded again for the next
 * product, rows stay in the core's cache until they are. */
#if !(defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)) && !defined(__AVXVNNI__)
#error "needs VNNI"
#endif
#include <immintrin.h>
#include <stdlib.h>

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ROWS 6
typedef __m512i sums_of_lanes;
/* In assembly: gcc 12 moves the sums of the intrinsic through memory. */
#define ADD_PRODUCTS(sums, bytes, weights) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights))
#define SPREAD(four) _mm512_set1_epi32(four)
#define LOADED(from) _mm512_loadu_si512(from)
#define STORE(to, sums) _mm512_storeu_si512(to, sums)
#else
#define ROWS 3
typedef __m256i sums_of_lanes;
#define ADD_PRODUCTS(sums, bytes, weights) (sums) = _mm256_dpbusd_avx_epi32(sums, bytes, weights)
#define SPREAD(four) _mm256_set1_epi32(four)
#define LOADED(from) _mm256_loadu_si256((const __m256i *)(from))
#define STORE(to, sums) _mm256_storeu_si256((__m256i *)(to), sums)
#endif
#define OUTPUTS 64                       /* whose weights lie together */
#define PARTS (OUTPUTS / (4 * LANES))    /* of them, that are summed at once: four vectors */
#define WIDE 4 /* written out where sums are in registers */

typedef struct {
    const void *x;         /* (tokens, features), rows x_step apart; or NULL where codes are there */
    uint8_t *codes;        /* (tokens, held), held being features filled up to four with zeros */
    float *grid;           /* (tokens, 2): step and zero; (1, 2) where `given` */
    const int8_t *weights; /* (outputs / 64, held / 4, 64, 4) */
    const float *scale;    /* (outputs,), filled up to 64 as all of these */
    const int32_t *sums;   /* (outputs,), of the weights of each */
    const float *bias;     /* (outputs,) or NULL */
    const void *factor, *residual; /* (tokens, outputs) or NULL, in y's dtype */
    void *y;               /* (tokens, outputs); or NULL where it is rounded */
    uint8_t *next_codes;   /* (tokens, next_held) */
    float *next_grid;      /* (tokens, 2), or (1, 2) where `next_given` */
    int64_t tokens, features, held, outputs, next_held, x_step;
    int32_t activation, half, given, next_given, threads, unused;
} product;

typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE bytes to_bytes(ivec numbers) {
#if LANES == 16
    return (bytes)_mm512_cvtepi32_epi8((__m512i)numbers);
#else
    return __builtin_convertvector(numbers, bytes);
#endif
}

INLINE bytes codes_of(vec x, float step, float zero) {
    const vec code = x / step; /* not times its inverse, which would round otherwise now and then */
    /* Rounds to even, which adding and taking away does up to 2^22; what is beyond all codes is cut off before. */
    const vec cut = smaller((vec){0} + 1024.f, larger((vec){0} - 1024.f, code));
    const vec whole = (cut + 12582912.f) - 12582912.f + zero;
    return to_bytes(__builtin_convertvector(smaller(larger(whole, (vec){0}), (vec){0} + 255.f), ivec));
}

/* One row to bytes; its step and zero are looked for, or given. */
INLINE void round_row_of(const int half, const void *x, int64_t at, uint8_t *codes, int64_t features, int64_t held, float *grid, int given) {
    const int64_t whole = features / LANES * LANES, rest = features - whole;
    if (!given) {
        vec top = {0}, bottom = {0}, sum = {0};
        for (int64_t k = 0; k < whole; k += LANES) {
            const vec here = read_all(x, at + k, half);
            top = larger(here, top), bottom = smaller(here, bottom), sum += here;
        }
        if (rest) {
            const vec here = read_some(x, at + whole, rest, half);
            top = larger(here, top), bottom = smaller(here, bottom), sum += here;
        }
        const float most = largest(top), least = -largest(-bottom), step = (most - least) / 255;
        const float zero = rintf(-128 - least / (step == 0 ? 1 : step)), all = total(sum);
        grid[0] = all != all ? NAN : step; /* what is not a number stays so, and infinities give none */
        grid[1] = 128 + (zero < -128 ? -128 : zero > 127 ? 127 : zero);
    }
    const float step = grid[0] == 0 ? 1 : grid[0], zero = grid[1];
    for (int64_t k = 0; k < whole; k += LANES) *(bytes *)(codes + k) = codes_of(read_all(x, at + k, half), step, zero);
    if (rest) { /* apart: a copy of a number of bytes that is known late is slow */
        const bytes last = codes_of(read_some(x, at + whole, rest, half), step, zero);
        memcpy(codes + whole, &last, rest);
        memset(codes + features, 0, held - features);
    }
}

static void round_row(const void *x, int64_t at, int half, uint8_t *codes, int64_t features, int64_t held, float *grid, int given) {
    if (half)
        round_row_of(1, x, at, codes, features, held, grid, given);
    else
        round_row_of(0, x, at, codes, features, held, grid, given);
}

/* Sums of `rows` rows of codes with WIDE vectors of outputs. Functions of their own: beside anything else the compiler keeps
   constants in the registers that the sums need. */
INLINE void add_up(const int rows, const uint8_t *codes, int64_t held, const int8_t *weights, int32_t *found) {
    const sums_of_lanes none = SPREAD(0);
    /* No array: gcc 12 keeps those in memory. */
#define BEGIN(I) sums_of_lanes sum##I##0 = none, sum##I##1 = none, sum##I##2 = none, sum##I##3 = none;
#define ADD(I)                                                                                                      \
    if (rows > I) {                                                                                                 \
        int32_t four;                                                                                               \
        memcpy(&four, codes + I * held + k, 4);                                                                     \
        const sums_of_lanes spread = SPREAD(four);                                                                   \
        ADD_PRODUCTS(sum##I##0, spread, weight0);                                                                    \
        ADD_PRODUCTS(sum##I##1, spread, weight1);                                                                    \
        ADD_PRODUCTS(sum##I##2, spread, weight2);                                                                    \
        ADD_PRODUCTS(sum##I##3, spread, weight3);                                                                    \
    }
#define END(I)                                                                                                      \
    if (rows > I) {                                                                                                 \
        int32_t *to = found + I * WIDE * LANES;                                                                     \
        STORE(to, sum##I##0);                                                                                       \
        STORE(to + LANES, sum##I##1);                                                                               \
        STORE(to + 2 * LANES, sum##I##2);                                                                           \
        STORE(to + 3 * LANES, sum##I##3);                                                                           \
    }
    BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3) BEGIN(4) BEGIN(5)
    for (int64_t k = 0; k < held; k += 4) {
        const int8_t *here = weights + k * OUTPUTS;
        const sums_of_lanes weight0 = LOADED(here), weight1 = LOADED(here + 4 * LANES), weight2 = LOADED(here + 8 * LANES),
                            weight3 = LOADED(here + 12 * LANES);
        ADD(0) ADD(1) ADD(2) ADD(3) ADD(4) ADD(5)
    }
    END(0) END(1) END(2) END(3) END(4) END(5)
}

#define ADD_UP(N)                                                                                                       \
    static __attribute__((noinline)) void add_up_##N(const uint8_t *codes, int64_t held, const int8_t *weights, int32_t *found) { \
        add_up(N, codes, held, weights, found);                                                                         \
    }
ADD_UP(1)
ADD_UP(2)
ADD_UP(3)
#if ROWS > 3
ADD_UP(4)
ADD_UP(5)
ADD_UP(6)
#endif

typedef void (*adder)(const uint8_t *, int64_t, const int8_t *, int32_t *);
static const adder ADDERS[] = {
    NULL, add_up_1, add_up_2, add_up_3,
#if ROWS > 3
    add_up_4, add_up_5, add_up_6,
#endif
};

/* Finishes sums and stores them at column `column` of y. */
INLINE void finish(const int activation, const product *given, const int32_t *sums, int64_t first, int64_t rows, int64_t column, void *y,
                   int64_t y_first, int64_t y_step, int half) {
    const product own = *given, *p = &own; /* a copy, which what is stored cannot change */
    for (int64_t i = 0; i < rows; i++) {
        const float *grid = p->grid + (p->given ? 0 : 2 * (first + i));
        const float step = grid[0];
        const int32_t zero = (int32_t)grid[1];
        for (int j = 0; j < WIDE; j++) {
            const int64_t at = column + j * LANES, count = p->outputs - at, beside = (first + i) * p->outputs + at;
            if (count <= 0) break;
            const ivec whole = *(const ivec *)(sums + (i * WIDE + j) * LANES) - zero * *(const ivec *)(p->sums + at);
            vec z = __builtin_convertvector(whole, vec) * (*(const vec *)(p->scale + at) * step);
            if (p->bias) z += *(const vec *)(p->bias + at);
            z = activated(activation, z);
            if (count >= LANES) {
                if (p->factor) z *= read_all(p->factor, beside, p->half);
                if (p->residual) z += read_all(p->residual, beside, p->half);
                write_all(y, (y_first + i) * y_step + at, half, z);
            } else {
                if (p->factor) z *= read_some(p->factor, beside, count, p->half);
                if (p->residual) z += read_some(p->residual, beside, count, p->half);
                write_some(y, (y_first + i) * y_step + at, count, half, z);
            }
        }
    }
}

static void finished(const product *p, const int32_t *sums, int64_t first, int64_t rows, int64_t column, void *y, int64_t y_first,
                     int64_t y_step, int half) {
#define CASE(WHICH) case WHICH: finish(WHICH, p, sums, first, rows, column, y, y_first, y_step, half); break;
    switch (p->activation) {
        CASE(RELU) CASE(RELU2) CASE(GELU) CASE(GELU_TANH) CASE(SILU) CASE(QUICK_GELU) CASE(SIGMOID) CASE(TANH)
        default: finish(NOTHING, p, sums, first, rows, column, y, y_first, y_step, half);
    }
}

/* All of some rows and of some blocks of 64 outputs. */
static void tile(const product *p, int64_t first, int64_t last, int64_t block, int64_t end, void *y, int64_t y_first, int64_t y_step,
                 int half) {
    int32_t sums[ROWS * WIDE * LANES] __attribute__((aligned(64)));
    for (; block < end; block++)
        for (int part = 0; part < PARTS; part++) {
            const int64_t column = block * OUTPUTS + part * WIDE * LANES;
            if (column >= p->outputs) break;
            const int8_t *weights = p->weights + block * OUTPUTS * p->held + part * WIDE * LANES * 4;
            for (int64_t row = first; row < last; row += ROWS) {
                const int64_t rows = last - row < ROWS ? last - row : ROWS;
                ADDERS[rows](p->codes + row * p->held, p->held, weights, sums);
                finished(p, sums, row, rows, column, y, y_first + row - first, y_step, half);
            }
        }
}

static int64_t divided(int64_t size, int64_t by) { return (size + by - 1) / by; }

/* Rows of a task: so many that weights are read seldom and that all threads have as many. */
static int64_t rows_of_a_task(const product *p, int64_t most) {
    const int64_t each = divided(p->tokens, p->threads), tasks = divided(each, most);
    return divided(divided(each, tasks), ROWS) * ROWS;
}

/* Returns 0, or 1 where memory was not to be had. */
int rounded_rows(const product *p) {
    const int64_t blocks = divided(p->outputs, OUTPUTS);
    /* Rows that wait to be rounded lie in a quarter of a megabyte. */
    const int64_t fit = p->y ? 96 : (1 << 16) / (p->outputs ? p->outputs : 1) / ROWS * ROWS;
    const int64_t rows = rows_of_a_task(p, fit < ROWS ? ROWS : fit > 96 ? 96 : fit), tiles = divided(p->tokens, rows);
    int64_t columns = 1;
    if (p->y && tiles < 2 * p->threads) {
        columns = divided(4 * p->threads, tiles ? tiles : 1);
        columns = columns > blocks ? blocks : columns;
    }
    int failed = 0;
#pragma omp parallel num_threads(p->threads)
    {
        float *place = NULL;
        if (!p->y) {
            place = aligned_alloc(64, divided(4 * rows * p->outputs, 64) * 64);
            if (place == NULL) {
#pragma omp atomic write
                failed = 1;
            }
        }
        if (p->x) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < p->tokens; t++)
                round_row(p->x, t * p->x_step, p->half, p->codes + t * p->held, p->features, p->held, p->grid + (p->given ? 0 : 2 * t),
                          p->given);
        }
        if (p->weights) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tiles * columns; task++) {
                const int64_t first = task / columns * rows, last = first + rows < p->tokens ? first + rows : p->tokens;
                const int64_t part = task % columns;
                const int64_t begin = blocks * part / columns, end = blocks * (part + 1) / columns;
                if (p->y) {
                    tile(p, first, last, begin, end, p->y, first, p->outputs, p->half);
                } else if (place) {
                    tile(p, first, last, begin, end, place, 0, p->outputs, 0);
                    for (int64_t t = first; t < last; t++)
                        round_row(place, (t - first) * p->outputs, 0, p->next_codes + t * p->next_held, p->outputs, p->next_held,
                                  p->next_grid + (p->next_given ? 0 : 2 * t), p->next_given);
                }
            }
        }
        free(place);
    }
    return failed;
}
