/* shaped.h for one width of vectors, in the terms of avx2.h or avx512.h.
 *
 * Division and square root take as long as all other arithmetic together, but beside it. What they wait for and what waits
 * for them must therefore be under way at the same time, and the processor does not look far enough ahead: it has registers
 * for the results of little more than one vector's work. So the work is done in four stages, none of which takes long from
 * its first operation to its last, and the loop brings together stages of different vectors in a row. Codes, which are work
 * to read and to write, have stages of their own for that. */

WIDE_INLINE OF(floats) OF(load_of)(const void *p, int64_t j, int type, OF(lanes) there) {
    if (type == FLOAT32) return OF(load_floats)((const float *)p + j, there);
    if (type == CODE) return OF(load_codes)((const int8_t *)p + j, there);
    return OF(real)(OF(load_upper)((const uint16_t *)p + j, there));
}

/* `noise`: 16 bits by element; null: round to the nearest. `converts`: as in struct settings. `nan`: whether there may be any. */
WIDE_INLINE void OF(store_of)(void *p, int64_t j, OF(floats) x, const uint16_t *noise, int type, OF(lanes) there,
                              int converts, int nan) {
    if (type == FLOAT32) {
        OF(store_floats)((float *)p + j, x, there);
        return;
    }
    if (type == BFLOAT16 && !noise && converts && OF(convert)((uint16_t *)p + j, x, there)) return;
    OF(ints) bits = OF(bits)(x), random = OF(every_int)(0);
    if (noise) random = OF(load_lower)(noise + j, there);
    if (type == CODE)
        OF(store_codes)((int8_t *)p + j, x, random, there, nan);
    else
        OF(store_upper)((uint16_t *)p + j, noise ? OF(plus)(bits, random) : OF(to_even)(bits), x, there, nan);
}

struct OF(numbers) { /* that are the same for all elements */
    OF(floats) one, unscale, new, old, eps; /* as in struct settings; */
    OF(floats) carrier, cap, scale, least, limit, momentum, decay, lr; /* least: -limit */
    OF(floats) is_ahead; /* a mask: whether momentum is Nesterov's */
    OF(ints) length;     /* a mask: bits without the sign */
    int converts;
};

WIDE_INLINE struct OF(numbers) OF(numbers_of)(const struct settings *s) {
    return (struct OF(numbers)){
        .one = OF(every)(1),
        .unscale = OF(every)(s->unscale),
        .new = OF(every)(s->new),
        .old = OF(every)(s->old),
        .eps = OF(every)(s->eps),
        .carrier = OF(every)(s->carrier),
        .cap = OF(every)(s->cap),
        .scale = OF(every)(s->scale),
        .least = OF(every)(-s->limit),
        .limit = OF(every)(s->limit),
        .momentum = OF(every)(s->momentum),
        .decay = OF(every)(s->decay),
        .lr = OF(every)(s->lr),
        .is_ahead = OF(real)(OF(every_int)(s->nesterov ? -1 : 0)),
        .length = OF(every_int)(INT32_MAX),
        .converts = s->converts,
    };
}

struct OF(line) { /* elements of a row; their types are constants wherever this is inlined */
    int weight, grad, moment;
    void *w, *m;
    const void *g;
    const uint16_t *noise[OPERANDS];
    const float *floors;
    int32_t *peaks, *nus; /* nus: where to leave the bits of nu, if the line is not blocked */
};

struct OF(way) { /* what is under way, of four vectors in a row */
    OF(floats) grad[SLOTS], square[SLOTS], root[SLOTS], update[SLOTS];
    OF(floats) moment[SLOTS]; /* of codes */
};

/* The square of what gradients are divided by. Raises peaks and `top`, which may have signs if they are NaN. */
WIDE_INLINE void OF(take_square)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, OF(floats) cover,
                                 int blocked, OF(lanes) there, struct OF(way) *way, int slot, OF(ints) *top) {
    OF(floats) g = OF(load_of)(x->g, j, x->grad, there), floor = OF(load_floats)(x->floors + j, there);
    if (blocked)
        floor = OF(mul)(cover, floor);
    else
        g = OF(mul)(g, c->unscale), floor = OF(mul)(floor, c->old);
    OF(floats) nu = OF(add)(OF(mul)(OF(mul)(g, g), c->new), floor);
    OF(ints) bits = OF(bits)(nu), peak = OF(bits)(OF(load_floats)((const float *)(x->peaks + j), there));
    if (!blocked) bits = OF(and)(bits, c->length);
    OF(store_floats)((float *)(x->peaks + j), OF(real)(OF(larger)(peak, bits)), there);
    if (blocked)
        *top = OF(raised)(*top, bits);
    else
        OF(store_floats)((float *)(x->nus + j), OF(real)(bits), there);
    OF(put)(&way->grad[slot], g);
    OF(put)(&way->square[slot], OF(add)(nu, c->eps));
}

