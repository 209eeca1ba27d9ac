/* softmax(scale q kᵀ + mask) v on a CPU, for keys that fit into a core's second cache.

   A thread takes one head of one sequence: its keys are laid out with one feature of all keys side by side, its values as they
   are, both in float32 (bfloat16 in pairs, where the processor multiplies such). Eight queries at a time go through the whole of it: scores of four queries and four vectors of keys are
   sums in registers, softmax is taken where they lie in the first cache, and so is the product with the values. Nothing of the
   size queries x keys is ever written to memory. */
#include <stdlib.h>

#include "vectors.h"

#if LANES == 16
#define WIDE 4 /* vectors of keys whose scores are in registers together */
#else
#define WIDE 2
#endif
#define ROWS 8 /* queries that go through all keys together */
#define SCORED 4 /* of them, whose scores are in registers together */

enum { NONE, FLOATS, BOOLS };

struct attention {
    const void *q, *k, *v, *mask;
    void *out;
    int64_t batch, heads, groups, queries, keys, depth, width;
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], mask_strides[4];
    float scale;
    int32_t mask_kind, causal, half, threads;
};

INLINE void read_row(float *to, const void *from, int64_t at, int64_t count, int half, float scale) {
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) *(vec *)(to + i) = read_all(from, at + i, half) * scale;
    if (whole < count) { /* apart: a copy of a number of bytes that is known late is slow */
        const vec here = read_some(from, at + whole, count - whole, half) * scale;
        memcpy(to + whole, &here, 4 * (count - whole));
    }
}

/* Scores lie in stretches of LANES keys, ROWS queries of each: so all that an address needs besides a constant is one register. */
#define STRETCH (ROWS * LANES)

/* Scores of SCORED queries (depth, ROWS) with `length` keys, a multiple of WIDE vectors; keys are (depth, length). */
static __attribute__((noinline)) void multiply_keys(const float *q, const float *keys, float *scores, int64_t depth, int64_t length) {
    for (int64_t at = 0; at < length; at += WIDE * LANES) {
        vec sums[SCORED][WIDE] = {0};
        for (int64_t d = 0; d < depth; d++) {
            vec key[WIDE];
            for (int j = 0; j < WIDE; j++) key[j] = *(const vec *)(keys + d * length + at + j * LANES);
            for (int i = 0; i < SCORED; i++) {
                const float one = q[d * ROWS + i];
                for (int j = 0; j < WIDE; j++) sums[i][j] += one * key[j];
            }
        }
        for (int i = 0; i < SCORED; i++)
            for (int j = 0; j < WIDE; j++) *(vec *)(scores + (at / LANES + j) * STRETCH + i * LANES) = sums[i][j];
    }
}

/* Products of ROWS rows of weights with COUNT vectors of values from a column on. */
#define MULTIPLY_VALUES(COUNT)                                                                                               \
    static __attribute__((noinline)) void multiply_values_##COUNT(const float *weights, const float *values, float *out,     \
                                                                  int64_t keys, int64_t width) {                             \
        vec sums[ROWS][COUNT] = {0};                                                                                         \
        for (int64_t s = 0; s < keys; s++) {                                                                                 \
            const float *here = weights + s / LANES * STRETCH + s % LANES;                                                   \
            vec value[COUNT];                                                                                                \
            for (int j = 0; j < COUNT; j++) value[j] = *(const vec *)(values + s * width + j * LANES);                       \
            for (int i = 0; i < ROWS; i++)                                                                                   \
                for (int j = 0; j < COUNT; j++) sums[i][j] += here[i * LANES] * value[j];                                    \
        }                                                                                                                    \
        for (int i = 0; i < ROWS; i++)                                                                                       \
            for (int j = 0; j < COUNT; j++) *(vec *)(out + i * width + j * LANES) = sums[i][j];                              \
    }
MULTIPLY_VALUES(1)
MULTIPLY_VALUES(2)

static void multiply_values(const float *weights, const float *values, float *out, int64_t keys, int64_t width) {
    for (int64_t at = 0; at < width;) {
        const int64_t left = (width - at) / LANES;
        if (left >= 2) {
            multiply_values_2(weights, values + at, out + at, keys, width);
            at += 2 * LANES;
        } else {
            multiply_values_1(weights, values + at, out + at, keys, width);
            at += LANES;
        }
    }
}

