/* One thread's way through a tensor with block covers, see cover.py.
 *
 * Strips as long as a block along dimension 0 share no accumulator entry. So threads take whole strips, and the new maxima
 * of a strip are gathered aside and written when it ends. Within a strip, rows whose leading indices lie in the same blocks
 * have the same floors but for what changes from block to block along the row, and the same peaks.
 *
 * A row is the last dimension, or several, if all but the first of them lie in one block each. Its blocks are then those of
 * its first dimension, d, and one takes `inner` elements per index of d. Longer rows are worked through in parts. */

enum { PART = 2048 };

struct grids { /* of the accumulators: as stored by this rank, and as gathered aside for a strip */
    int64_t first[DIMS];                /* block in which the extent begins */
    int64_t length[DIMS + 1][DIMS];
    int64_t stride[2][DIMS + 1][DIMS];
    int64_t begin[DIMS + 2];            /* where those gathered aside lie one after another */
};
enum { STORED, ASIDE };

struct block_sweep {
    struct pass pass;
    const struct tensor *t;
    const struct box *b;
    struct grids grids;
    int64_t strip;           /* number of its block */
    int64_t d, inner;
    int64_t index[DIMS];     /* of the first element of the part of a row, in the extent */
    int64_t columns, blocks; /* of the part */
    int64_t base[2][DIMS + 1]; /* the entries of each accumulator that cover that element */
    int32_t *aside;
    float *floors, *staged, *covers, *tiles; /* of the part, by element or by block */
    float *factors[DIMS];                    /* of the accumulators from d on, where they are not joined in floors */
    int32_t *peaks, *tops;
};

static int64_t block_at(const struct block_sweep *s, int64_t e) {
    return (s->t->extent_start[e] + s->index[e]) / s->t->block;
}

static struct grids grids_of(const struct tensor *t) {
    struct grids g = {0};
    int64_t original[DIMS], k = t->dims;
    for (int64_t e = 0; e < k; e++) {
        original[t->order[e]] = e;
        g.first[e] = t->extent_start[e] / t->block;
        int64_t blocks = t->extent[e] ? (t->extent_start[e] + t->extent[e] - 1) / t->block - g.first[e] + 1 : 0;
        for (int64_t a = 0; a <= k; a++) g.length[a][e] = a == e ? t->extent[e] : blocks;
    }
    for (int64_t a = 0; a <= k; a++) {
        int64_t stored = 1, aside = 1;
        for (int64_t i = k - 1; i >= 0; i--) {
            g.stride[STORED][a][original[i]] = stored;
            stored *= g.length[a][original[i]];
            g.stride[ASIDE][a][i] = aside;
            aside *= i ? g.length[a][i] : a ? 1 : smaller(t->block, t->extent[0]);
        }
        g.begin[a + 1] = g.begin[a] + aside;
    }
    return g;
}

static int64_t strips_of(const struct tensor *t) {
    return (t->extent_start[0] + t->extent[0] - 1) / t->block - t->extent_start[0] / t->block + 1;
}

/* First index of a strip in the extent. */
static int64_t strip_start(const struct block_sweep *s) {
    int64_t start = (s->grids.first[0] + s->strip) * s->t->block - s->t->extent_start[0];
    return start > 0 ? start : 0;
}

/* Find the entries that cover the element at `index`. */
static void locate(struct block_sweep *s) {
    int64_t k = s->t->dims, block[DIMS], start = strip_start(s);
    for (int64_t e = 0; e < k; e++) block[e] = block_at(s, e) - s->grids.first[e];
    for (int64_t a = 0; a <= k; a++) {
        int64_t stored = 0, aside = s->grids.begin[a];
        for (int64_t e = 0; e < k; e++) {
            int64_t place = a == e ? s->index[e] : block[e];
            stored += place * s->grids.stride[STORED][a][e];
            if (e) aside += place * s->grids.stride[ASIDE][a][e];
        }
        if (a == 0) aside += (s->index[0] - start) * s->grids.stride[ASIDE][0][0];
        s->base[STORED][a] = stored;
        s->base[ASIDE][a] = aside;
    }
}

/* Entry of accumulator a in block number i of the part. */
static float entry(const struct block_sweep *s, int64_t a, int64_t i) {
    return s->t->accumulator[a][s->base[STORED][a] + i * s->grids.stride[STORED][a][s->d]];
}

