/* The fast way through rows that are whole groups, for one width of vectors: in the order in which memory gives them soonest. */

/* To the next group. */
WIDE_INLINE void OF(go_on)(struct OF(line) *x) {
    x->w = (char *)x->w + SIDE * size_of(x->weight);
    x->g = (const char *)x->g + SIDE * size_of(x->grad);
    x->m = (char *)x->m + SIDE * size_of(x->moment);
    x->floors += SIDE, x->peaks += SIDE;
    for (int o = 0; o < OPERANDS; o++)
        if (x->noise[o]) x->noise[o] += SIDE;
}

/* The next group, which has a cover and a maximum, with the usual settings. `before`: the one that is under way, if there is one:
 * what is at the end of a row goes on in the next. */
WIDE_INLINE void OF(step_group)(const struct OF(numbers) *c, const struct OF(line) *x, const struct OF(line) *before,
                                int is_under_way, float covers, int32_t *highest, struct OF(way) *way, OF(ints) *sum) {
    const OF(floats) cover = OF(every)(covers);
    OF(ints) top = OF(every_int)(0);
#pragma GCC unroll 4
    for (int s = 0; s < SLOTS; s++) {
        OF(take_square)(c, x, s * LANES, cover, 1, ALL, way, s, &top);
        OF(divide)(c, way, (s + 1) % SLOTS);
        if (is_under_way && x->moment == CODE)
            OF(end_of_codes)(c, before, way, s, sum);
        else if (is_under_way)
            OF(end)(c, before, s * LANES, 1, ALL, way, s, sum);
        OF(take_root)(way, (s + 3) % SLOTS);
    }
    *highest = larger(*highest, OF(largest)(top));
    if (is_under_way && x->moment == CODE)
        OF(apply)(c, before, SIDE - LANES, ALL, way, SLOTS - 1, way->update[SLOTS - 1]);
}

/* Add the squares of so many groups, and begin anew. */
WIDE_INLINE void OF(add_up)(struct stretch *x, OF(ints) *sum, int64_t *counted) {
    const float carrier = x->settings->carrier;
    if (carrier) x->squares += OF(total)(*sum, carrier, *counted * SLOTS);
    *sum = OF(every_int)(0);
    *counted = 0;
}

/* Rows of at most MOST_GROUPS groups, one after another. */
WIDE_INLINE void OF(step_rows)(int weight, int grad, int moment, struct stretch *x) {
    const struct OF(numbers) c = OF(numbers_of)(x->settings);
    struct OF(line) before = OF(line_of)(weight, grad, moment, x);
    OF(ints) sum = OF(every_int)(0);
    struct OF(way) way;
    int64_t groups = x->n / SIDE, counted = 0;
    int is_under_way = 0;
    OF(begin)(&c, &way);
    for (; x->rows > 0; next_row(x)) {
        struct OF(line) line = OF(line_of)(weight, grad, moment, x);
        for (int64_t i = 0; i < groups; i++) {
            if (weight != FLOAT32)
                prefetch(line.w, weight, line.g, grad, line.m, moment, 0, SIDE, 1);
            else if (x->next)
                prefetch_next(line.w, weight, line.g, grad, line.m, moment, SIDE, x->next);
            else if (groups >= WIDE)
                prefetch(line.w, weight, line.g, grad, line.m, moment, 0, SIDE, 2);
            OF(step_group)(&c, &line, &before, is_under_way, x->covers[i], x->tops + i, &way, &sum);
            counted += is_under_way;
            is_under_way = 1;
            before = line;
            OF(go_on)(&line);
        }
        if (counted + groups > MOST_GROUPS && x->rows > 1) OF(add_up)(x, &sum, &counted);
    }
    OF(end_group)(&c, &before, 0, 1, &way, &sum);
    counted++;
    OF(add_up)(x, &sum, &counted);
}

/* The same elements so many bytes further on, by operand, and so much noise. */
WIDE_INLINE struct OF(line) OF(further)(struct OF(line) x, const int64_t *bytes, int64_t halves) {
    x.w = (char *)x.w + bytes[WEIGHT];
    x.g = (const char *)x.g + bytes[GRAD];
    x.m = (char *)x.m + bytes[MOMENT];
    for (int o = 0; o < OPERANDS; o++)
        if (x.noise[o]) x.noise[o] += halves;
    return x;
}

/* Rows of float32 whose groups take turns, one of the upper and one of the lower half of the rows: a core has more requests to
 * memory under way if they go to different places, and what is kept of columns is read once for two. (With codes it is
 * arithmetic that takes longest.) What the upper half would ask for at its end has been done by the lower one: it asks for the
 * lower half of the rows below, as the lower one for their upper half. */
