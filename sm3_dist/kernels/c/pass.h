/* How the elements of one tensor are stepped, whatever their types and covers. */

struct step { /* what all threads share */
    const struct tensor *tensors;
    const struct box *boxes;
    const struct matrix *matrices;
    const struct param *params;
    const struct settings *settings;
    int64_t count;
    const struct width *width;
    int64_t shares; /* that threads take, one after another */
    int64_t numel;  /* of tensors with a gradient */
    int64_t room;   /* bytes for the maxima of one tensor that are gathered aside */
    char *scratch;
};

enum { SHORT = 16384 }; /* most elements of a tensor that is short */

struct pass { /* of one thread over a tensor */
    const struct tensor *t;
    const struct param *param;
    const struct width *width;
    int kind;         /* for step_row() */
    struct settings settings;
    uint64_t squares; /* sum of squared updates so far, in grains */
    uint64_t grain;   /* in units */
    int is_short;     /* whether the next tensor's memory is to be asked for, as far as it is as long as this one, */
    int64_t next[OPERANDS]; /* which is so many bytes away */
};

/* carrier() of rms.py; of the mean square so far, and the units of a square of 1. */
static float carrier_of(double mean, double per_one) {
    int exponent;
    frexp(mean, &exponent);
    double carrier = ldexp(CARRIED, exponent - 1);
    if (carrier > 2 * LONGEST * LONGEST) carrier = 2 * LONGEST * LONGEST;
    return (float)(carrier < GRAINS / per_one ? GRAINS / per_one : carrier);
}

static struct pass pass_over(const struct step *step, const struct tensor *t) {
    int kind = (int)((t->type[WEIGHT] * 4 + t->type[GRAD]) * 4 + t->type[MOMENT]);
    struct pass p = {t, step->params + t->param, step->width, kind, step->settings[t->group], 0, 0, 0, {0}};
    struct settings *s = &p.settings;
    if (s->beta) { /* averaging() of param_groups.py */
        double new = (1 - s->beta) / (1 - pow(s->beta, (double)*p.param->step + 1));
        s->old = (float)(1 - new);
        s->new = (float)new;
    }
    s->scale = s->fresh;
    s->converts = step->width->converts;
    s->shaped |= t->rounds || t->type[MOMENT] == CODE || t->strided;
    if (t->partial) {
        double per_one = t->cap / (LONGEST * LONGEST);
        double mean = *t->average > 0 ? (double)*t->average / (per_one * t->whole_numel) : s->first_square;
        s->scale = (float)(1 / sqrt(mean) * s->update_rms);
        s->carrier = carrier_of(*t->average > 0 ? mean : mean * WITHOUT_AVERAGE, per_one);
        s->cap = s->carrier < 2 * LONGEST * LONGEST ? s->carrier / 2 : LONGEST * LONGEST;
        p.grain = (uint64_t)(s->carrier * (per_one / GRAINS));
    }
    return p;
}

static void finish(struct pass *p) {
    if (p->t->partial) __atomic_fetch_add(p->t->partial, (int64_t)(p->squares * p->grain), __ATOMIC_RELAXED);
}

/* Where an operand begins. Without momentum it is the weight in its place, lest somebody moves a null pointer. */
static char *start_of(const struct pass *p, int o) {
    if (o == GRAD) return p->param->grad;
    return o == MOMENT && p->t->moment ? p->t->moment : p->param->weight;
}

/* The processor's own looking ahead begins anew with each tensor, so of short ones most memory would be waited for. (Those of
 * one flat parameter follow one another; and of 16-bit types what is asked for a page ahead is as good.) */
static void look_ahead(struct pass *p, const struct step *step) {
    const struct tensor *next = p->t + 1;
    if (p->t->numel > SHORT || next == step->tensors + step->count || next->param == p->t->param) return;
    if (!step->params[next->param].grad) return;
    struct pass after = {.t = next, .param = step->params + next->param};
    for (int o = 0; o < OPERANDS; o++) p->next[o] = start_of(&after, o) - start_of(p, o);
    p->is_short = 1;
}

/* Plain SM3 on n contiguous elements from element `at` of the local tensors (by operand) on. */
static int32_t step_row(const struct pass *p, int64_t n, const int64_t *at, float floor, const float *floors,
                        int32_t *peaks) {
    char *of[OPERANDS];
    for (int o = 0; o < OPERANDS; o++) of[o] = start_of(p, o) + at[o] * size_of(p->t->type[o]);
    return p->width->row(p->kind, n, of[WEIGHT], of[GRAD], of[MOMENT], floor, floors, peaks, &p->settings);
}

/* Where elements that follow one another lie, in the memory of the operands and in the original tensor. */
struct place {
    int64_t offset[OPERANDS];       /* of the first */
    int64_t step[OPERANDS];         /* from one to the next, */
    const int64_t *table[OPERANDS]; /* but if there is one, by this instead */
    int64_t row, column;            /* of the first in the original tensor; the others are the next columns, */
    const struct box *box;          /* but if there is one, whatever follows in its memory */
};