/* Raise n entries to others. */
static void raise(int64_t n, int32_t *entries, int64_t stride, const int32_t *others) {
    if (stride == 1) /* a loop that compilers vectorize */
        for (int64_t i = 0; i < n; i++) entries[i] = larger(entries[i], others[i]);
    else
        for (int64_t i = 0; i < n; i++) entries[i * stride] = larger(entries[i * stride], others[i]);
}

enum way { LESSER, FACTOR, GATHER };

INLINE float factor(float entry, float tile, int divided) { return divided ? bounded(entry) / tile : bounded(entry); }

/* Go through the part's entries of accumulator a >= d in the order of memory: lower `out` to them; or set it to them, over
 * the tile's if they are `divided`; or raise those gathered aside to the peaks. */
INLINE void trail(struct block_sweep *s, int64_t a, enum way way, float *out, int divided) {
    const struct box *b = s->b;
    const int64_t which = way == GATHER ? ASIDE : STORED, d = s->d;
    const int64_t along = s->grids.stride[which][a][d], step = a == d ? 0 : s->grids.stride[which][a][a];
    const int64_t repeat = a == d ? s->inner : product(b->shape, a + 1, s->t->dims);
    const int64_t count = a == d ? 1 : b->shape[a], outer = s->inner / repeat / count;
    const float *entries = s->t->accumulator[a] + s->base[STORED][a];
    int32_t *aside = s->aside + s->base[ASIDE][a];
    if (way == GATHER && s->inner == 1 && a == d) {
        raise(s->columns, aside, along, s->peaks);
        return;
    }
    int64_t end = s->t->block - (s->t->extent_start[d] + s->index[d]) % s->t->block, at = 0;
    for (int64_t i = 0, c = 0; i < s->blocks; i++, end += s->t->block) {
        int64_t stop = smaller(end, s->columns);
        if (way != GATHER && s->inner == 1 && a == d && along == 1) {
            for (; c < stop; c++) {
                out[c] = way == LESSER ? lesser(out[c], entries[c]) : factor(entries[c], s->tiles[i], divided);
            }
            continue;
        }
        for (; c < stop; c++)
            for (int64_t r = 0; r < outer * count; r++) {
                int64_t place = (a == d ? c : i) * along + r % count * step;
                int32_t top = 0;
                float value = 0;
                if (way == LESSER) value = entries[place];
                if (way == FACTOR) value = factor(entries[place], s->tiles[i], divided);
                for (int64_t y = 0; y < repeat; y++, at++) {
                    if (way == GATHER) top = larger(top, s->peaks[at]);
                    if (way == LESSER) out[at] = lesser(out[at], value);
                    if (way == FACTOR) out[at] = value;
                }
                if (way == GATHER) aside[place] = larger(aside[place], top);
            }
    }
}

/* Whether the product of all covers is that of floors and covers, in the order in which update.py multiplies. */
static int is_direct(const struct block_sweep *s) {
    int in_order = s->t->dims == 2;
    for (int64_t e = 0; !in_order && s->t->order[e] == e; e++) in_order = e == s->t->dims - 1;
    return !s->pass.settings.product || (in_order && s->d == s->t->dims - 1);
}

/* What the rows have in common whose leading indices lie in the same blocks. */
static void begin_rows(struct block_sweep *s) {
    const struct tensor *t = s->t;
    int64_t n = s->columns * s->inner;
    memset(s->peaks, 0, (size_t)n * sizeof(int32_t));
    for (int64_t i = 0; i < s->blocks; i++) {
        float tile = entry(s, t->dims, i);
        s->tiles[i] = s->pass.settings.product ? divisor(tile) : tile;
    }
    if (!s->pass.settings.product) {
        for (int64_t j = 0; j < n; j++) s->floors[j] = INFINITY;
        for (int64_t a = s->d; a < t->dims; a++) trail(s, a, LESSER, s->floors, 0);
        return;
    }
    int direct = is_direct(s);
    for (int64_t a = s->d; a < t->dims; a++)
        trail(s, a, FACTOR, direct ? s->floors : s->factors[a], t->order[a] != 0);
}

