/* Numbers as the arithmetic has them, in float32, and as memory has them: conversions round to nearest even, and NaN stays
 * NaN. Written so that compilers can vectorize them. */

#include <float.h>
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define APART __attribute__((noinline))

enum { FLOAT32, BFLOAT16, FLOAT16, NONE, CODE }; /* element types; NONE: no momentum; CODE: see momentum_code.py */

enum { WEIGHT, GRAD, MOMENT, OPERANDS };

union bits {
    float f;
    int32_t i;
    uint32_t u;
};

INLINE int32_t bits_of(float x) { return ((union bits){.f = x}).i; }
INLINE float float_of(int32_t i) { return ((union bits){.i = i}).f; }
INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
/* The lesser of two accumulator entries; NaN if either is. */
INLINE float lesser(float a, float b) { return a < b || a != a ? a : b; }

/* Factors of a product of entries: infinity counts as the largest finite number, and what divides is not 0. NaN stays. */
INLINE float bounded(float x) { return x > FLT_MAX ? FLT_MAX : x; }
INLINE float divisor(float x) { return x < FLT_MIN ? FLT_MIN : bounded(x); }

INLINE float from_bfloat16(uint16_t h) { return ((union bits){.u = (uint32_t)h << 16}).f; }

INLINE uint16_t to_bfloat16(float x) {
    uint32_t u = ((union bits){.f = x}).u;
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

INLINE float from_float16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    union bits normal = {.u = magnitude + (112u << 23)};                        /* exponent bias 127 for 15 */
    union bits small = {.u = magnitude + (113u << 23)};                         /* denormal: a sum that carries */
    small.f -= ((union bits){.u = 113u << 23}).f;
    uint32_t special = magnitude + (224u << 23);                                /* infinity and NaN */
    uint32_t u = magnitude >= (31u << 23) ? special : magnitude < (1u << 23) ? small.u : normal.u;
    return ((union bits){.u = u | sign}).f;
}

INLINE uint16_t to_float16(float x) {
    union bits b = {.f = x};
    uint32_t sign = (b.u >> 16) & 0x8000, magnitude = b.u & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    union bits small = {.u = magnitude};
    small.f += 0.5f; /* the last bit of 0.5 is worth the least denormal, so the addition rounds */
    uint32_t tiny = small.u - (126u << 23);
    uint32_t special = magnitude > (255u << 23) ? 0x7e00 : 0x7c00;
    uint32_t u = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? tiny : normal;
    return (uint16_t)(u | sign);
}

/* Upper bits of a float32 that a code has not; the value of code 16, from where on its bits are those of a float32. */
enum { CODE_BIAS = ((127 - 6) << 4) - 16, DROPPED = 19 };
#define NORMAL 0x1p-6f
#define LONGEST_CODE 1.9375f

INLINE float from_code(int8_t c) {
    int32_t length = c < 0 ? -c : c;
    float value = length < 16 ? (float)length * 0x1p-10f : float_of((length + CODE_BIAS) << DROPPED);
    return c == -128 ? NAN : c < 0 ? -value : value;
}

/* Of the neighbours of x the longer one, if the noise, 16 bits, carries over. */
INLINE int8_t to_code(float x, uint32_t noise) {
    float length = fabsf(x);
    int32_t fixed = (int32_t)((length < NORMAL ? length : NORMAL) * 0x1p26f) << (DROPPED - 16);
    int32_t code = length < NORMAL ? fixed : bits_of(length) - (CODE_BIAS << DROPPED);
    code = (code + (int32_t)(noise << (DROPPED - 16))) >> DROPPED;
    code = code < 127 ? code : 127;
    return (int8_t)(x != x ? -128 : bits_of(x) < 0 ? -code : code);
}

INLINE float load(const void *p, int64_t j, int type) {
    if (type == FLOAT32) return ((const float *)p)[j];
    if (type == CODE) return from_code(((const int8_t *)p)[j]);
    uint16_t h = ((const uint16_t *)p)[j];
    return type == BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}

INLINE void store(void *p, int64_t j, float x, int type) {
    if (type == FLOAT32)
        ((float *)p)[j] = x;
    else
        ((uint16_t *)p)[j] = type == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

/* (Without momentum a pointer to it stays where it is.) */
INLINE int64_t size_of(int64_t type) { return type == NONE ? 0 : type == FLOAT32 ? 4 : type == CODE ? 1 : 2; }

/* Bytes: of a cache line, and how far ahead memory is asked for, by level of the cache that it is to come into. */
enum { LINE = 64, AHEAD = 4096, AHEAD_2 = 6144 };

INLINE void prefetch_lines(const void *p, int64_t bytes, int level) {
    for (int64_t at = 0; at < bytes; at += LINE) {
        if (level == 1)
            __builtin_prefetch((const char *)p + at);
        else
            __builtin_prefetch((const char *)p + at, 0, 2);
    }
}

INLINE void prefetch_ahead(const void *p, int type, int64_t j, int64_t n, int level) {
    const char *from = (const char *)p + j * size_of(type) + (level == 1 ? AHEAD : AHEAD_2);
    prefetch_lines(from, n * size_of(type), level);
}

/* Ask for the memory of n elements from number j on, a page ahead or more. The processor itself looks ahead no further
 * than the instructions that it has under way, and arithmetic fills that room. */
INLINE void prefetch(const void *w, int weight, const void *g, int grad, const void *m, int moment, int64_t j, int64_t n,
                     int level) {
    prefetch_ahead(w, weight, j, n, level);
    prefetch_ahead(g, grad, j, n, level);
    if (moment != NONE) prefetch_ahead(m, moment, j, n, level);
}

/* Ask for the memory of n elements of the next tensor, so many bytes behind these by operand. */
INLINE void prefetch_next(const void *w, int weight, const void *g, int grad, const void *m, int moment, int64_t n,
                          const int64_t *next) {
    prefetch_lines((const char *)w + next[WEIGHT], n * size_of(weight), 2);
    prefetch_lines((const char *)g + next[GRAD], n * size_of(grad), 2);
    if (moment != NONE) prefetch_lines((const char *)m + next[MOMENT], n * size_of(moment), 2);
}
