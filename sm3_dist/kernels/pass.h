/* How the elements of one tensor are stepped, whatever their types and covers. */

struct step { /* what all threads share */
    const struct tensor *tensors;
    const struct box *boxes;
    const struct param *params;
    const struct settings *settings;
    int64_t count;
    const struct width *width;
    int64_t threads;
    int64_t numel; /* of tensors with a gradient */
    int64_t scratch_per_thread;
    char *scratch;
};

struct pass { /* of one thread over a tensor */
    const struct tensor *t;
    const struct param *param;
    const struct width *width;
    int kind;         /* for step_row() */
    struct settings settings;
    uint64_t squares; /* sum of squared updates so far, in units */
};

static struct pass pass_over(const struct step *step, const struct tensor *t) {
    int kind = (int)((t->type[WEIGHT] * 4 + t->type[GRAD]) * 4 + t->type[MOMENT]);
    struct pass p = {t, step->params + t->param, step->width, kind, step->settings[t->group], 0};
    struct settings *s = &p.settings;
    s->correction = (float)p.param->correction;
    s->scale = 1;
    if (t->partial) {
        double per_one = t->cap / (32 * 32);
        double mean = *t->total > 0 ? (double)*t->total / (per_one * t->whole_numel) : s->first_square;
        s->scale = (float)(1 / sqrt(mean) * s->update_rms);
        s->per_one = (float)per_one;
        s->cap = (float)t->cap;
    }
    return p;
}

static void finish(struct pass *p) {
    if (p->t->partial) __atomic_fetch_add(p->t->partial, (int64_t)p->squares, __ATOMIC_RELAXED);
}

/* Plain SM3 on n contiguous elements from element `at` of the local tensors (by operand) on. */
static int32_t step_row(const struct pass *p, int64_t n, const int64_t *at, float floor, const float *floors,
                        int32_t *peaks) {
    const struct tensor *t = p->t;
    char *w = p->param->weight + at[WEIGHT] * size_of(t->type[WEIGHT]);
    const char *g = p->param->grad + at[GRAD] * size_of(t->type[GRAD]);
    char *m = t->type[MOMENT] == NONE ? 0 : t->moment + at[MOMENT] * size_of(t->type[MOMENT]);
    return p->width->row(p->kind, n, w, g, m, floor, floors, peaks, &p->settings);
}

/* Go on to the elements after this stretch. */
static void advance(struct stretch *x) {
    x->phase += x->n;
    x->covers += x->phase / x->block;
    x->tops += x->phase / x->block;
    x->phase %= x->block;
    x->floors += x->n;
    x->peaks += x->n;
}

/* A stretch from element `at` on. What is not float32 is brought there and back, as much at a time as stays in cache. */
static void step_stretch(struct pass *p, const int64_t *at, struct stretch x) {
    const struct tensor *t = p->t;
    int64_t type = t->type[WEIGHT], grad_type = t->type[GRAD], moment_size = size_of(t->type[MOMENT]), rest = x.n;
    char *w = p->param->weight + at[WEIGHT] * size_of(type);
    const char *g = p->param->grad + at[GRAD] * size_of(grad_type);
    int kind = kind_of_stretch(t->type[MOMENT], &p->settings, p->settings.product && t->block);
    float weights[TILE], grads[TILE];
    x.m = t->moment + at[MOMENT] * moment_size;
    x.settings = &p->settings;
    for (; rest > 0; rest -= x.n) {
        x.n = type == FLOAT32 && grad_type == FLOAT32 ? rest : smaller(rest, TILE);
        x.w = type == FLOAT32 ? (float *)w : weights;
        x.g = grad_type == FLOAT32 ? (const float *)g : grads;
        if (type != FLOAT32) p->width->widen(x.n, weights, w, type);
        if (grad_type != FLOAT32) p->width->widen(x.n, grads, g, grad_type);
        p->width->stretch(kind, &x);
        if (type != FLOAT32) p->width->narrow(x.n, w, weights, type);
        w += x.n * size_of(type);
        g += x.n * size_of(grad_type);
        x.m = (char *)x.m + x.n * moment_size;
        advance(&x);
    }
    p->squares += x.squares;
}
