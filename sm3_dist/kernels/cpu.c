/* SM3-II for the CPU: a whole step in one call, each weight and gradient touched once.
 *
 * The definition is update_box() in update.py; every result here is the same to the bit. Each operation of that function
 * is one IEEE operation here, in the same order, so the file must be compiled without contraction to fused multiply-adds.
 *
 * A tensor is swept row by row. The accumulator of dimension 0 is complete, and overwritten, as a row ends. Those of the
 * other dimensions are still read by later rows: their maxima are gathered aside and written at the end. Where a tensor is
 * cut between threads, each gathers its own, and the maximum of both is taken after all have finished.
 *
 * Maxima are taken of bit patterns as integers. Values of nu have no sign, so these are ordered like the floats, with NaN
 * on top, and a NaN gradient reaches the accumulators; its sign bit, which means nothing, is cleared.
 */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { DIMS = 8, MAX_THREADS = 256, TILE = 1024, SHORT_ROW = 64, LONG_ROW = 8192, GAP = 16 };
enum { FLOAT32, BFLOAT16, FLOAT16, NONE }; /* element types; NONE: no momentum */
enum { WEIGHT, GRAD, MOMENT, OPERANDS };

/* The structs below are declared once more in cpu.py. */

struct settings { /* of one param group in one step */
    float lr;
    float decay;          /* 1 - lr * weight_decay */
    float momentum;
    float fresh;          /* 1 - momentum, negative to maximize; without momentum 1 or -1 */
    float beta;           /* 1 for sums */
    float one_minus_beta; /* 1 for sums */
    float eps;
    float unscale;        /* factor on the gradients */
    int32_t simple;       /* decay, beta, one_minus_beta, unscale are all 1, and nothing is maximized */
};

struct box {
    int64_t shape[DIMS];
    int64_t start[DIMS];            /* where its entries begin in what is stored of each accumulator */
    int64_t stride[OPERANDS][DIMS]; /* in elements */
    int64_t offset[OPERANDS];       /* of its first element in the local tensors */
};

struct tensor {
    int64_t param, group;
    int64_t type[OPERANDS];
    int64_t dims;
    int64_t first_box, boxes;
    int64_t numel;
    int64_t stored[DIMS]; /* entries of each accumulator */
    float *accumulator[DIMS];
    char *moment;
};

struct param { /* what may differ in every step */
    char *weight;
    char *grad; /* null: no gradient, leave everything as it is */
    float *step;
};

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

/* ---- Element types: round to nearest even, NaN stays NaN. Written so that compilers can vectorize them. ---- */

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

INLINE float load(const void *p, int64_t j, int type) {
    if (type == FLOAT32) return ((const float *)p)[j];
    uint16_t h = ((const uint16_t *)p)[j];
    return type == BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}