WIDE_INLINE void OF(step_rows_in_turn)(int weight, int grad, int moment, struct stretch *x) {
    const struct OF(numbers) c = OF(numbers_of)(x->settings);
    struct OF(line) before = OF(line_of)(weight, grad, moment, x);
    const int64_t rows = x->rows, apart = (rows + 1) / 2, groups = x->n / SIDE;
    const int64_t covers = apart * x->line_of_covers, tops = apart * x->line_of_tops;
    const int64_t below[OPERANDS] = {rows * x->line[WEIGHT], rows * x->line[GRAD], rows * x->line[MOMENT]};
    const int64_t bytes[OPERANDS] = {apart * x->line[WEIGHT], apart * x->line[GRAD], apart * x->line[MOMENT]};
    OF(ints) sum = OF(every_int)(0);
    struct OF(way) way;
    int64_t counted = 0;
    int is_under_way = 0;
    OF(begin)(&c, &way);
    for (int64_t row = 0; row < apart; row++, next_row(x)) {
        struct OF(line) upper = OF(line_of)(weight, grad, moment, x);
        const int turns = row + apart < rows ? 2 : 1;
        const int64_t left = (apart - row) * groups, asked = AHEAD_2 / (SIDE * size_of(FLOAT32));
        for (int64_t i = 0; i < groups;) {
            for (const int64_t end = smaller(groups, i + MOST_GROUPS / 4); i < end; i++) {
                for (int turn = 0; turn < turns; turn++) {
                    const struct OF(line) line = turn ? OF(further)(upper, bytes, apart * x->halves) : upper;
                    const struct OF(line) ahead = !turn && left - i <= asked ? OF(further)(line, below, 0) : line;
                    prefetch(ahead.w, weight, ahead.g, grad, ahead.m, moment, 0, SIDE, 2);
                    OF(step_group)(&c, &line, &before, is_under_way, x->covers[i + turn * covers], x->tops + i + turn * tops,
                                   &way, &sum);
                    counted += is_under_way;
                    is_under_way = 1;
                    before = line;
                }
                OF(go_on)(&upper);
            }
            if (counted >= MOST_GROUPS / 2) OF(add_up)(x, &sum, &counted);
        }
    }
    OF(end_group)(&c, &before, 0, 1, &way, &sum);
    counted++;
    OF(add_up)(x, &sum, &counted);
}

/* Rows of groups. Those of more than MOST_GROUPS are done by as many, but row by row, for memory is slower where it is left. */
WIDE_INLINE void OF(step_groups)(int weight, int grad, int moment, struct stretch *x) {
    if (TAKES_TURNS && weight == FLOAT32 && moment != CODE && x->rows > 1 && !x->next) {
        OF(step_rows_in_turn)(weight, grad, moment, x);
        return;
    }
    const int64_t batch = x->n > MOST_GROUPS * SIDE ? 1 : x->rows;
    for (int64_t row = 0; row < x->rows; row += batch) {
        struct stretch rest = *x;
        for (int64_t r = 0; r < row; r++) next_row(&rest);
        for (int64_t left = x->n; left > 0; left -= rest.n) {
            rest.n = smaller(left, MOST_GROUPS * SIDE);
            struct stretch part = rest;
            part.rows = batch;
            part.squares = 0;
            OF(step_rows)(weight, grad, moment, &part);
            x->squares += part.squares;
            advance(&rest, size_of(weight), size_of(grad), size_of(moment));
        }
    }
}

/* What is left of each row after whole groups is done when these are, of all rows. */
WIDE_INLINE void OF(stretch_of)(int weight, int grad, int moment, struct stretch *x) {
    const struct settings *s = x->settings;
    int is_usual = s->unscale == 1 && (moment == NONE || s->nesterov) && x->product && x->block == SIDE && x->phase == 0;
    int64_t n = x->n, grouped = is_usual ? n / SIDE * SIDE : 0;
    struct stretch rest = *x;
    x->n = rest.n = grouped;
    if (grouped) OF(step_groups)(weight, grad, moment, x);
    advance(&rest, size_of(weight), size_of(grad), size_of(moment));
    rest.n = n - grouped;
    for (; rest.n && rest.rows > 0; next_row(&rest)) {
        struct stretch row = rest;
        row.squares = 0;
        OF(step_any)(weight, grad, moment, &row);
        x->squares += row.squares;
    }
}
