/* Vectors of float32 as wide as this processor has them, and functions of them. GNU C. */
#ifndef RECAST_VECTORS_H
#define RECAST_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias)); /* the bits of bfloat16 */

INLINE vec chosen(ivec where, vec one, vec other) { return (vec)(((ivec)one & where) | ((ivec)other & ~where)); }
/* The larger and the smaller of two; the second where either is not a number. */
INLINE vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return chosen(a > b, a, b);
#endif
}
INLINE vec smaller(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return chosen(a < b, a, b);
#endif
}
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

INLINE float largest(vec x) {
    float held[LANES];
    memcpy(held, &x, sizeof held);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) held[i] = held[i] > held[i + half] ? held[i] : held[i + half];
    return held[0];
}

INLINE float total(vec x) {
    float held[LANES];
    memcpy(held, &x, sizeof held);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) held[i] += held[i + half];
    return held[0];
}

/* From and to bfloat16, to the nearest, ties to even. */
INLINE vec widened(half_vec bits) { return (vec)(__builtin_convertvector(bits, uvec) << 16); }
INLINE half_vec narrowed(vec x) {
    const uvec bits = (uvec)x, nan = (uvec)(x != x);
    const uvec found = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return __builtin_convertvector((found & ~nan) | ((bits >> 16 | 0x40u) & nan), half_vec); /* NaN stays so */
}

/* The first `count` of a vector's numbers in memory, float32 or bfloat16; others are 0. */
INLINE vec read_some(const void *from, int64_t at, int64_t count, int half) {
    if (half) {
        half_vec bits = {0};
        memcpy(&bits, (const uint16_t *)from + at, 2 * count);
        return widened(bits);
    }
    vec found = {0};
    memcpy(&found, (const float *)from + at, 4 * count);
    return found;
}

INLINE void write_some(void *to, int64_t at, int64_t count, int half, vec x) {
    if (half) {
        const half_vec bits = narrowed(x);
        memcpy((uint16_t *)to + at, &bits, 2 * count);
    } else {
        memcpy((float *)to + at, &x, 4 * count);
    }
}

INLINE vec read_all(const void *from, int64_t at, int half) {
    return half ? widened(*(const half_vec *)((const uint16_t *)from + at)) : *(const vec *)((const float *)from + at);
}

INLINE void write_all(void *to, int64_t at, int half, vec x) {
    if (half)
        *(half_vec *)((uint16_t *)to + at) = narrowed(x);
    else
        *(vec *)((float *)to + at) = x;
}

/* e^x, within two units in the last place; zero below the smallest normal number or soon after, infinite beyond the largest. */
INLINE vec exponential(vec x) {
    const vec within = smaller((vec){0} + 89.f, larger((vec){0} - 104.f, x)); /* what is not a number stays so */
    const vec magic = within * 1.44269504088896341f + 12582912.f; /* rounds, and leaves the number in the low bits */
    const vec n = magic - 12582912.f;
    const vec r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
#if LANES == 16
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p = chosen(x < -87.3f, (vec){0}, (vec)((ivec)p + ((ivec)magic << 23)));
    return chosen(x > 88.7f, (vec){0} + INFINITY, p);
#endif
}

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

/* x Φ(x), Φ by Abramowitz and Stegun 7.1.26 for erfc: off by 1.5e-7 |x| at most. */
INLINE vec gelu(vec x) {
    const vec size = absolute(x), t = 1.f / (size * (0.3275911f * 0.70710678118654752f) + 1.f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = p * t * exponential(size * size * -0.5f) * (0.5f * size); /* |x| Φ(-|x|) */
    return larger((vec){0}, x) - tail;
}

INLINE vec hyperbolic_tangent(vec x) {
    /* Near zero the quotient would lose what is left of it. */
    const vec square = x * x, near = x - x * square * (0.33333333f - square * (0.13333333f - square * 0.053968254f));
    const vec far = 1.f - 2.f / (exponential(2.f * x) + 1.f);
    return chosen(absolute(x) < 0.15f, near, far);
}

enum { NOTHING, RELU, RELU2, GELU, GELU_TANH, SILU, QUICK_GELU, SIGMOID, TANH };

INLINE vec activated(int which, vec z) {
    switch (which) {
    case RELU: return larger((vec){0}, z);
    case RELU2: return larger((vec){0}, z) * larger((vec){0}, z);
    case GELU: return gelu(z);
    case GELU_TANH: return z * sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z));
    case SILU: return z * sigmoid(z);
    case QUICK_GELU: return z * sigmoid(1.702f * z);
    case SIGMOID: return sigmoid(z);
    case TANH: return hyperbolic_tangent(z);
    default: return z;
    }
}

#endif
