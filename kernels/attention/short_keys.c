/* softmax(scale q kᵀ + mask) v on a CPU, for keys that fit into a core's second cache.

   A thread takes one head of one sequence: its keys are laid out with one feature of all keys side by side, its values as they
   are, both in float32. Eight queries at a time go through the whole of it: scores of four queries and four vectors of keys are
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

/* Softmax of a row in place, but for the division: returns what to divide by. */
static __attribute__((noinline)) float softmax(float *scores, const float *bias, int64_t length) {
    vec top = {0};
    top -= INFINITY;
    for (int64_t at = 0; at < length; at += LANES) {
        vec *own = (vec *)(scores + at * ROWS);
        *own += *(const vec *)(bias + at);
        top = larger(*own, top);
    }
    float most = largest(top);
    if (most == -INFINITY) most = 0; /* no key at all may be seen: zeros come out */
    vec sums = {0};
    for (int64_t at = 0; at < length; at += LANES) {
        vec *own = (vec *)(scores + at * ROWS);
        *own = exponential(*own - most);
        sums += *own;
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

static void one_head(const struct attention *given, int64_t b, int64_t h, float *place) {
    const int64_t depth = given->depth, keys = given->keys, g = h / given->groups;
    const int64_t length = rounded_up(keys, WIDE * LANES), width = rounded_up(given->width, LANES);
    float *laid = place, *values = laid + depth * length, *scores = values + keys * width, *bias = scores + ROWS * length;
    memset(scores, 0, 4 * ROWS * length); /* queries past the last one are none, but numbers */
    float *q = bias + length, *out = q + ROWS * depth, *row = out + ROWS * width;
    const int64_t key = b * given->k_strides[0] + g * given->k_strides[1], value = b * given->v_strides[0] + g * given->v_strides[1];
    for (int64_t s = 0; s < keys; s++) {
        read_row(row, given->k, key + s * given->k_strides[2], depth, given->half, 1.f);
        for (int64_t d = 0; d < depth; d++) laid[d * length + s] = row[d];
        read_row(values + s * width, given->v, value + s * given->v_strides[2], given->width, given->half, 1.f);
        for (int64_t d = given->width; d < width; d++) values[s * width + d] = 0;
    }
    for (int64_t d = 0; d < depth; d++)
        for (int64_t s = keys; s < length; s++) laid[d * length + s] = 0;
    const int same = !given->causal && (given->mask_kind == NONE || given->mask_strides[2] == 0);
    if (same) read_mask(given, bias, b, h, 0, length);
    for (int64_t first = 0; first < given->queries; first += ROWS) {
        const int64_t rows = given->queries - first < ROWS ? given->queries - first : ROWS;
        if (rows < ROWS) memset(q, 0, 4 * ROWS * depth);
        const int64_t query = b * given->q_strides[0] + h * given->q_strides[1];
        for (int64_t i = 0; i < rows; i++) {
            read_row(row, given->q, query + (first + i) * given->q_strides[2], depth, given->half, given->scale);
            for (int64_t d = 0; d < depth; d++) q[d * ROWS + i] = row[d];
        }
        for (int64_t i = 0; i < rows; i += SCORED) multiply_keys(q + i, laid, scores + i * LANES, depth, length);
        float sums[ROWS] = {0};
        for (int64_t i = 0; i < rows; i++) {
            if (!same) read_mask(given, bias, b, h, first + i, length);
            sums[i] = softmax(scores + i * LANES, bias, length);
        }
        multiply_values(scores, values, out, keys, width);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t at = b * given->out_strides[0] + h * given->out_strides[1] + (first + i) * given->out_strides[2];
            const float share = sums[i] == 0 ? 0 : 1 / sums[i];
            for (int64_t d = 0; d < given->width; d += LANES) {
                const vec found = *(const vec *)(out + i * width + d) * share;
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
    const int64_t size = given->depth * length + given->keys * width + ROWS * (length + given->depth + width) + length + given->depth;
    int failed = 0;
#pragma omp parallel num_threads(given->threads)
    {
        float *place = aligned_alloc(64, rounded_up(4 * size, 64));
        if (place == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < given->batch * given->heads; task++)
            if (place != NULL) one_head(given, task / given->heads, task % given->heads, place);
        free(place);
    }
    return failed;
}