INLINE void store(void *p, int64_t j, float x, int type) {
    if (type == FLOAT32)
        ((float *)p)[j] = x;
    else
        ((uint16_t *)p)[j] = type == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

INLINE int64_t size_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

/* ---- One row: n contiguous elements whose accumulator floor is min(floor, floors[j]). ----
 * Raises peaks[j] to the bits of nu, and returns their maximum. The types are constants wherever this is inlined. */

INLINE int32_t row_of(int weight, int grad, int moment, int simple, int64_t n, void *restrict w, const void *restrict g,
                      void *restrict m, float floor, const float *restrict floors, int32_t *restrict peaks,
                      const struct settings *settings) {
    const struct settings s = *settings;
    int32_t top = 0;
    for (int64_t j = 0; j < n; j++) {
        float x = load(g, j, grad);
        if (!simple) x *= s.unscale;
        float least = floor < floors[j] ? floor : floors[j]; /* floors[j] if that is NaN; floor never is */
        float nu = x * x;
        if (!simple) nu *= s.one_minus_beta, least *= s.beta;
        nu += least;
        float u = 1.0f / sqrtf(nu + s.eps) * x;
        if (!simple || moment != NONE) u *= s.fresh;
        if (moment != NONE) {
            u = load(m, j, moment) * s.momentum + u;
            store(m, j, u, moment);
        }
        float v = load(w, j, weight);
        if (!simple) v *= s.decay;
        store(w, j, v - u * s.lr, weight);
        int32_t b = bits_of(nu) & 0x7fffffff;
        peaks[j] = larger(peaks[j], b);
        top = larger(top, b);
    }
    return top;
}

#define ROW(w_, g_, m_)                                                                                              \
    case ((w_) * 4 + (g_)) * 4 + (m_):                                                                               \
        return s->simple ? row_of(w_, g_, m_, 1, n, w, g, m, floor, floors, peaks, s)                                \
                         : row_of(w_, g_, m_, 0, n, w, g, m, floor, floors, peaks, s)
#define ROWS(w_, g_)                                                                                                 \
    ROW(w_, g_, NONE);                                                                                               \
    ROW(w_, g_, FLOAT32);                                                                                            \
    ROW(w_, g_, BFLOAT16)
#define ROW_ARGUMENTS                                                                                                \
    int kind, int64_t n, char *w, const char *g, char *m, float floor, const float *floors, int32_t *peaks,          \
        const struct settings *s
#define ROW_FUNCTION(name)                                                                                           \
    static int32_t name(ROW_ARGUMENTS) {                                                                             \
        switch (kind) {                                                                                              \
            ROWS(FLOAT32, FLOAT32);                                                                                  \
            ROWS(BFLOAT16, BFLOAT16);                                                                                \
            ROWS(BFLOAT16, FLOAT32);                                                                                 \
            ROWS(FLOAT16, FLOAT16);                                                                                  \
            ROWS(FLOAT16, FLOAT32);                                                                                  \
        }                                                                                                            \
        return 0;                                                                                                    \
    }

typedef int32_t row_function(ROW_ARGUMENTS);

ROW_FUNCTION(row_baseline)
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) ROW_FUNCTION(row_avx2)
#ifdef __clang__
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) ROW_FUNCTION(row_avx512)
#else
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) ROW_FUNCTION(row_avx512)
#endif
#endif

static const struct {
    const char *name;
    row_function *row;
} widths[] = {
    {"baseline", row_baseline},
#if defined(__x86_64__) && defined(__GNUC__)
    {"avx2", row_avx2},
    {"avx512", row_avx512},
#endif
};

static int supported(int width) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (width == 1) return __builtin_cpu_supports("avx2");
    if (width == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return width == 0;
}

/* Name of vector width number i, or null if there are fewer or this processor lacks it. */
EXPORT const char *sm3_width(int i) {
    int known = (int)(sizeof widths / sizeof *widths);
    return 0 <= i && i < known && supported(i) ? widths[i].name : 0;
}

/* ---- Tensors ---- */

struct piece { /* rows of a tensor that one thread works through, from one position to another */
    int64_t box, row;
};

struct step { /* what all threads share */
    const struct tensor *tensors;
    const struct box *boxes;
    const struct param *params;
    const struct settings *settings;
    int64_t count;
    row_function *row;
    int64_t threads;
    int64_t numel;    /* of tensors with a gradient */
    int64_t scratch_per_thread;
    char *scratch;
};

struct worker {
    const struct step *step;
    int64_t index;
    const struct tensor *cut[2]; /* tensors of which other threads have a part: the first and the last one here */
    int32_t *peaks[2];           /* their maxima so far */
};

/* Where the running maxima of accumulator i lie among those that are gathered aside. */
static int64_t aside(const struct tensor *t, int64_t first, int64_t i) {
    int64_t n = 0;
    for (int64_t d = first; d < i; d++) n += t->stored[d];
    return n;
}

/* First dimension whose maxima are gathered aside. Dimension 0 is not, unless it is so short that threads share rows. */
static int64_t first_aside(const struct tensor *t, int64_t threads) { return t->stored[0] < 16 * threads ? 0 : 1; }