/* Random bits of n <= ROOM elements of a row from a column on, to word `at`; returns how many halves lie before those of the
 * first element. */
static int64_t row_noise(const struct pass *p, int64_t row, int64_t column, int64_t n, struct random *random, int64_t at) {
    int64_t phase = column % 8;
    struct philox philox = {(uint32_t)row, (uint32_t)p->t->number, (uint32_t)*p->param->step, p->settings.seed};
    p->width->words((phase + n + 7) / 8, (uint32_t)(column / 8), &philox, random, at);
    return phase;
}

/* Likewise for n elements of a row, of which each is so many rows and columns after the one before, into some place. */
static void copy_noise(const struct pass *p, int64_t row, int64_t column, int64_t n, const int64_t *step,
                       struct random *to, int64_t place) {
    struct random random;
    int64_t count = step[0] == 0 && step[1] == 1 ? n : 1;
    for (int64_t j = 0; j < n; j += count) {
        int64_t first = row_noise(p, row + j * step[0], column + j * step[1], count, &random, 0);
        size_t size = (size_t)count * sizeof(uint16_t);
        memcpy((uint16_t *)to->words + place + j, (uint16_t *)random.words + first, size);
        memcpy((uint16_t *)to->turned + place + j, (uint16_t *)random.turned + first, size);
    }
}

/* Likewise for n elements of a box, from number `skip` after element `at` of its memory on. */
static void box_noise(const struct pass *p, const struct box *b, int64_t at, int64_t skip, int64_t n,
                      struct random *to) {
    const struct tensor *t = p->t;
    int64_t last = t->dims - 1, index[DIMS] = {0}, rest = at - b->offset[WEIGHT], done = 0;
    for (int64_t e = 0; e <= last; e++) {
        index[e] = b->shape[e] == 1 ? 0 : rest / b->stride[WEIGHT][e];
        rest -= index[e] * b->stride[WEIGHT][e];
    }
    for (index[last] += skip; n > 0;) {
        for (int64_t e = last; e > 0; e--) {
            index[e - 1] += index[e] / b->shape[e];
            index[e] %= b->shape[e];
        }
        int64_t row = 0, column = 0, length = smaller(n, b->shape[last] - index[last]);
        for (int64_t e = 0; e <= last; e++) {
            int64_t in_tensor = t->extent_start[e] + b->start[e] + index[e];
            row += in_tensor * t->place[0][e];
            column += in_tensor * t->place[1][e];
        }
        copy_noise(p, row, column, length, (int64_t[]){t->place[0][last], t->place[1][last]}, to, done);
        done += length;
        n -= length;
        index[last] += length;
    }
}

/* Likewise for n elements from number `skip` on. */
static int64_t make_noise(const struct pass *p, const struct place *at, int64_t skip, int64_t n, struct random *random) {
    if (!at->box) return row_noise(p, at->row, at->column + skip, n, random, 0);
    box_noise(p, at->box, at->offset[WEIGHT], skip, n, random);
    return 0;
}

/* Elements of an operand from number `skip` on: where they lie, if side by side. */
static char *operand(const struct pass *p, const struct place *at, int o, int64_t skip) {
    int64_t first = at->offset[o] + (at->table[o] ? at->table[o][skip] : skip * at->step[o]);
    return start_of(p, o) + first * size_of(p->t->type[o]);
}

static int is_dense(const struct place *at, int o) { return !at->table[o] && at->step[o] == 1; }

/* Bring n elements of an operand together, or the other way. */
static void gather(const struct pass *p, const struct place *at, int o, int64_t skip, int64_t n, char *to, int back) {
    int64_t size = size_of(p->t->type[o]);
    for (int64_t j = 0; j < n; j++) {
        char *there = operand(p, at, o, skip + j), *here = to + j * size;
        memcpy(back ? there : here, back ? here : there, (size_t)size);
    }
}

/* Which operands a stretch cannot take as they are: not side by side, or of a type that it does not have. */
static int is_staged(const struct pass *p, const struct place *at, int staged[OPERANDS]) {
    int any = 0;
    for (int o = 0; o < OPERANDS; o++) {
        int64_t type = p->t->type[o];
        int typed = p->width->typed, taken = type == FLOAT32;
        if (type == BFLOAT16) taken = typed || (o == MOMENT && !p->t->rounds);
        if (type == CODE) taken = typed;
        staged[o] = type != NONE && !(taken && is_dense(at, o));
        any |= staged[o];
    }
    /* There is no kind with float32 weights and other gradients. */
    staged[GRAD] |= staged[WEIGHT] && p->t->type[GRAD] != FLOAT32;
    return any;
}

static void point_to_noise(struct stretch *x, const int random[OPERANDS], const struct random *noise, int64_t first) {
    x->noise[WEIGHT] = random[WEIGHT] ? (const uint16_t *)noise->words + first : 0;
    x->noise[MOMENT] = random[MOMENT] ? (const uint16_t *)noise->turned + first : 0;
}