#if LANES == 16 && defined(__AVX512BF16__)
#define PAIRS 1
/* Where the processor multiplies pairs of bfloat16 and adds both products to a float32: twice as many in the same time. Pairs are of
   features for scores, and of keys for what is made of the values. In assembly and without arrays: gcc 12 would keep the sums in
   memory. */
#define ADD_PAIR(sum, one, many) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(one), "v"(many))
#define SPREAD(pair) ((uvec){0} + (pair))

/* As multiply_keys, of pairs of features: q is (pairs, ROWS), keys are (pairs, length). */
static __attribute__((noinline)) void multiply_key_pairs(const uint32_t *q, const uint32_t *keys, float *scores, int64_t pairs,
                                                         int64_t length) {
    for (int64_t at = 0; at < length; at += 4 * LANES) {
#define BEGIN(I) vec sum##I##0 = {0}, sum##I##1 = {0}, sum##I##2 = {0}, sum##I##3 = {0};
#define ADD(I)                                                                                              \
    {                                                                                                       \
        const uvec one = SPREAD(q[p * ROWS + I]);                                                           \
        ADD_PAIR(sum##I##0, one, key0); ADD_PAIR(sum##I##1, one, key1);                                     \
        ADD_PAIR(sum##I##2, one, key2); ADD_PAIR(sum##I##3, one, key3);                                     \
    }
#define END(I)                                                                                              \
    {                                                                                                       \
        float *to = scores + at / LANES * STRETCH + I * LANES;                                              \
        *(vec *)to = sum##I##0; *(vec *)(to + STRETCH) = sum##I##1;                                         \
        *(vec *)(to + 2 * STRETCH) = sum##I##2; *(vec *)(to + 3 * STRETCH) = sum##I##3;                     \
    }
        BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3)
        for (int64_t p = 0; p < pairs; p++) {
            const uvec *here = (const uvec *)(keys + p * length + at);
            const uvec key0 = here[0], key1 = here[1], key2 = here[2], key3 = here[3];
            ADD(0) ADD(1) ADD(2) ADD(3)
        }
        END(0) END(1) END(2) END(3)
#undef BEGIN
#undef ADD
#undef END
    }
}

/* As multiply_values_2, of pairs of keys: weights are bfloat16 in stretches of LANES keys, values (pairs, width). */
static __attribute__((noinline)) void multiply_value_pairs(const uint32_t *weights, const uint32_t *values, float *out, int64_t pairs,
                                                           int64_t width, int both) {
#define BEGIN(I) vec sum##I##0 = {0}, sum##I##1 = {0};
#define ADD(I)                                                                                              \
    {                                                                                                       \
        const uvec one = SPREAD(here[I * (LANES / 2)]);                                                     \
        ADD_PAIR(sum##I##0, one, value0); ADD_PAIR(sum##I##1, one, value1);                                 \
    }
#define END(I)                                                                                              \
    *(vec *)(out + I * width) = sum##I##0;                                                                  \
    if (both) *(vec *)(out + I * width + LANES) = sum##I##1;
    BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3) BEGIN(4) BEGIN(5) BEGIN(6) BEGIN(7)
    for (int64_t p = 0; p < pairs; p++) {
        const uint32_t *here = weights + p / (LANES / 2) * (STRETCH / 2) + p % (LANES / 2);
        const uvec value0 = *(const uvec *)(values + p * width), value1 = both ? *(const uvec *)(values + p * width + LANES) : value0;
        ADD(0) ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6) ADD(7)
    }
    END(0) END(1) END(2) END(3) END(4) END(5) END(6) END(7)
#undef BEGIN
#undef ADD
#undef END
}

INLINE uint32_t pair_at(const uint16_t *from, int64_t d, int64_t depth) {
    return from[d] | (d + 1 < depth ? (uint32_t)from[d + 1] << 16 : 0);
}
#else
#define PAIRS 0
#endif

/* Softmax of a row in place, but for the division: returns what to divide by. To bfloat16 in the front half of the place, if asked. */
static __attribute__((noinline)) float softmax(float *scores, const float *bias, int64_t length, float scale, uint16_t *halves) {
    vec top = {0};
    top -= INFINITY;
    for (int64_t at = 0; at < length; at += LANES) {
        vec *own = (vec *)(scores + at * ROWS);
        *own = *own * scale + *(const vec *)(bias + at);
        top = larger(*own, top);
    }
    float most = largest(top);
    if (most == -INFINITY) most = 0; /* no key at all may be seen: zeros come out */
    vec sums = {0};
    for (int64_t at = 0; at < length; at += LANES) {
        vec *own = (vec *)(scores + at * ROWS);
        const vec weight = exponential(*own - most);
        sums += weight;
        if (halves)
            *(half_vec *)(halves + at * ROWS) = narrowed(weight);
        else
            *own = weight;
    }
    return total(sums);
}