static int contiguous_from(const struct box *b, int64_t dims, int64_t d) {
    for (int operand = 0; operand < OPERANDS; operand++) {
        int64_t expected = 1;
        for (int64_t i = dims - 1; i >= d; i--) {
            if (b->shape[i] != 1 && b->stride[operand][i] != expected) return 0;
            expected *= b->shape[i];
        }
    }
    return 1;
}

static int64_t product(const int64_t *n, int64_t from, int64_t to) {
    int64_t p = 1;
    for (int64_t i = from; i < to; i++) p *= n[i];
    return p;
}

/* Number of leading dimensions that count rows; the others form the row, as many as make it long enough. */
static int64_t leading(const struct tensor *t, const struct box *b) {
    int64_t d = t->dims - 1;
    if (d == 0) return 0;
    while (d > 1 && product(b->shape, d - 1, t->dims) <= LONG_ROW && contiguous_from(b, t->dims, d - 1)) d--;
    return d;
}

static int64_t rows_of(const struct tensor *t, const struct box *b) {
    if (t->dims == 1) return (b->shape[0] + TILE - 1) / TILE;
    return product(b->shape, 0, leading(t, b));
}

/* The first place at or after element e of a tensor where it may be cut: within a box, between rows of dimension 0. The
 * start of a later box will not do, for it may go on with the row in which the box before ended. */
static struct piece cut_at(const struct tensor *t, const struct box *boxes, int64_t e, int64_t threads) {
    if (e <= 0) return (struct piece){0, 0};
    for (int64_t i = 0; i < t->boxes; i++) {
        const struct box *b = boxes + t->first_box + i;
        int64_t rows = rows_of(t, b), numel = product(b->shape, 0, t->dims);
        int64_t grain = t->dims > 1 && first_aside(t, threads) == 1 ? rows / b->shape[0] : 1;
        int64_t each = t->dims == 1 ? TILE : numel / rows * grain;
        int64_t row = e > 0 ? (e + each - 1) / each * grain : grain;
        if (row < rows) return (struct piece){i, row};
        e -= numel;
    }
    return (struct piece){t->boxes, 0};
}

/* What one thread does with one tensor. */
struct sweep {
    const struct tensor *t;
    const struct box *b;
    const struct settings *settings;
    const struct param *param;
    row_function *row;
    int kind;
    int32_t *peaks[DIMS]; /* of the accumulators whose maxima are gathered aside */
    float *floors;        /* workspace of one row */
    int32_t *row_peaks;   /* likewise */
    int64_t current;      /* the row of dimension 0 that is being swept, -1 for none */
    int32_t current_peak;
};

static const float no_number[TILE] = {[0 ... TILE - 1] = NAN};

/* n contiguous elements from element `at` of the local tensors (by operand) on. */
static int32_t run(const struct sweep *s, int64_t n, const int64_t *at, float floor, const float *floors, int32_t *peaks) {
    const struct tensor *t = s->t;
    char *w = s->param->weight + at[WEIGHT] * size_of(t->type[WEIGHT]);
    const char *g = s->param->grad + at[GRAD] * size_of(t->type[GRAD]);
    char *m = t->type[MOMENT] == NONE ? 0 : t->moment + at[MOMENT] * size_of(t->type[MOMENT]);
    if (floor == floor) return s->row(s->kind, n, w, g, m, floor, floors, peaks, s->settings);
    int32_t top = 0;
    for (int64_t j = 0; j < n; j += TILE) {
        top = larger(top, s->row(s->kind, smaller(TILE, n - j), w, g, m, INFINITY, no_number, peaks + j, s->settings));
        w += TILE * size_of(t->type[WEIGHT]);
        g += TILE * size_of(t->type[GRAD]);
        if (m) m += TILE * size_of(t->type[MOMENT]);
    }
    return top;
}

/* The new maximum of one row of dimension 0 is known once another row begins. */
static void turn_to(struct sweep *s, int64_t row) {
    if (row == s->current) return;
    if (s->current >= 0) {
        if (s->peaks[0])
            s->peaks[0][s->current] = larger(s->peaks[0][s->current], s->current_peak);
        else
            s->t->accumulator[0][s->current] = float_of(s->current_peak);
    }
    s->current = row;
    s->current_peak = 0;
}