/* What a stretch cannot take is brought there and back, as much at a time as stays in cache. */
static void step_parts(struct pass *p, const struct place *at, struct stretch x, const int staged[OPERANDS],
                       const int random[OPERANDS]) {
    const struct width *width = p->width;
    const int64_t *type = p->t->type;
    int64_t as[OPERANDS], rest = x.n;
    for (int o = 0; o < OPERANDS; o++) as[o] = staged[o] ? FLOAT32 : type[o];
    float wide[OPERANDS][TILE];
    char narrow[OPERANDS][TILE * sizeof(float)];
    struct random noise;
    for (int64_t done = 0; rest > 0; rest -= x.n, done += x.n) {
        char *there[OPERANDS], *here[OPERANDS];
        struct stretch part = x;
        x.n = part.n = smaller(rest, TILE);
        part.rows = 1;
        for (int o = 0; o < OPERANDS; o++) {
            there[o] = is_dense(at, o) ? operand(p, at, o, done) : narrow[o];
            here[o] = staged[o] ? (char *)wide[o] : there[o];
            if (staged[o] && !is_dense(at, o)) gather(p, at, o, done, x.n, narrow[o], 0);
            if (staged[o]) width->widen(x.n, wide[o], there[o], type[o]);
        }
        if (random[WEIGHT] || random[MOMENT]) {
            point_to_noise(&part, random, &noise, make_noise(p, at, done, x.n, &noise));
        }
        const uint16_t *bits[OPERANDS] = {part.noise[WEIGHT], 0, part.noise[MOMENT]};
        part.w = here[WEIGHT], part.g = here[GRAD], part.m = here[MOMENT];
        width->stretch(kind_of_stretch(as[WEIGHT], as[GRAD], as[MOMENT]), &part);
        for (int o = 0; o < OPERANDS; o += MOMENT) {
            if (!staged[o]) continue;
            if (random[o])
                width->scatter(x.n, there[o], wide[o], bits[o], type[o]);
            else
                width->narrow(x.n, there[o], wide[o], type[o]);
            if (!is_dense(at, o)) gather(p, at, o, done, x.n, narrow[o], 1);
        }
        p->squares += part.squares;
        advance(&x, 0, 0, 0);
    }
}

/* Rows that are brought together, or need more random bits than there is room for, one by one. */
static void step_long_rows(struct pass *p, struct place row, struct stretch x, const int64_t *stride,
                           const int staged[OPERANDS], const int random[OPERANDS]) {
    for (; x.rows > 0; next_row(&x), row.row++) {
        step_parts(p, &row, x, staged, random);
        for (int o = 0; o < OPERANDS; o++) row.offset[o] += stride[o];
    }
}

/* Rows of no more than ROOM elements, taken as they are, as many at a time as there is room for their random bits. */
static void step_short_rows(struct pass *p, const struct place *at, struct stretch x, const int random[OPERANDS]) {
    struct random noise;
    int64_t first = at->column % 8, words = (first + x.n + 7) / 8 * 4, row = at->row;
    x.halves = 2 * words;
    while (x.rows > 0) {
        struct stretch part = x;
        part.rows = smaller(x.rows, larger(1, (int32_t)(ROOM / 2 / words)));
        for (int64_t r = 0; r < part.rows; r++) row_noise(p, row + r, at->column, x.n, &noise, r * words);
        point_to_noise(&part, random, &noise, first);
        row += part.rows;
        for (int64_t r = 0; r < part.rows; r++) next_row(&x);
        p->width->stretch(kind_of_stretch(p->t->type[WEIGHT], p->t->type[GRAD], p->t->type[MOMENT]), &part);
        p->squares += part.squares;
    }
}

/* Some rows of elements that follow one another; of x that is given what is of accumulators, and how many rows, which are
 * this far from one another in each operand. */
static void step_stretch(struct pass *p, const struct place *at, struct stretch *x, const int64_t *stride) {
    const int64_t *type = p->t->type;
    int random[OPERANDS] = {p->t->rounds && type[WEIGHT] == BFLOAT16, 0,
                            type[MOMENT] == CODE || (p->t->rounds && type[MOMENT] == BFLOAT16)};
    int staged[OPERANDS], is_rounded = random[WEIGHT] || random[MOMENT], any = is_staged(p, at, staged);
    x->settings = &p->settings;
    x->next = p->is_short ? p->next : 0;
    x->product = p->settings.product && p->t->block;
    x->squares = 0;
    for (int o = 0; o < OPERANDS; o++) x->noise[o] = 0;
    for (int o = 0; o < OPERANDS; o++) x->line[o] = stride[o] * size_of(type[o]);
    x->w = operand(p, at, WEIGHT, 0);
    x->g = operand(p, at, GRAD, 0);
    x->m = operand(p, at, MOMENT, 0);
    if (any || (is_rounded && (at->box || x->n > ROOM))) {
        step_long_rows(p, *at, *x, stride, staged, random);
    } else if (is_rounded) {
        step_short_rows(p, at, *x, random);
    } else {
        p->width->stretch(kind_of_stretch(type[WEIGHT], type[GRAD], type[MOMENT]), x);
        p->squares += x->squares;
    }
}
