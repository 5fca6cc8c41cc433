/* One thread's way through a tensor with block covers, which matrices.py has made a list of matrices.
 *
 * A strip is a block of rows, and shares no accumulator entry with another: threads take whole strips. A panel is as many
 * blocks of columns of a strip as stay in cache. No other panel touches its accumulator entries, so that they are read when
 * it begins, the new maxima are gathered aside, and written when it ends.
 *
 * Each element's factors are one of its row and block, and one of its column, the same for all rows of the panel. */

/* Most columns. Memory is slower where rows are cut, so those of most matrices are not; but what is kept of each column must stay
 * in the cache of a core. */
enum { PANEL = 8192 };

struct panel {
    struct pass pass;
    const struct tensor *t;
    int64_t strip, block;           /* number of the strip, and of the first block of columns */
    int64_t blocks;                 /* of columns */
    float old;                      /* weight of what the covers say, with which floors and covers are multiplied */
    int64_t row, rows, column, columns; /* of what is stored */
    int32_t *of_rows, *of_columns;  /* gathered aside; entries of a row lie together */
    float *floors, *tiles, *covers; /* by column, by block, by row and block */
};

struct span {
    int64_t start, stop;
};

/* The rows (or columns) of block number i. */
static struct span span_of(const struct side *s, int64_t i) {
    int64_t start = i / s->blocks * s->length, end = (i % s->blocks + 1) * s->block - s->phase;
    int64_t begin = end - s->block;
    return (struct span){start + (begin > 0 ? begin : 0), start + smaller(end, s->length)};
}

static int64_t strips_of(const struct tensor *t) { return t->side[0].outer * t->side[0].blocks; }
static int64_t column_blocks(const struct tensor *t) { return t->side[1].outer * t->side[1].blocks; }

/* Most blocks of columns in a panel, and most columns. */
static int64_t panel_blocks(const struct tensor *t) {
    int64_t most = PANEL / t->side[1].block;
    return smaller(most ? most : 1, t->side[1].blocks);
}
static int64_t panel_columns(const struct tensor *t) {
    return smaller(panel_blocks(t) * t->side[1].block, t->side[1].length);
}

/* Floats of workspace that a panel needs. */
static int64_t panel_entries(const struct tensor *t) {
    int64_t rows = smaller(t->side[0].block, t->side[0].length), blocks = panel_blocks(t);
    return 2 * rows * blocks + 2 * panel_columns(t) + blocks;
}

/* Accumulators, as the three matrices that they are. */
static float *row_entries(const struct panel *p, int64_t row) {
    return p->t->accumulator[0] + row * column_blocks(p->t) + p->block;
}
static float *column_entries(const struct panel *p) {
    return p->t->accumulator[1] + p->strip * p->t->side[1].outer * p->t->side[1].length + p->column;
}
static float *tile_entries(const struct panel *p) {
    return p->t->accumulator[2] + p->strip * column_blocks(p->t) + p->block;
}

static void begin_panel(struct panel *p, float *workspace) {
    int64_t n = p->columns, blocks = p->blocks;
    int is_product = p->pass.settings.product;
    const float *columns = column_entries(p), *tiles = tile_entries(p);
    p->floors = workspace;
    p->tiles = p->floors + n;
    p->covers = p->tiles + blocks;
    p->of_columns = (int32_t *)(p->covers + p->rows * blocks);
    p->of_rows = p->of_columns + n;
    memset(p->of_columns, 0, (size_t)(n + p->rows * blocks) * sizeof(int32_t));
    for (int64_t i = 0, c = 0; i < blocks; i++) {
        p->tiles[i] = is_product ? divisor(tiles[i]) : tiles[i];
        int64_t end = span_of(&p->t->side[1], p->block + i).stop - p->column;
        for (; c < end; c++) p->floors[c] = (is_product ? bounded(columns[c]) / p->tiles[i] : columns[c]) * p->old;
    }
    for (int64_t r = 0; r < p->rows; r++) {
        const float *entries = row_entries(p, p->row + r);
        float *covers = p->covers + r * blocks;
        for (int64_t i = 0; i < blocks; i++)
            covers[i] = is_product ? bounded(entries[i]) : lesser(entries[i], p->tiles[i]) * p->old;
    }
}

