/* SM3 with what shapes the update, and with covers that change along a row.
 *
 * Weights and gradients are float32 here; those of other types are converted before and after. Two versions: plain C,
 * which compilers vectorize, and one for AVX-512 by hand, with 64-bit integers, ends of rows under a mask, and vectors side
 * by side, so that each operation has not to wait for the one before. */

enum { WITH_MOMENT = 2, WITH_PRODUCT = 1 };

struct stretch { /* contiguous elements */
    int64_t n;
    float *w;
    const float *g;
    void *m;
    int64_t block;        /* elements per block of the covers, */
    int64_t phase;        /* of which the first ones lie before this stretch */
    const float *covers;  /* of each block, floor[j] with it: their product or minimum */
    const float *floors;
    int32_t *peaks;       /* raised to the bits of nu, by element */
    int32_t *tops;        /* likewise, by block */
    const struct settings *settings;
    uint64_t squares;     /* the sum of squared updates, in units, is added to it */
};

typedef void stretch_function(int kind, struct stretch *x);

INLINE int kind_of_stretch(int64_t moment, int product) {
    return (int)moment * WITH_MOMENT + (product ? WITH_PRODUCT : 0);
}

/* ---- Plain C. Squares are added up as two integers that doubles hold by their last bits: multiples of 2^31, and the
 * rest, rounded to even. ---- */

union wide {
    double f;
    uint64_t u;
};

static const union wide coarse = {.f = 0x1.8p83}, fine = {.f = 0x1.8p52};

struct sums {
    uint64_t high, low;
};

INLINE int32_t block_of(int moment, int product, int64_t n, float *restrict w, const float *restrict g,
                        void *restrict m, float cover, const float *restrict floors, int32_t *restrict peaks,
                        const struct settings *settings, struct sums *sums) {
    const struct settings s = *settings;
    uint64_t high = 0, low = 0;
    int32_t top = 0;
    for (int64_t j = 0; j < n; j++) {
        float x = g[j] * s.unscale;
        float least = product ? cover * floors[j] : lesser(cover, floors[j]);
        float nu = x * x * s.one_minus_beta + least * s.beta;
        float u = 1.0f / sqrtf(nu * s.correction + s.eps) * x;
        float square = u * u * s.per_one;
        double rest = square < s.cap ? square : s.cap;
        union wide part = {.f = rest + coarse.f};
        high += part.u;
        rest -= part.f - coarse.f;
        part.f = rest + fine.f;
        low += part.u;
        u *= s.scale;
        u = u < -s.limit ? -s.limit : u;
        u = u > s.limit ? s.limit : u;
        u *= s.fresh;
        if (moment != NONE) {
            float mean = load(m, j, moment) * s.momentum + u;
            store(m, j, mean, moment);
            float ahead = u + mean * s.momentum;
            u = s.nesterov ? ahead : mean;
        }
        w[j] = w[j] * s.decay - u * s.lr;
        int32_t b = bits_of(nu) & 0x7fffffff;
        peaks[j] = larger(peaks[j], b);
        top = larger(top, b);
    }
    sums->high += high - (uint64_t)n * coarse.u;
    sums->low += low - (uint64_t)n * fine.u;
    return top;
}

INLINE void stretch_of(int moment, int product, struct stretch *x) {
    struct sums sums = {0, 0};
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        void *m = moment == FLOAT32 ? (float *)x->m + j : moment == BFLOAT16 ? (void *)((uint16_t *)x->m + j) : 0;
        int32_t top = block_of(moment, product, end - j, x->w + j, x->g + j, m, x->covers[b], x->floors + j,
                               x->peaks + j, x->settings, &sums);
        x->tops[b] = larger(x->tops[b], top);
        j = end;
        end = smaller(x->n, end + x->block);
    }
    x->squares += (sums.high << 31) + sums.low;
}

#define STRETCHES(m_)                                                                                                \
    case (m_) * WITH_MOMENT: STRETCH(m_, 0); break;                                                                  \
    case (m_) * WITH_MOMENT + WITH_PRODUCT: STRETCH(m_, 1); break

#define STRETCH_FUNCTION(name)                                                                                       \
    static void name(int kind, struct stretch *x) {                                                                  \
        switch (kind) {                                                                                              \
            STRETCHES(FLOAT32);                                                                                      \
            STRETCHES(BFLOAT16);                                                                                     \
            STRETCHES(NONE);                                                                                         \
        }                                                                                                            \
    }