static void end_rows(struct block_sweep *s) {
    for (int64_t a = s->d; a < s->t->dims; a++) trail(s, a, GATHER, 0, 0);
}

/* The covers of a row's blocks. */
static void cover_row(struct block_sweep *s) {
    const struct tensor *t = s->t;
    const int64_t n = s->blocks;
    if (!s->pass.settings.product) memcpy(s->covers, s->tiles, (size_t)n * sizeof(float));
    for (int64_t a = 0; a < s->d; a++) {
        const float *entries = t->accumulator[a] + s->base[STORED][a];
        const int64_t stride = s->grids.stride[STORED][a][s->d];
        if (!s->pass.settings.product)
            for (int64_t i = 0; i < n; i++) s->covers[i] = lesser(s->covers[i], entries[i * stride]);
        else if (t->order[a] == 0)
            for (int64_t i = 0; i < n; i++) s->covers[i] = bounded(entries[i * stride]);
        else
            for (int64_t i = 0; i < n; i++)
                s->covers[i] = (a ? s->covers[i] : 1) * factor(entries[i * stride], s->tiles[i], 1);
    }
}

/* The product for each element of a row, in the order of update.py. */
static void stage_row(struct block_sweep *s) {
    const struct tensor *t = s->t;
    int64_t n = s->columns * s->inner, wide = t->block * s->inner, original[DIMS];
    int64_t phase = (t->extent_start[s->d] + s->index[s->d]) % t->block * s->inner;
    for (int64_t e = 0; e < t->dims; e++) original[t->order[e]] = e;
    for (int64_t j = 0; j < n; j++) s->staged[j] = 1;
    for (int64_t i = 0; i < t->dims; i++) {
        int64_t a = original[i], j = 0;
        if (a >= s->d) {
            for (; j < n; j++) s->staged[j] *= s->factors[a][j];
            continue;
        }
        for (int64_t block = 0; j < n; block++) {
            float value = factor(entry(s, a, block), s->tiles[block], i != 0);
            for (int64_t end = smaller(n, (block + 1) * wide - phase); j < end; j++) s->staged[j] *= value;
        }
    }
}

static void step_part(struct block_sweep *s, const int64_t *at) {
    const struct tensor *t = s->t;
    struct stretch x = {.n = s->columns * s->inner, .peaks = s->peaks, .tops = s->tops, .covers = s->covers};
    x.block = t->block * s->inner;
    x.phase = (t->extent_start[s->d] + s->index[s->d]) % t->block * s->inner;
    x.floors = s->floors;
    memset(s->tops, 0, (size_t)s->blocks * sizeof(int32_t));
    if (is_direct(s)) {
        cover_row(s);
    } else {
        stage_row(s);
        for (int64_t i = 0; i < s->blocks; i++) s->covers[i] = 1;
        x.floors = s->staged;
    }
    step_stretch(&s->pass, s->b, at, x);
    for (int64_t a = 0; a <= t->dims; a++) {
        if (a >= s->d && a < t->dims) continue;
        raise(s->blocks, s->aside + s->base[ASIDE][a], s->grids.stride[ASIDE][a][s->d], s->tops);
    }
}

/* Rows `from` to `to` of dimension 0 of a box, which lie in the current strip. */
static void sweep_block_rows(struct block_sweep *s, int64_t from, int64_t to) {
    const struct box *b = s->b;
    int64_t d = s->d, j[DIMS] = {from}, rows = (to - from) * product(b->shape, 1, d);
    for (int64_t r = 0; r < rows; r++) {
        int64_t at[OPERANDS], is_new = r == 0;
        for (int o = 0; o < OPERANDS; o++) {
            at[o] = b->offset[o] + (s->index[d] - b->start[d]) * b->stride[o][d];
            for (int64_t e = 0; e < d; e++) at[o] += j[e] * b->stride[o][e];
        }
        for (int64_t e = 0; e < d; e++) {
            int64_t before = block_at(s, e);
            s->index[e] = b->start[e] + j[e];
            is_new |= e && before != block_at(s, e);
        }
        if (is_new && r) end_rows(s);
        locate(s);
        if (is_new) begin_rows(s);
        step_part(s, at);
        for (int64_t e = d - 1; e > 0 && ++j[e] == b->shape[e]; e--) j[e] = 0;
        int carry = 1;
        for (int64_t e = d - 1; e > 0; e--) carry &= j[e] == 0;
        j[0] += carry;
    }
    end_rows(s);
}