/* The maximum of a tile is that of its rows'. */
static void end_panel(const struct panel *p) {
    int32_t *tiles = (int32_t *)tile_entries(p);
    memset(tiles, 0, (size_t)p->blocks * sizeof *tiles);
    for (int64_t r = 0; r < p->rows; r++) {
        const int32_t *tops = p->of_rows + r * p->blocks;
        memcpy(row_entries(p, p->row + r), tops, (size_t)p->blocks * sizeof(float));
        for (int64_t i = 0; i < p->blocks; i++) tiles[i] = larger(tiles[i], tops[i]);
    }
    for (int64_t c = 0; c < p->columns; c++) p->of_columns[c] &= INT32_MAX; /* NaN may have a sign there */
    memcpy(column_entries(p), p->of_columns, (size_t)p->columns * sizeof(float));
}

/* Rows of a matrix, from number `top` to `bottom`, as far as they lie in the panel: n columns from number `column` on. */
static void step_panel_rows(struct panel *p, const struct matrix *m, int64_t top, int64_t bottom, int64_t column,
                            int64_t n) {
    int64_t stored = m->first_column + column - p->column, in_block = m->column_phase + column;
    int64_t i = m->block + in_block / m->column_length - p->block, entry = (m->first_row + top - p->row) * p->blocks + i;
    struct stretch x = {
        .n = n,
        .rows = bottom - top,
        .block = m->column_length,
        .phase = in_block % m->column_length,
        .covers = p->covers + entry,
        .floors = p->floors + stored,
        .peaks = p->of_columns + stored,
        .tops = p->of_rows + entry,
        .entries = p->blocks,
    };
    struct place at = {.row = m->row_place + top, .column = m->column_place + column};
    for (int o = 0; o < OPERANDS; o++) {
        at.offset[o] = m->offset[o] + top * m->stride[o] + (m->table ? 0 : column);
        at.step[o] = 1;
        at.table[o] = m->table ? m->table + o * m->columns + column : 0;
    }
    step_stretch(&p->pass, &at, &x, m->stride);
}

static void sweep_panel(struct panel *p, const struct matrix *first, const struct matrix *end) {
    for (const struct matrix *m = first; m < end && m->first_row < p->row + p->rows; m++) {
        int64_t top = p->row > m->first_row ? p->row - m->first_row : 0;
        int64_t bottom = smaller(m->rows, p->row + p->rows - m->first_row);
        int64_t left = p->column > m->first_column ? p->column - m->first_column : 0;
        int64_t right = smaller(m->columns, p->column + p->columns - m->first_column);
        if (left < right && top < bottom) step_panel_rows(p, m, top, bottom, left, right - left);
    }
}

static void sweep_blocks(const struct step *step, const struct tensor *t, int64_t from, int64_t to, float *workspace) {
    struct panel p = {.pass = pass_over(step, t), .t = t};
    look_ahead(&p.pass, step);
    p.old = p.pass.settings.old;
    p.pass.settings.old = 1; /* what the covers say is multiplied with it before the rows are worked through */
    const struct matrix *first = step->matrices + t->first_box, *end = first + t->boxes;
    for (p.strip = from; p.strip < to; p.strip++) {
        struct span rows = span_of(&t->side[0], p.strip);
        p.row = rows.start;
        p.rows = rows.stop - rows.start;
        while (first < end && first->first_row + first->rows <= p.row) first++;
        for (p.block = 0; p.block < column_blocks(t); p.block += p.blocks) {
            p.blocks = smaller(panel_blocks(t), t->side[1].blocks - p.block % t->side[1].blocks);
            p.column = span_of(&t->side[1], p.block).start;
            p.columns = span_of(&t->side[1], p.block + p.blocks - 1).stop - p.column;
            begin_panel(&p, workspace);
            sweep_panel(&p, first, end);
            end_panel(&p);
        }
    }
    finish(&p.pass);
}