static void sweep_vector(struct sweep *s, int64_t from, int64_t to) {
    const struct box *b = s->b;
    for (int64_t j = from * TILE; j < smaller(to * TILE, b->shape[0]); j += TILE) {
        int64_t n = smaller(TILE, b->shape[0] - j), at[OPERANDS];
        for (int o = 0; o < OPERANDS; o++) at[o] = b->offset[o] + j;
        float *accumulator = s->t->accumulator[0] + b->start[0] + j;
        memset(s->row_peaks, 0, (size_t)n * sizeof(int32_t));
        run(s, n, at, INFINITY, accumulator, s->row_peaks);
        memcpy(accumulator, s->row_peaks, (size_t)n * sizeof(float));
    }
}

/* The floors of a row of all dimensions from d on, in the order of memory. */
static void spread(const struct sweep *s, int64_t d, int64_t n) {
    const struct tensor *t = s->t;
    const struct box *b = s->b;
    for (int64_t j = 0; j < n; j++) s->floors[j] = INFINITY;
    int64_t inner = n, outer = 1;
    for (int64_t i = d; i < t->dims; i++) {
        inner /= b->shape[i];
        float *floors = s->floors;
        for (int64_t o = 0; o < outer; o++)
            for (int64_t r = 0; r < b->shape[i]; r++) {
                float entry = t->accumulator[i][b->start[i] + r];
                for (int64_t j = 0; j < inner; j++, floors++) *floors = lesser(*floors, entry);
            }
        outer *= b->shape[i];
    }
}

/* The opposite way: the maxima over such rows, to the accumulators. */
static void collect(const struct sweep *s, int64_t d, int64_t n) {
    const struct tensor *t = s->t;
    const struct box *b = s->b;
    int64_t inner = n, outer = 1;
    for (int64_t i = d; i < t->dims; i++) {
        inner /= b->shape[i];
        const int32_t *row_peaks = s->row_peaks;
        for (int64_t o = 0; o < outer; o++)
            for (int64_t r = 0; r < b->shape[i]; r++) {
                int32_t *peak = s->peaks[i] + b->start[i] + r, top = *peak;
                for (int64_t j = 0; j < inner; j++) top = larger(top, *row_peaks++);
                *peak = top;
            }
        outer *= b->shape[i];
    }
}

/* Rows so short that several are worked through as one. Only where all of the box is contiguous, and d is 1. */
static void sweep_short_rows(struct sweep *s, int64_t from, int64_t to, int64_t length) {
    const struct box *b = s->b;
    float *rows = s->t->accumulator[0] + b->start[0], floors[TILE];
    int32_t peaks[TILE];
    for (int64_t r = from; r < to;) {
        int64_t tall = smaller(to - r, TILE / length), at[OPERANDS];
        for (int o = 0; o < OPERANDS; o++) at[o] = b->offset[o] + r * length;
        for (int64_t i = 0; i < tall; i++)
            for (int64_t j = 0; j < length; j++) floors[i * length + j] = lesser(rows[r + i], s->floors[j]);
        memset(peaks, 0, sizeof peaks);
        run(s, tall * length, at, INFINITY, floors, peaks);
        for (int64_t i = 0; i < tall; i++, r++) {
            turn_to(s, b->start[0] + r);
            for (int64_t j = 0; j < length; j++) {
                s->current_peak = larger(s->current_peak, peaks[i * length + j]);
                s->row_peaks[j] = larger(s->row_peaks[j], peaks[i * length + j]);
            }
        }
    }
}