static void sweep_block_box(struct block_sweep *s, int64_t from, int64_t to) {
    const struct tensor *t = s->t;
    const struct box *b = s->b;
    int64_t k = t->dims, d = k - 1;
    for (int64_t e = 0; e < k; e++) s->index[e] = b->start[e];
    for (; d > 1; d--) {
        int64_t begin = t->extent_start[d] + b->start[d];
        if (begin / t->block != (begin + b->shape[d] - 1) / t->block) break;
        if (product(b->shape, d - 1, k) > PART || !contiguous_from(b, k, d - 1)) break;
    }
    s->d = d;
    s->inner = product(b->shape, d + 1, k);
    for (int64_t c = 0; c < b->shape[d]; c += s->columns) {
        s->columns = smaller(b->shape[d] - c, PART / s->inner);
        s->index[d] = b->start[d] + c;
        int64_t begin = t->extent_start[d] + s->index[d];
        s->blocks = (begin + s->columns - 1) / t->block - begin / t->block + 1;
        sweep_block_rows(s, from, to);
    }
}

/* Overwrite the entries of a strip with the new maxima. */
static void overwrite_strip(const struct block_sweep *s, int64_t rows) {
    const struct tensor *t = s->t;
    int64_t k = t->dims, in_order = 1;
    for (int64_t e = 0; e < k; e++) in_order &= t->order[e] == e;
    for (int64_t a = 0; a <= k; a++) {
        int64_t first = a ? s->strip : strip_start(s), tall = a ? 1 : rows, index[DIMS] = {0};
        float *entries = t->accumulator[a] + first * s->grids.stride[STORED][a][0];
        const int32_t *aside = s->aside + s->grids.begin[a];
        int64_t count = tall * s->grids.stride[ASIDE][a][0];
        if (in_order) memcpy(entries, aside, (size_t)count * sizeof(float));
        for (int64_t i = 0; !in_order && i < count; i++) {
            int64_t at = 0;
            for (int64_t e = 0; e < k; e++) at += index[e] * s->grids.stride[STORED][a][e];
            entries[at] = float_of(aside[i]);
            for (int64_t e = k - 1; e > 0 && ++index[e] == s->grids.length[a][e]; e--) index[e] = 0;
            int carry = 1;
            for (int64_t e = k - 1; e > 0; e--) carry &= index[e] == 0;
            index[0] += carry;
        }
    }
}

/* Floats of workspace that a thread needs. */
enum { BLOCK_WORKSPACE = (DIMS + 6) * PART };

static int64_t strip_entries(const struct tensor *t) {
    struct grids g = grids_of(t);
    return g.begin[t->dims + 1];
}

static void sweep_blocks(const struct step *step, const struct tensor *t, int64_t from, int64_t to, int32_t *aside,
                         float *workspace) {
    struct block_sweep s = {.pass = pass_over(step, t), .t = t, .grids = grids_of(t), .aside = aside};
    float **parts[] = {&s.floors, &s.staged, &s.covers, &s.tiles, (float **)&s.peaks, (float **)&s.tops};
    for (int64_t i = 0; i < 6; i++) *parts[i] = workspace + i * PART;
    for (int64_t e = 0; e < DIMS; e++) s.factors[e] = workspace + (6 + e) * PART;
    for (s.strip = from; s.strip < to; s.strip++) {
        int64_t start = strip_start(&s);
        int64_t end = smaller(t->extent[0], (s.grids.first[0] + s.strip + 1) * t->block - t->extent_start[0]);
        memset(aside, 0, (size_t)s.grids.begin[t->dims + 1] * sizeof(int32_t));
        for (int64_t i = 0; i < t->boxes; i++) {
            s.b = step->boxes + t->first_box + i;
            int64_t first = start - s.b->start[0], stop = smaller(end - s.b->start[0], s.b->shape[0]);
            if (first < 0) first = 0;
            if (first < stop && product(s.b->shape, 0, t->dims)) sweep_block_box(&s, first, stop);
        }
        overwrite_strip(&s, end - start);
    }
    finish(&s.pass);
}
