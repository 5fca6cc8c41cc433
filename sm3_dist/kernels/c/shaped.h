/* SM3 with what shapes the update, and with covers that change along a row.
 *
 * Two versions: plain C, which compilers vectorize and which rounds to the nearest alone, and lines.h for x86-64. */

struct stretch { /* contiguous elements, of one row or of some that lie alike */
    int64_t n;
    void *w, *m;
    const void *g;
    int64_t block;         /* elements per block of the covers, */
    int64_t phase;         /* of which the first ones lie before this stretch */
    const float *covers;   /* of each block, floor[j] with it: their product or minimum */
    const float *floors;
    int32_t *peaks;        /* raised to the bits of nu, by element */
    int32_t *tops;         /* likewise, by block */
    int32_t product;       /* or minimum */
    const uint16_t *noise[OPERANDS]; /* random bits of each element, to round weight and momentum; null: to the nearest */
    int64_t rows;          /* how many; from one to the next it is */
    int64_t line[OPERANDS]; /* this far, in bytes, */
    int64_t line_of_covers, line_of_tops, halves; /* so many covers, tops, and so much noise */
    const int64_t *next;   /* bytes to the memory that is to be asked for meanwhile, by operand; null: to none */
    const struct settings *settings;
    uint64_t squares;      /* the sum of squared updates, in grains, is added to it */
};

typedef void stretch_function(int kind, struct stretch *x);

/* Types that a stretch may have, as one number: of weight and gradient, and of momentum. */
enum { FLOATS, BFLOATS, MIXED, FORMS, MOMENTS = 8 };

INLINE int kind_of_stretch(int64_t weight, int64_t grad, int64_t moment) {
    int form = weight == FLOAT32 ? FLOATS : grad == FLOAT32 ? MIXED : BFLOATS;
    return form * MOMENTS + (int)moment;
}

/* Go on to the elements after this stretch. */
INLINE void advance(struct stretch *x, int64_t weight, int64_t grad, int64_t moment) {
    x->phase += x->n;
    x->covers += x->phase / x->block;
    x->tops += x->phase / x->block;
    x->phase %= x->block;
    x->floors += x->n;
    x->peaks += x->n;
    x->w = (char *)x->w + x->n * weight;
    x->g = (const char *)x->g + x->n * grad;
    x->m = (char *)x->m + x->n * moment;
    for (int o = 0; o < OPERANDS; o++)
        if (x->noise[o]) x->noise[o] += x->n;
}

INLINE void next_row(struct stretch *x) {
    x->rows--;
    x->w = (char *)x->w + x->line[WEIGHT];
    x->g = (const char *)x->g + x->line[GRAD];
    x->m = (char *)x->m + x->line[MOMENT];
    x->covers += x->line_of_covers;
    x->tops += x->line_of_tops;
    for (int o = 0; o < OPERANDS; o++)
        if (x->noise[o]) x->noise[o] += x->halves;
}

/* ---- Plain C. ---- */

INLINE int32_t block_of(int weight, int grad, int moment, int product, int64_t n, void *restrict w,
                        const void *restrict g, void *restrict m, float cover, const float *restrict floors,
                        int32_t *restrict peaks, const struct settings *settings, uint64_t *squares) {
    const struct settings s = *settings;
    const float per_one = s.carrier ? (float)GRAINS / s.carrier : 0;
    uint64_t sum = 0;
    int32_t top = 0;
    for (int64_t j = 0; j < n; j++) {
        float x = load(g, j, grad) * s.unscale;
        float least = product ? cover * floors[j] : lesser(cover, floors[j]);
        float nu = x * x * s.new + least * s.old;
        float u = 1.0f / sqrtf(nu + s.eps) * x;
        float square = u * u, grains = (square < s.cap ? square : s.cap) * per_one;
        int32_t whole = (int32_t)grains;
        sum += (uint32_t)(whole + ((float)whole < grains));
        u *= s.scale;
        u = u < -s.limit ? -s.limit : u;
        u = u > s.limit ? s.limit : u;
        if (moment != NONE) {
            float mean = load(m, j, moment) * s.momentum + u;
            store(m, j, mean, moment);
            float ahead = u + mean * s.momentum;
            u = s.nesterov ? ahead : mean;
        }
        store(w, j, load(w, j, weight) * s.decay - u * s.lr, weight);
        int32_t b = bits_of(nu) & 0x7fffffff;
        peaks[j] = larger(peaks[j], b);
        top = larger(top, b);
    }
    *squares += sum;
    return top;
}

INLINE void blocks_of(int weight, int grad, int moment, int product, struct stretch *x) {
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        char *w = (char *)x->w + j * size_of(weight);
        const char *g = (const char *)x->g + j * size_of(grad);
        char *m = (char *)x->m + j * size_of(moment);
        int32_t top = block_of(weight, grad, moment, product, end - j, w, g, m, x->covers[b], x->floors + j,
                               x->peaks + j, x->settings, &x->squares);
        x->tops[b] = larger(x->tops[b], top);
        j = end;
        end = smaller(x->n, end + x->block);
    }
}

INLINE void stretch_of(int weight, int grad, int moment, struct stretch *x) {
    for (; x->rows > 0; next_row(x)) {
        if (x->product)
            blocks_of(weight, grad, moment, 1, x);
        else
            blocks_of(weight, grad, moment, 0, x);
    }
}

/* A function for each kind: compilers give out registers better in small ones. */
#define FUNCTION(form, weight, grad, moment, width, target)                                                          \
    target APART static void stretch_##weight##_##grad##_##moment##_##width(struct stretch *x) {                     \
        STRETCH(weight, grad, moment);                                                                               \
    }
#define CASE(form, weight, grad, moment, width, target)                                                              \
    case form * MOMENTS + moment: stretch_##weight##_##grad##_##moment##_##width(x); break;
#define KINDS(MAKE, form, weight, grad, width, target)                                                               \
    MAKE(form, weight, grad, NONE, width, target)                                                                    \
    MAKE(form, weight, grad, FLOAT32, width, target)                                                                 \
    MAKE(form, weight, grad, BFLOAT16, width, target)