static void sweep_rows(struct sweep *s, int64_t d, int64_t from, int64_t to, const float *floors, int32_t *row_peaks) {
    const struct tensor *t = s->t;
    const struct box *b = s->b;
    int64_t length = product(b->shape, d, t->dims), index[DIMS];
    for (int64_t i = d - 1, rest = from; i >= 0; rest /= b->shape[i], i--) index[i] = rest % b->shape[i];
    for (int64_t r = from; r < to; r++) {
        int64_t at[OPERANDS];
        for (int o = 0; o < OPERANDS; o++) {
            at[o] = b->offset[o];
            for (int64_t i = 0; i < d; i++) at[o] += index[i] * b->stride[o][i];
        }
        float floor = INFINITY;
        for (int64_t i = 0; i < d; i++) floor = lesser(floor, t->accumulator[i][b->start[i] + index[i]]);
        turn_to(s, b->start[0] + index[0]);
        int32_t top = run(s, length, at, floor, floors, row_peaks);
        s->current_peak = larger(s->current_peak, top);
        for (int64_t i = 1; i < d; i++) {
            int32_t *peak = s->peaks[i] + b->start[i] + index[i];
            *peak = larger(*peak, top);
        }
        for (int64_t i = d - 1; i >= 0 && ++index[i] == b->shape[i]; i--) index[i] = 0;
    }
}

static void sweep_box(struct sweep *s, int64_t from, int64_t to) {
    const struct tensor *t = s->t;
    const struct box *b = s->b;
    if (t->dims == 1) {
        sweep_vector(s, from, to);
        return;
    }
    int64_t d = leading(t, b), length = product(b->shape, d, t->dims), last = t->dims - 1;
    int is_short = length < SHORT_ROW && contiguous_from(b, t->dims, 0);
    if (d == last && !is_short) {
        sweep_rows(s, d, from, to, t->accumulator[last] + b->start[last], s->peaks[last] + b->start[last]);
        return;
    }
    spread(s, d, length);
    memset(s->row_peaks, 0, (size_t)length * sizeof(int32_t));
    if (is_short)
        sweep_short_rows(s, from, to, length);
    else
        sweep_rows(s, d, from, to, s->floors, s->row_peaks);
    collect(s, d, length);
}

/* Sweep from one place of a tensor to another; the maxima of the dimensions gathered aside go to `peaks`. */
static void sweep_tensor(const struct step *step, const struct tensor *t, struct piece from, struct piece to,
                         int32_t *peaks, char *workspace) {
    struct sweep s = {
        .t = t,
        .settings = step->settings + t->group,
        .param = step->params + t->param,
        .row = step->row,
        .kind = (int)((t->type[WEIGHT] * 4 + t->type[GRAD]) * 4 + t->type[MOMENT]),
        .floors = (float *)workspace,
        .row_peaks = (int32_t *)workspace + LONG_ROW,
        .current = -1,
    };
    int64_t first = first_aside(t, step->threads);
    memset(peaks, 0, (size_t)aside(t, first, t->dims) * sizeof(int32_t));
    for (int64_t i = first; i < t->dims; i++) s.peaks[i] = peaks + aside(t, first, i);
    for (int64_t i = from.box; i < t->boxes && i <= to.box; i++) {
        s.b = step->boxes + t->first_box + i;
        int64_t start = i == from.box ? from.row : 0, stop = i == to.box ? to.row : rows_of(t, s.b);
        if (start < stop) sweep_box(&s, start, stop);
    }
    turn_to(&s, -1);
}

static void overwrite(const struct tensor *t, const int32_t *peaks, int64_t threads) {
    if (t->dims == 1) return;
    for (int64_t i = first_aside(t, threads); i < t->dims; i++) {
        memcpy(t->accumulator[i], peaks, (size_t)t->stored[i] * sizeof(float));
        peaks += t->stored[i];
    }
}

/* ---- A step ---- */

/* Bytes of maxima gathered aside for the largest tensor, in whole cache lines. */
static int64_t largest_aside(const struct tensor *tensors, int64_t count, int64_t threads) {
    int64_t most = 0;
    for (const struct tensor *t = tensors; t < tensors + count; t++) {
        int64_t n = t->dims == 1 ? 0 : aside(t, first_aside(t, threads), t->dims);
        if (n > most) most = n;
    }
    return (most + GAP - 1) / GAP * GAP * (int64_t)sizeof(int32_t);
}

