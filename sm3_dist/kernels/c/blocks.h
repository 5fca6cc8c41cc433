/* One thread's way through a tensor with block covers, which matrices.py has made a list of matrices.
 *
 * A strip is a block of rows, and shares no accumulator entry with another: threads take whole strips. A panel is as many
 * blocks of columns of a strip as stay in cache. No other panel touches its accumulator entries, so that they are read when
 * it begins, the new maxima are gathered aside, and written when it ends.
 *
 * Each element's factors are one of its row and block, and one of its column, the same for all rows of the panel. */

enum { PANEL = 2048 };

struct panel {
    struct pass pass;
    const struct tensor *t;
    int64_t strip, block;           /* number of the strip, and of the first block of columns */
    int64_t blocks;                 /* of columns */
    int64_t row, rows, column, columns; /* of what is stored */
    int32_t *of_rows, *of_columns, *of_tiles; /* gathered aside */
    float *floors, *tiles, *covers; /* by column, by block, by block for one row */
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
    return rows * blocks + 2 * panel_columns(t) + 3 * blocks;
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
    const float *columns = column_entries(p), *tiles = tile_entries(p);
    p->floors = workspace;
    p->tiles = p->floors + n;
    p->covers = p->tiles + blocks;
    p->of_tiles = (int32_t *)(p->covers + blocks);
    p->of_columns = p->of_tiles + blocks;
    p->of_rows = p->of_columns + n;
    memset(p->of_tiles, 0, (size_t)(blocks + n + p->rows * blocks) * sizeof(int32_t));
    if (!p->pass.settings.product) {
        memcpy(p->floors, columns, (size_t)n * sizeof(float));
        memcpy(p->tiles, tiles, (size_t)blocks * sizeof(float));
        return;
    }
    for (int64_t i = 0, c = 0; i < blocks; i++) {
        float tile = p->tiles[i] = divisor(tiles[i]);
        for (int64_t end = span_of(&p->t->side[1], p->block + i).stop - p->column; c < end; c++)
            p->floors[c] = bounded(columns[c]) / tile;
    }
}

static void end_panel(const struct panel *p) {
    for (int64_t r = 0; r < p->rows; r++)
        memcpy(row_entries(p, p->row + r), p->of_rows + r * p->blocks, (size_t)p->blocks * sizeof(float));
    for (int64_t c = 0; c < p->columns; c++) p->of_columns[c] &= INT32_MAX; /* NaN may have a sign there */
    memcpy(column_entries(p), p->of_columns, (size_t)p->columns * sizeof(float));
    memcpy(tile_entries(p), p->of_tiles, (size_t)p->blocks * sizeof(float));
}

/* Row number `row` of a matrix, as far as it lies in the panel: n columns from number `column` on, in `blocks` blocks. */
static void step_panel_row(struct panel *p, const struct matrix *m, int64_t row, int64_t column, int64_t n) {
    int64_t stored = m->first_column + column, in_block = m->column_phase + column;
    int64_t i = m->block + in_block / m->column_length - p->block, phase = in_block % m->column_length;
    int64_t blocks = (phase + n + m->column_length - 1) / m->column_length, r = m->first_row + row - p->row;
    const float *entries = row_entries(p, p->row + r) + i;
    int32_t *tops = p->of_rows + r * p->blocks + i;
    for (int64_t b = 0; b < blocks; b++)
        p->covers[b] = p->pass.settings.product ? bounded(entries[b]) : lesser(entries[b], p->tiles[i + b]);
    struct stretch x; /* (an initializer would clear it first, which takes long for a row) */
    x.n = n;
    x.block = m->column_length;
    x.phase = phase;
    x.covers = p->covers;
    x.floors = p->floors + stored - p->column;
    x.peaks = p->of_columns + stored - p->column;
    x.tops = tops;
    struct place at;
    at.row = m->row_place + row;
    at.column = m->column_place + column;
    at.box = 0;
    for (int o = 0; o < OPERANDS; o++) {
        at.offset[o] = m->offset[o] + row * m->stride[o] + (m->table ? 0 : column);
        at.step[o] = 1;
        at.table[o] = m->table ? m->table + o * m->columns + column : 0;
    }
    step_stretch(&p->pass, &at, &x);
    for (int64_t b = 0; b < blocks; b++) p->of_tiles[i + b] = larger(p->of_tiles[i + b], tops[b]);
}

static void sweep_panel(struct panel *p, const struct matrix *first, const struct matrix *end) {
    for (const struct matrix *m = first; m < end && m->first_row < p->row + p->rows; m++) {
        int64_t top = p->row > m->first_row ? p->row - m->first_row : 0;
        int64_t bottom = smaller(m->rows, p->row + p->rows - m->first_row);
        int64_t left = p->column > m->first_column ? p->column - m->first_column : 0;
        int64_t right = smaller(m->columns, p->column + p->columns - m->first_column);
        for (int64_t row = top; left < right && row < bottom; row++) step_panel_row(p, m, row, left, right - left);
    }
}

static void sweep_blocks(const struct step *step, const struct tensor *t, int64_t from, int64_t to, float *workspace) {
    struct panel p = {.pass = pass_over(step, t), .t = t};
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