static int64_t rounded_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

static void read_mask(const struct attention *given, float *bias, int64_t b, int64_t h, int64_t row, int64_t length) {
    const int64_t *strides = given->mask_strides;
    const int64_t at = b * strides[0] + h * strides[1] + row * strides[2];
    /* Without any mask: the last keys are seen by the last query, as in torch the first by the first. */
    const int64_t seen = given->causal && row + 1 < given->keys ? row + 1 : given->keys;
    const int64_t step = strides[3];
    if (given->mask_kind == FLOATS) {
        const float *from = (const float *)given->mask + at;
        if (step == 1)
            memcpy(bias, from, seen * sizeof *bias);
        else
            for (int64_t s = 0; s < seen; s++) bias[s] = from[s * step];
    } else if (given->mask_kind == BOOLS) {
        const uint8_t *from = (const uint8_t *)given->mask + at;
        if (step == 1) /* apart, so that the compiler takes many at once */
            for (int64_t s = 0; s < seen; s++) bias[s] = from[s] ? 0.f : -INFINITY;
        else
            for (int64_t s = 0; s < seen; s++) bias[s] = from[s * step] ? 0.f : -INFINITY;
    } else {
        memset(bias, 0, seen * sizeof *bias);
    }
    for (int64_t s = seen; s < length; s++) bias[s] = -INFINITY;
}

/* What a thread works on one head with. */
struct place {
    float *laid, *values, *scores, *bias, *q, *out, *row;
    uint16_t *halves;
};

static void lay_out(const struct attention *given, const struct place *own, int64_t b, int64_t g, int64_t length, int64_t width) {
    const int64_t depth = given->depth, keys = given->keys;
    const int64_t key = b * given->k_strides[0] + g * given->k_strides[1], value = b * given->v_strides[0] + g * given->v_strides[1];
#if PAIRS
    if (given->half) {
        uint32_t *laid = (uint32_t *)own->laid, *values = (uint32_t *)own->values;
        memset(laid, 0, 4 * (depth + 1) / 2 * length);
        for (int64_t s = 0; s < keys; s++) {
            const uint16_t *from = (const uint16_t *)given->k + key + s * given->k_strides[2];
            for (int64_t d = 0; d < depth; d += 2) laid[d / 2 * length + s] = pair_at(from, d, depth);
        }
        for (int64_t s = 0; s < keys; s += 2) {
            const uint16_t *first = (const uint16_t *)given->v + value + s * given->v_strides[2];
            const uint16_t *second = first + given->v_strides[2];
            uint32_t *to = values + s / 2 * width;
            if (s + 1 < keys)
                for (int64_t d = 0; d < given->width; d++) to[d] = first[d] | (uint32_t)second[d] << 16;
            else
                for (int64_t d = 0; d < given->width; d++) to[d] = first[d];
            for (int64_t d = given->width; d < width; d++) to[d] = 0;
        }
        return;
    }
#endif
    for (int64_t s = 0; s < keys; s++) {
        float *to = own->values + s * width;
        read_row(own->row, given->k, key + s * given->k_strides[2], depth, given->half, 1.f);
        for (int64_t d = 0; d < depth; d++) own->laid[d * length + s] = own->row[d];
        read_row(to, given->v, value + s * given->v_strides[2], given->width, given->half, 1.f);
        for (int64_t d = given->width; d < width; d++) to[d] = 0;
    }
    for (int64_t d = 0; d < depth; d++)
        for (int64_t s = keys; s < length; s++) own->laid[d * length + s] = 0;
}