/* Numbers that do no harm where nothing is under way yet. */
WIDE_INLINE void OF(begin)(const struct OF(numbers) *c, struct OF(way) *way) {
    for (int s = 0; s < SLOTS; s++) way->grad[s] = way->square[s] = way->root[s] = c->one;
}

WIDE_INLINE void OF(take_root)(struct OF(way) *way, int slot) { OF(put)(&way->root[slot], OF(sqrt)(way->square[slot])); }

WIDE_INLINE void OF(divide)(const struct OF(numbers) *c, struct OF(way) *way, int slot) {
    OF(put)(&way->update[slot], OF(mul)(OF(div)(c->one, way->root[slot]), way->grad[slot]));
}

/* What momentum keeps of itself. */
WIDE_INLINE OF(floats) OF(kept)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, OF(lanes) there) {
    return OF(mul)(OF(load_of)(x->m, j, x->moment, there), c->momentum);
}

/* The update of weights; new momentum is stored, codes are left to do. (What is not asked for is done all the same, with
 * numbers that change nothing.) */
WIDE_INLINE OF(floats) OF(update)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, int blocked,
                                  OF(lanes) there, struct OF(way) *way, int slot, OF(ints) *sum) {
    OF(floats) u = way->update[slot], square = OF(min)(OF(mul)(u, u), c->cap); /* (of NaN and the cap, the second) */
    *sum = OF(add_grains)(*sum, square, c->carrier, there);
    u = OF(max)(c->least, OF(mul)(u, c->scale));
    u = OF(min)(c->limit, u);
    if (x->moment == NONE) return u;
    OF(floats) mean = OF(add)(x->moment == CODE ? way->moment[slot] : OF(kept)(c, x, j, there), u);
    if (x->moment == CODE)
        OF(put)(&way->moment[slot], mean);
    else
        OF(store_of)(x->m, j, mean, x->noise[MOMENT], x->moment, there, c->converts, 1);
    OF(floats) ahead = OF(add)(u, OF(mul)(mean, c->momentum));
    return blocked ? ahead : OF(choose)(mean, ahead, c->is_ahead);
}

WIDE_INLINE void OF(apply)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, OF(lanes) there,
                           const struct OF(way) *way, int slot, OF(floats) u) {
    OF(floats) w = OF(mul)(OF(load_of)(x->w, j, x->weight, there), c->decay);
    w = OF(sub)(w, OF(mul)(u, c->lr));
    if (x->moment != CODE) {
        OF(store_of)(x->w, j, w, x->noise[WEIGHT], x->weight, there, c->converts, 1);
    } else if (there == ALL && !OF(any_nan)(w, way->moment[slot])) {
        OF(store_of)(x->m, j, way->moment[slot], x->noise[MOMENT], CODE, ALL, 0, 0);
        OF(store_of)(x->w, j, w, x->noise[WEIGHT], x->weight, ALL, 0, 0); /* (beside codes rarely to the nearest) */
    } else {
        OF(store_of)(x->m, j, way->moment[slot], x->noise[MOMENT], CODE, there, 0, 1);
        OF(store_of)(x->w, j, w, x->noise[WEIGHT], x->weight, there, 0, 1);
    }
}

/* All that comes after the division. */
WIDE_INLINE void OF(end)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, int blocked, OF(lanes) there,
                         struct OF(way) *way, int slot, OF(ints) *sum) {
    if (x->moment == CODE) way->moment[slot] = OF(kept)(c, x, j, there);
    OF(apply)(c, x, j, there, way, slot, OF(update)(c, x, j, blocked, there, way, slot, sum));
}

/* Decode two vectors. */
WIDE_INLINE void OF(take_codes)(const struct OF(numbers) *c, const struct OF(line) *x, struct OF(way) *way, int slot) {
    OF(floats) first, second;
    OF(load_more_codes)((const int8_t *)x->m + slot * LANES, &first, &second);
    OF(put)(&way->moment[slot], OF(mul)(first, c->momentum));
    OF(put)(&way->moment[slot + 1], OF(mul)(second, c->momentum));
}

/* Likewise for codes, which take so much work that it is spread: beside this vector the one after is decoded, and of the one
 * before what is left to do is done. */
