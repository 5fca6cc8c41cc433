/* The functions on rows for each vector width, and which of them this processor has. */

#include "rows.h"
#include "noise.h"
#include "shaped.h"
#include "panel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#if defined(__clang__) || __GNUC__ >= 10 /* earlier ones, and their assemblers, know of no AVX512_BF16 */
#define CONVERTS
#endif
#ifdef __clang__
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#include <immintrin.h>

/* Elements of a vector, of a group, and staged at a time; vectors of a group, and groups whose squares are counted in one sum:
 * 32 bits, of at most 2^22 grains for each vector. */
enum { LANES = 16, SIDE = 64, CHUNK = 1024, SLOTS = SIDE / LANES, MOST_GROUPS = 128 };

/* Groups of a row, in float32, from which on floors and peaks of all columns do not stay in a cache of 32 KB while the row goes
 * by. They then come from the second one, and the processor's own looking ahead in memory no longer keeps up. Rows that are
 * shorter are best left to it, if they do not take turns. */
enum { WIDE = 24 };

/* What depends on the width has names that end in it. OF() makes them. */
#include "avx2.h"
#include "lines.h"
#include "groups.h"
#include "philox.h"
#include "no_width.h"
#include "avx512.h"
#include "lines.h"
#include "groups.h"
#include "philox.h"
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
    target static void scatter_##width(int64_t n, void *to, const float *from, const uint16_t *noise, int64_t type) { \
        if (type == CODE) round_randomly(n, to, from, noise, CODE);                                                  \
        if (type == BFLOAT16) round_randomly(n, to, from, noise, BFLOAT16);                                          \
    }
#define WIDTH(width, target)                                                                                         \
    target ROW_FUNCTION(row_##width)                                                                                 \
    ALL_KINDS(FUNCTION, width, target)                                                                               \
    target static void stretch_##width(int kind, struct stretch *x) {                                                \
        switch (kind) { ALL_KINDS(CASE, width, target) }                                                             \
    }                                                                                                                \
    target static void words_##width(int64_t groups, uint32_t first, const struct philox *p, struct random *random,  \
                                     int64_t at) {                                                                   \
        WORDS(groups, first, p, random, at);                                                                         \
    }                                                                                                                \
    target static void begin_panel_##width(struct panel *p, float *workspace) { begin_panel(p, workspace); }         \
    target static void end_panel_##width(const struct panel *p) { end_panel(p); }                                    \
    CONVERSIONS(width, target)

struct width {
    const char *name;
    int typed; /* whether stretches may have all types and round at random; if not, weight and gradient are float32 */
    int converts; /* as in struct settings */
    row_function *row;
    stretch_function *stretch;
    void (*words)(int64_t groups, uint32_t first, const struct philox *p, struct random *random, int64_t at);
    void (*widen)(int64_t n, float *to, const void *from, int64_t type);
    void (*narrow)(int64_t n, void *to, const float *from, int64_t type);
    void (*scatter)(int64_t n, void *to, const float *from, const uint16_t *noise, int64_t type);
    void (*begin_panel)(struct panel *p, float *workspace);
    void (*end_panel)(const struct panel *p);
};

#define WORDS random_words
#define STRETCH(weight, grad, moment) stretch_of(weight, grad, moment, x)
#define ALL_KINDS(MAKE, width, target) KINDS(MAKE, FLOATS, FLOAT32, FLOAT32, width, target)
WIDTH(baseline, )
#ifdef X86
#undef WORDS
#undef STRETCH
#undef ALL_KINDS
#define TYPED_KINDS(MAKE, form, weight, grad, width, target)                                                          \
    KINDS(MAKE, form, weight, grad, width, target)                                                                   \
    MAKE(form, weight, grad, CODE, width, target)
#define ALL_KINDS(MAKE, width, target)                                                                               \
    TYPED_KINDS(MAKE, FLOATS, FLOAT32, FLOAT32, width, target)                                                       \
    TYPED_KINDS(MAKE, BFLOATS, BFLOAT16, BFLOAT16, width, target)                                                    \
    TYPED_KINDS(MAKE, MIXED, BFLOAT16, FLOAT32, width, target)
#define WORDS random_words_avx2
#define STRETCH(weight, grad, moment) stretch_of_avx2(weight, grad, moment, x)
WIDTH(avx2, __attribute__((target("avx2"))))
#undef WORDS
#undef STRETCH
#define WORDS random_words_avx512
#define STRETCH(weight, grad, moment) stretch_of_avx512(weight, grad, moment, x)
WIDTH(avx512, __attribute__((target(AVX512))))
#endif

#define NAMED(name, width, typed, converts)                                                                          \
    {name, typed, converts, row_##width, stretch_##width, words_##width, widen_##width, narrow_##width,               \
     scatter_##width, begin_panel_##width, end_panel_##width}
static const struct width widths[] = {
    NAMED("baseline", baseline, 0, 0),
#ifdef X86
    NAMED("avx2", avx2, 1, 0),
    NAMED("avx512", avx512, 1, 0),
#endif
#ifdef CONVERTS
    NAMED("avx512_bf16", avx512, 1, 1),
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
#ifdef CONVERTS
    if (width == 3) return __builtin_cpu_supports("avx512bf16");
#endif
    return width == 0;
}