static void score(const struct attention *given, const struct place *own, int64_t query, int64_t rows, int64_t length) {
    const int64_t depth = given->depth;
    if (rows < ROWS) memset(own->q, 0, 4 * ROWS * depth);
#if PAIRS
    if (given->half) {
        uint32_t *q = (uint32_t *)own->q;
        for (int64_t i = 0; i < rows; i++) {
            const uint16_t *from = (const uint16_t *)given->q + query + i * given->q_strides[2];
            for (int64_t d = 0; d < depth; d += 2) q[d / 2 * ROWS + i] = pair_at(from, d, depth);
        }
        for (int64_t i = 0; i < rows; i += SCORED)
            multiply_key_pairs(q + i, (const uint32_t *)own->laid, own->scores + i * LANES, (depth + 1) / 2, length);
        return;
    }
#endif
    for (int64_t i = 0; i < rows; i++) {
        read_row(own->row, given->q, query + i * given->q_strides[2], depth, given->half, 1.f);
        for (int64_t d = 0; d < depth; d++) own->q[d * ROWS + i] = own->row[d];
    }
    for (int64_t i = 0; i < rows; i += SCORED) multiply_keys(own->q + i, own->laid, own->scores + i * LANES, depth, length);
}

static void mix(const struct attention *given, const struct place *own, int64_t width) {
#if PAIRS
    if (given->half) {
        for (int64_t at = 0; at < width; at += 2 * LANES)
            multiply_value_pairs((const uint32_t *)own->halves, (const uint32_t *)own->values + at, own->out + at,
                                 (given->keys + 1) / 2, width, width - at >= 2 * LANES);
        return;
    }
#endif
    multiply_values(own->scores, own->values, own->out, given->keys, width);
}

static void one_head(const struct attention *given, int64_t b, int64_t h, const struct place *own) {
    const int64_t length = rounded_up(given->keys, WIDE * LANES), width = rounded_up(given->width, LANES);
    uint16_t *halves = PAIRS && given->half ? own->halves : NULL;
    lay_out(given, own, b, h / given->groups, length, width);
    memset(own->scores, 0, 4 * ROWS * length); /* queries past the last one are none, but numbers */
    memset(own->halves, 0, 2 * ROWS * length);
    const int same = !given->causal && (given->mask_kind == NONE || given->mask_strides[2] == 0);
    if (same) read_mask(given, own->bias, b, h, 0, length);
    for (int64_t first = 0; first < given->queries; first += ROWS) {
        const int64_t rows = given->queries - first < ROWS ? given->queries - first : ROWS;
        score(given, own, b * given->q_strides[0] + h * given->q_strides[1] + first * given->q_strides[2], rows, length);
        float sums[ROWS] = {0};
        for (int64_t i = 0; i < rows; i++) {
            if (!same) read_mask(given, own->bias, b, h, first + i, length);
            sums[i] = softmax(own->scores + i * LANES, own->bias, length, given->scale, halves ? halves + i * LANES : NULL);
        }
        mix(given, own, width);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = b * given->out_strides[0] + h * given->out_strides[1] + (first + i) * given->out_strides[2];
            const float share = sums[i] == 0 ? 0 : 1 / sums[i];
            for (int64_t d = 0; d < given->width; d += LANES) {
                const vec found = *(const vec *)(own->out + i * width + d) * share;
                const int64_t some = given->width - d;
                if (some >= LANES)
                    write_all(given->out, at + d, given->half, found);
                else
                    write_some(given->out, at + d, some, given->half, found);
            }
        }
    }
}

/* Returns 0, or 1 where memory was not to be had. */
int attention(const struct attention *given) {
    const int64_t length = rounded_up(given->keys, WIDE * LANES), width = rounded_up(given->width, LANES);
    const int64_t depth = rounded_up(given->depth, LANES);
    const int64_t sizes[] = {depth * length, given->keys * width, ROWS * length, length, ROWS * depth, ROWS * width, depth, ROWS * length};
    int64_t size = 0;
    for (int i = 0; i < 8; i++) size += sizes[i];
    int failed = 0;
#pragma omp parallel num_threads(given->threads)
    {
        float *place = aligned_alloc(64, rounded_up(4 * size, 64));
        if (place == NULL) {
#pragma omp atomic write
            failed = 1;
        }
        struct place own;
        float **parts[] = {&own.laid, &own.values, &own.scores, &own.bias, &own.q, &own.out, &own.row};
        float *next = place;
        for (int i = 0; i < 7; next += sizes[i++]) *parts[i] = next;
        own.halves = (uint16_t *)next;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < given->batch * given->heads; task++)
            if (place != NULL) one_head(given, task / given->heads, task % given->heads, &own);
        free(place);
    }
    return failed;
}
