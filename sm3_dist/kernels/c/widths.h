/* The functions on rows for each vector width, and which of them this processor has. */

#include "rows.h"
#include "shaped.h"
#include "noise.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#ifdef __clang__
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#include "avx512.h"
#endif

/* Between any type and float32. */
INLINE void widen_of(int64_t n, float *restrict to, const void *restrict from, int type) {
    for (int64_t j = 0; j < n; j++) to[j] = load(from, j, type);
}

INLINE void narrow_of(int64_t n, void *restrict to, const float *restrict from, int type) {
    for (int64_t j = 0; j < n; j++) store(to, j, from[j], type);
}

#define CONVERSIONS(width, target)                                                                                   \
    target static void widen_##width(int64_t n, float *to, const void *from, int64_t type) {                         \
        if (type == FLOAT32) widen_of(n, to, from, FLOAT32);                                                         \
        if (type == BFLOAT16) widen_of(n, to, from, BFLOAT16);                                                       \
        if (type == FLOAT16) widen_of(n, to, from, FLOAT16);                                                         \
        if (type == CODE) widen_of(n, to, from, CODE);                                                               \
    }                                                                                                                \
    target static void narrow_##width(int64_t n, void *to, const float *from, int64_t type) {                        \
        if (type == FLOAT32) narrow_of(n, to, from, FLOAT32);                                                        \
        if (type == BFLOAT16) narrow_of(n, to, from, BFLOAT16);                                                      \
        if (type == FLOAT16) narrow_of(n, to, from, FLOAT16);                                                        \
    }                                                                                                                \
    target static void words_##width(int64_t groups, uint32_t first, const struct philox *p, uint32_t *words) {      \
        random_words(groups, first, p, words);                                                                       \
    }                                                                                                                \
    target static void scatter_##width(int64_t n, void *to, const float *from, const uint32_t *noise, int64_t type) { \
        if (type == CODE) round_randomly(n, to, from, noise, CODE);                                                  \
        if (type == BFLOAT16) round_randomly(n, to, from, noise, BFLOAT16);                                          \
    }
#define WIDTH(width, target)                                                                                         \
    target ROW_FUNCTION(row_##width)                                                                                 \
    target STRETCH_FUNCTION(stretch_##width)                                                                         \
    CONVERSIONS(width, target)

struct width {
    const char *name;
    row_function *row;
    stretch_function *stretch;
    void (*widen)(int64_t n, float *to, const void *from, int64_t type);
    void (*narrow)(int64_t n, void *to, const float *from, int64_t type);
    void (*words)(int64_t groups, uint32_t first, const struct philox *p, uint32_t *words);
    void (*scatter)(int64_t n, void *to, const float *from, const uint32_t *noise, int64_t type);
};

#define STRETCH(m_, product_) stretch_of(m_, product_, x)
WIDTH(baseline, )
#ifdef X86
WIDTH(avx2, __attribute__((target("avx2"))))
#undef STRETCH
#define STRETCH(m_, product_) stretch_of_avx512(m_, product_, x)
WIDTH(avx512, __attribute__((target(AVX512))))
#endif

#define NAMED(width) {#width, row_##width, stretch_##width, widen_##width, narrow_##width, words_##width, scatter_##width}
static const struct width widths[] = {
    NAMED(baseline),
#ifdef X86
    NAMED(avx2),
    NAMED(avx512),
#endif
};

static int supported(int width) {
#ifdef X86
    __builtin_cpu_init();
    if (width == 1) return __builtin_cpu_supports("avx2");
    if (width == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return width == 0;
}