static const int64_t workspace_bytes = 2 * LONG_ROW * sizeof(float);

/* A thread needs room for the maxima of two tensors, the first and the last that it works on, and for one row. */
EXPORT int64_t sm3_scratch_bytes(const struct tensor *tensors, int64_t count, int64_t threads) {
    return threads * (2 * largest_aside(tensors, count, threads) + workspace_bytes);
}

static void *work(void *argument) {
    struct worker *worker = argument;
    const struct step *step = worker->step;
    int64_t start = step->numel * worker->index / step->threads, stop = step->numel * (worker->index + 1) / step->threads;
    int64_t room = (step->scratch_per_thread - workspace_bytes) / 2;
    char *scratch = step->scratch + worker->index * step->scratch_per_thread, *workspace = scratch + 2 * room;
    int64_t before = 0;
    for (const struct tensor *t = step->tensors; t < step->tensors + step->count && before < stop; t++) {
        if (!step->params[t->param].grad || !t->numel) continue;
        if (before + t->numel > start) {
            struct piece from = cut_at(t, step->boxes, start - before, step->threads);
            struct piece to = cut_at(t, step->boxes, smaller(stop - before, t->numel), step->threads);
            if (before + t->numel <= stop) to = (struct piece){t->boxes, 0};
            int is_cut = before < start || before + t->numel > stop, slot = before >= start;
            int32_t *peaks = (int32_t *)(scratch + slot * room);
            sweep_tensor(step, t, from, to, peaks, workspace);
            if (is_cut) {
                worker->cut[slot] = t;
                worker->peaks[slot] = peaks;
            } else {
                overwrite(t, peaks, step->threads);
            }
        }
        before += t->numel;
    }
    return 0;
}

/* Put together the maxima of tensors that were cut between threads. */
static void merge(struct worker *workers, int64_t threads) {
    const struct tensor *t = 0;
    int32_t *peaks = 0;
    for (struct worker *w = workers; w < workers + threads; w++)
        for (int slot = 0; slot < 2; slot++) {
            if (!w->cut[slot] || w->cut[slot]->dims == 1) continue;
            if (w->cut[slot] != t) {
                if (t) overwrite(t, peaks, threads);
                t = w->cut[slot];
                peaks = w->peaks[slot];
                continue;
            }
            int64_t n = aside(t, first_aside(t, threads), t->dims);
            for (int64_t j = 0; j < n; j++) peaks[j] = larger(peaks[j], w->peaks[slot][j]);
        }
    if (t) overwrite(t, peaks, threads);
}

/* One step of every tensor whose param has a gradient; their step counters are raised by 1.
 *
 * scratch: sm3_scratch_bytes() bytes, aligned to 64, with the same number of threads. Threads live only as long as this
 * call: nothing is left to go wrong at a fork or at exit. Where one cannot be had, the calling thread does its part. */
EXPORT void sm3_step(const struct tensor *tensors, int64_t count, const struct box *boxes, const struct param *params,
                     int64_t param_count, const struct settings *settings, int64_t threads, int64_t width, char *scratch) {
    struct step step = {tensors, boxes, params, settings, count, widths[width].row, threads, 0, 0, scratch};
    for (const struct tensor *t = tensors; t < tensors + count; t++)
        if (params[t->param].grad) step.numel += t->numel;
    step.scratch_per_thread = sm3_scratch_bytes(tensors, count, threads) / threads;
    struct worker workers[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS];
    memset(workers, 0, sizeof workers);
    for (int64_t i = threads - 1; i >= 0; i--) {
        workers[i].step = &step;
        workers[i].index = i;
        started[i] = i && pthread_create(&handles[i], 0, work, &workers[i]) == 0;
    }
    for (int64_t i = 0; i < threads; i++)
        if (!started[i]) work(&workers[i]);
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(handles[i], 0);
    merge(workers, threads);
    for (const struct param *p = params; p < params + param_count; p++)
        if (p->grad && p->step) *p->step += 1.0f;
}
