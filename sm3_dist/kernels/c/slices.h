/* One thread's way through a tensor whose covers are whole slices. */

enum { SHORT_ROW = 64 };

struct sweep {
    struct pass pass;
    const struct tensor *t;
    const struct box *b;
    int32_t *peaks[DIMS]; /* of the accumulators whose maxima are gathered aside */
    float *floors;        /* workspace of one row */
    int32_t *row_peaks;   /* likewise */
    int64_t current;      /* the row of dimension 0 that is being swept, -1 for none */
    int32_t current_peak;
};

static const float no_number[TILE] = {[0 ... TILE - 1] = NAN};

/* n contiguous elements from element `at` of the local tensors (by operand) on; returns the maximum. */
static int32_t run(struct sweep *s, int64_t n, const int64_t *at, float floor, const float *floors, int32_t *peaks) {
    if (!s->pass.settings.shaped && floor == floor) return step_row(&s->pass, n, at, floor, floors, peaks);
    int32_t top = 0;
    if (s->pass.settings.shaped) {
        const int64_t none[OPERANDS] = {0};
        struct stretch x = {.n = n, .rows = 1, .block = n, .covers = &floor, .floors = floors, .peaks = peaks, .tops = &top};
        struct place place = {.box = s->b};
        for (int o = 0; o < OPERANDS; o++) {
            place.offset[o] = at[o];
            place.step[o] = s->b->shape[s->t->dims - 1] == 1 ? 1 : s->b->stride[o][s->t->dims - 1];
        }
        step_stretch(&s->pass, &place, &x, none);
        return top;
    }
    for (int64_t j = 0; j < n; j += TILE) {
        int64_t here[OPERANDS] = {at[WEIGHT] + j, at[GRAD] + j, at[MOMENT] + j};
        top = larger(top, step_row(&s->pass, smaller(TILE, n - j), here, INFINITY, no_number, peaks + j));
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
        for (int o = 0; o < OPERANDS; o++) at[o] = b->offset[o] + j * (b->shape[0] == 1 ? 1 : b->stride[o][0]);
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

/* Row number r of a box, as the indices of its first d dimensions. */
static void row_at(const struct box *b, int64_t d, int64_t r, int64_t *index) {
    for (int64_t i = d - 1; i >= 0; r /= b->shape[i], i--) index[i] = r % b->shape[i];
}

static void to_next_row(const struct box *b, int64_t d, int64_t *index) {
    for (int64_t i = d - 1; i >= 0 && ++index[i] == b->shape[i]; i--) index[i] = 0;
}

/* The least accumulator entry of the dimensions that count rows. */
static float row_floor(const struct sweep *s, int64_t d, const int64_t *index) {
    float floor = INFINITY;
    for (int64_t i = 0; i < d; i++) floor = lesser(floor, s->t->accumulator[i][s->b->start[i] + index[i]]);
    return floor;
}

/* Raise the maxima of the dimensions that count rows; that of dimension 0 is current. */
static void raise_row(struct sweep *s, int64_t d, const int64_t *index, int32_t top) {
    s->current_peak = larger(s->current_peak, top);
    for (int64_t i = 1; i < d; i++) {
        int32_t *peak = s->peaks[i] + s->b->start[i] + index[i];
        *peak = larger(*peak, top);
    }
}

/* Rows so short that several are worked through as one. Only where all of the box is contiguous. */
static void sweep_short_rows(struct sweep *s, int64_t d, int64_t from, int64_t to, int64_t length) {
    const struct box *b = s->b;
    int64_t ahead[DIMS], index[DIMS];
    float floors[TILE];
    int32_t peaks[TILE];
    row_at(b, d, from, ahead);
    row_at(b, d, from, index);
    for (int64_t r = from, tall; r < to; r += tall) {
        int64_t at[OPERANDS];
        tall = smaller(to - r, TILE / length);
        for (int o = 0; o < OPERANDS; o++) at[o] = b->offset[o] + r * length;
        for (int64_t i = 0; i < tall; i++, to_next_row(b, d, ahead)) {
            float floor = row_floor(s, d, ahead);
            for (int64_t j = 0; j < length; j++) floors[i * length + j] = lesser(floor, s->floors[j]);
        }
        memset(peaks, 0, sizeof peaks);
        run(s, tall * length, at, INFINITY, floors, peaks);
        for (int64_t i = 0; i < tall; i++, to_next_row(b, d, index)) {
            int32_t top = 0;
            for (int64_t j = 0; j < length; j++) {
                top = larger(top, peaks[i * length + j]);
                s->row_peaks[j] = larger(s->row_peaks[j], peaks[i * length + j]);
            }
            turn_to(s, b->start[0] + index[0]);
            raise_row(s, d, index, top);
        }
    }
}

static void sweep_rows(struct sweep *s, int64_t d, int64_t from, int64_t to, const float *floors, int32_t *row_peaks) {
    const struct box *b = s->b;
    int64_t length = product(b->shape, d, s->t->dims), index[DIMS];
    row_at(b, d, from, index);
    for (int64_t r = from; r < to; r++, to_next_row(b, d, index)) {
        int64_t at[OPERANDS];
        for (int o = 0; o < OPERANDS; o++) {
            at[o] = b->offset[o];
            for (int64_t i = 0; i < d; i++) at[o] += index[i] * b->stride[o][i];
        }
        turn_to(s, b->start[0] + index[0]);
        raise_row(s, d, index, run(s, length, at, row_floor(s, d, index), floors, row_peaks));
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
        sweep_short_rows(s, d, from, to, length);
    else
        sweep_rows(s, d, from, to, s->floors, s->row_peaks);
    collect(s, d, length);
}

/* Sweep from one place of a tensor to another; the maxima of the dimensions gathered aside go to `peaks`. */
static void sweep_tensor(const struct step *step, const struct tensor *t, struct piece from, struct piece to,
                         int32_t *peaks, char *workspace) {
    struct sweep s = {
        .pass = pass_over(step, t),
        .t = t,
        .floors = (float *)workspace,
        .row_peaks = (int32_t *)workspace + LONG_ROW,
        .current = -1,
    };
    int64_t first = first_aside(t, step->shares);
    memset(peaks, 0, (size_t)aside(t, first, t->dims) * sizeof(int32_t));
    for (int64_t i = first; i < t->dims; i++) s.peaks[i] = peaks + aside(t, first, i);
    for (int64_t i = from.box; i < t->boxes && i <= to.box; i++) {
        s.b = step->boxes + t->first_box + i;
        int64_t start = i == from.box ? from.row : 0, stop = i == to.box ? to.row : rows_of(t, s.b);
        if (start < stop) sweep_box(&s, start, stop);
    }
    turn_to(&s, -1);
    finish(&s.pass);
}

static void overwrite(const struct tensor *t, const int32_t *peaks, int64_t shares) {
    if (t->dims == 1) return;
    for (int64_t i = first_aside(t, shares); i < t->dims; i++) {
        memcpy(t->accumulator[i], peaks, (size_t)t->stored[i] * sizeof(float));
        peaks += t->stored[i];
    }
}