WIDE_INLINE void OF(end_of_codes)(const struct OF(numbers) *c, const struct OF(line) *x, struct OF(way) *way, int slot,
                                  OF(ints) *sum) {
    const int64_t j = slot * LANES;
    if (slot == 0) OF(take_codes)(c, x, way, 0);
    OF(floats) u = OF(update)(c, x, j, 1, ALL, way, slot, sum);
    if (slot == 1) OF(take_codes)(c, x, way, 2);
    if (slot > 0) OF(apply)(c, x, j - LANES, ALL, way, slot - 1, way->update[slot - 1]);
    OF(put)(&way->update[slot], u);
}

/* What is left to do of the last group, at j. */
WIDE_INLINE void OF(end_group)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t j, int blocked,
                               struct OF(way) *way, OF(ints) *sum) {
    for (int s = 0; s < SLOTS; s++) {
        if (s < 3) OF(divide)(c, way, s + 1);
        OF(end)(c, x, j + s * LANES, blocked, ALL, way, s, sum);
        if (s == 0) OF(take_root)(way, 3);
    }
}

/* n elements of any settings, whose floors are whole. */
WIDE_INLINE void OF(step_line)(const struct OF(numbers) *c, const struct OF(line) *x, int64_t n, OF(ints) *sum) {
    struct OF(way) way;
    OF(ints) top;
    int64_t j = 0;
    OF(begin)(c, &way);
    for (; n - j >= SIDE; j += SIDE) {
#pragma GCC unroll 4
        for (int s = 0; s < SLOTS; s++) {
            int64_t i = j + s * LANES;
            OF(take_square)(c, x, i, c->one, 0, ALL, &way, s, &top);
            OF(divide)(c, &way, (s + 1) % SLOTS);
            if (j) OF(end)(c, x, i - SIDE, 0, ALL, &way, s, sum);
            OF(take_root)(&way, (s + 3) % SLOTS);
        }
    }
    if (j) OF(end_group)(c, x, j - SIDE, 0, &way, sum);
    for (; j < n; j += LANES) {
        OF(lanes) there = OF(lanes_of)(n - j);
        OF(take_square)(c, x, j, c->one, 0, there, &way, 0, &top);
        OF(take_root)(&way, 0);
        OF(divide)(c, &way, 0);
        OF(end)(c, x, j, 0, there, &way, 0, sum);
    }
}

WIDE_INLINE struct OF(line) OF(line_of)(int weight, int grad, int moment, const struct stretch *x) {
    return (struct OF(line)){weight, grad, moment, x->w, x->m, x->g, {x->noise[0], 0, x->noise[MOMENT]}, x->floors, x->peaks, 0};
}

/* The floors of each element with the covers, for blocks of any length; up to a vector more is written. */
WIDE_INLINE void OF(stage)(const struct stretch *x, float *floors) {
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        const OF(floats) cover = OF(every)(x->covers[b]);
        for (int64_t i = j; i < end; i += LANES) {
            OF(floats) floor = OF(load_some)(x->floors + i, OF(lanes_of)(end - i));
            floor = x->product ? OF(mul)(cover, floor) : OF(lesser)(cover, floor);
            OF(store_floats)(floors + i, floor, ALL);
        }
        j = end;
        end = smaller(x->n, end + x->block);
    }
}

/* Raise the maxima of blocks to the bits of nu. */
WIDE_INLINE void OF(raise_tops)(const struct stretch *x, const int32_t *nus) {
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        OF(ints) top = OF(every_int)(0);
        for (int64_t i = j; i < end; i += LANES)
            top = OF(larger)(top, OF(bits)(OF(load_some)((const float *)(nus + i), OF(lanes_of)(end - i))));
        x->tops[b] = larger(x->tops[b], OF(largest)(top));
        j = end;
        end = smaller(x->n, end + x->block);
    }
}

/* One row of any settings, or with any blocks. */
WIDE_INLINE void OF(step_any)(int weight, int grad, int moment, struct stretch *x) {
    const struct OF(numbers) numbers = OF(numbers_of)(x->settings);
    float floors[CHUNK + LANES];
    int32_t nus[CHUNK];
    const float carrier = x->settings->carrier;
    for (int64_t rest = x->n; rest > 0; rest -= x->n) {
        OF(ints) sum = OF(every_int)(0);
        x->n = smaller(rest, CHUNK);
        struct OF(line) line = OF(line_of)(weight, grad, moment, x);
        line.floors = floors, line.nus = nus;
        OF(stage)(x, floors);
        OF(step_line)(&numbers, &line, x->n, &sum);
        OF(raise_tops)(x, nus);
        if (carrier) x->squares += OF(total)(sum, carrier, (x->n + LANES - 1) / LANES);
        advance(x, size_of(weight), size_of(grad), size_of(moment));
    }
}
