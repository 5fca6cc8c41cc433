/* Plain SM3 on one row: n contiguous elements whose accumulator floor is min(floor, floors[j]).
 *
 * Raises peaks[j] to the bits of nu, and returns their maximum. The types are constants wherever this is inlined. */

enum { STRIDE = 64 }; /* elements between prefetches */

INLINE int32_t row_of(int weight, int grad, int moment, int simple, int64_t n, void *restrict w, const void *restrict g,
                      void *restrict m, float floor, const float *restrict floors, int32_t *restrict peaks,
                      const struct settings *settings) {
    const struct settings s = *settings;
    int32_t top = 0;
    for (int64_t from = 0, to; from < n; from = to) {
        to = smaller(n, from + STRIDE);
        prefetch(w, weight, g, grad, m, moment, from, STRIDE, 1);
        for (int64_t j = from; j < to; j++) {
            float x = load(g, j, grad);
            if (!simple) x *= s.unscale;
            float least = floor < floors[j] ? floor : floors[j]; /* floors[j] if that is NaN; floor never is */
            float nu = x * x;
            if (!simple) nu *= s.new, least *= s.old;
            nu += least;
            float u = 1.0f / sqrtf(nu + s.eps) * x;
            if (!simple || moment != NONE) u *= s.scale;
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
