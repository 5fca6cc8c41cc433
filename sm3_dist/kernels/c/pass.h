/* How the elements of one tensor are stepped, whatever their types and covers. */

struct step { /* what all threads share */
    const struct tensor *tensors;
    const struct box *boxes;
    const struct param *params;
    const struct settings *settings;
    int64_t count;
    const struct width *width;
    int64_t shares; /* that threads take, one after another */
    int64_t numel;  /* of tensors with a gradient */
    int64_t room;   /* bytes for the maxima of one tensor that are gathered aside */
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
    s->shaped |= t->rounds != 0;
    if (t->partial) {
        double per_one = t->cap / (32 * 32);
        double mean = *t->average > 0 ? (double)*t->average / (per_one * t->whole_numel) : s->first_square;
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

/* The noise of n <= TILE elements of a box, from number `skip` after element `at` on. Dimensions lie in memory in their
 * order, so the distance from the first element of the box tells the indices. */
static void make_noise(const struct pass *p, const struct box *b, int64_t at, int64_t skip, int64_t n, int stream,
                       uint32_t *noise) {
    const struct tensor *t = p->t;
    int64_t last = t->dims - 1, index[DIMS], rest = at - b->offset[WEIGHT];
    uint32_t words[TILE / 2 + 8];
    struct philox philox = {0, (uint32_t)t->number | (uint32_t)stream << 31, (uint32_t)*p->param->step, p->settings.seed};
    for (int64_t e = 0; e <= last; e++) {
        index[e] = b->shape[e] == 1 ? 0 : rest / b->stride[WEIGHT][e];
        rest -= index[e] * b->stride[WEIGHT][e];
    }
    for (index[last] += skip; n > 0;) {
        for (int64_t e = last; e > 0; e--) {
            index[e - 1] += index[e] / b->shape[e];
            index[e] %= b->shape[e];
        }
        int64_t row = 0;
        for (int64_t e = 0; e < last; e++) row = row * t->shape[e] + t->extent_start[e] + b->start[e] + index[e];
        philox.row = (uint32_t)row;
        int64_t column = t->extent_start[last] + b->start[last] + index[last];
        int64_t length = smaller(n, b->shape[last] - index[last]), phase = column % 8;
        p->width->words((phase + length + 7) / 8, (uint32_t)(column / 8), &philox, words);
        for (int64_t j = 0; j < length; j++)
            noise[j] = words[(phase + j) / 2] >> 16 * ((phase + j) % 2) & 0xffff;
        noise += length;
        n -= length;
        index[last] += length;
    }
}

/* A stretch from element `at` on. What is not float32 is brought there and back, as much at a time as stays in cache. */
static void step_stretch(struct pass *p, const struct box *b, const int64_t *at, struct stretch x) {
    const struct tensor *t = p->t;
    const struct width *width = p->width;
    int64_t type = t->type[WEIGHT], grad_type = t->type[GRAD], moment_type = t->type[MOMENT], rest = x.n, done = 0;
    int rounds_weight = t->rounds && type == BFLOAT16, rounds_moment = t->rounds && moment_type == BFLOAT16;
    char *w = p->param->weight + at[WEIGHT] * size_of(type), *m = t->moment + at[MOMENT] * size_of(moment_type);
    const char *g = p->param->grad + at[GRAD] * size_of(grad_type);
    int direct = type == FLOAT32 && grad_type == FLOAT32 && !rounds_moment;
    int kind = kind_of_stretch(rounds_moment ? FLOAT32 : moment_type, p->settings.product && t->block);
    float weights[TILE], grads[TILE], moments[TILE];
    uint32_t noise[TILE];
    x.settings = &p->settings;
    for (; rest > 0; rest -= x.n) {
        x.n = direct ? rest : smaller(rest, TILE);
        x.w = type == FLOAT32 ? (float *)w : weights;
        x.g = grad_type == FLOAT32 ? (const float *)g : grads;
        x.m = rounds_moment ? (char *)moments : m;
        if (type != FLOAT32) width->widen(x.n, weights, w, type);
        if (grad_type != FLOAT32) width->widen(x.n, grads, g, grad_type);
        if (rounds_moment) width->widen(x.n, moments, m, BFLOAT16);
        width->stretch(kind, &x);
        if (rounds_moment) {
            make_noise(p, b, at[WEIGHT], done, x.n, 1, noise);
            width->scatter(x.n, (uint16_t *)m, moments, noise);
        }
        if (rounds_weight) {
            make_noise(p, b, at[WEIGHT], done, x.n, 0, noise);
            width->scatter(x.n, (uint16_t *)w, weights, noise);
        } else if (type != FLOAT32) {
            width->narrow(x.n, w, weights, type);
        }
        w += x.n * size_of(type);
        g += x.n * size_of(grad_type);
        m += x.n * size_of(moment_type);
        done += x.n;
        advance(&x);
    }
    p->squares += x.squares;
}
