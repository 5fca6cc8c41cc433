/* Block covers of some rows and columns, and their new maxima.
 *
 * A panel is as many blocks of columns of a strip, which is a block of rows, as stay in cache. No other panel touches its
 * accumulator entries. When it begins they are read, and 0 is left in their place, which is then raised; those of tiles are
 * written when it ends.
 *
 * Each element's factors are one of its row and block, and one of its column, the same for all rows of the panel. */

/* Most columns. Memory is slower where rows are cut, so those of hardly any matrix are; but what is kept of each column must stay
 * in the second-level cache. Where rounding is random, there is room for so many random bits. */
enum { PANEL = 32768 };

struct panel {
    const struct tensor *t;
    int64_t strip, block;           /* number of the strip, and of the first block of columns */
    int64_t blocks;                 /* of columns */
    int product;                    /* whether covers are products of entries */
    float old;                      /* weight of what the covers say, with which floors and covers are multiplied */
    int64_t row, rows, column, columns; /* of what is stored */
    float *floors, *tiles, *covers; /* by column, by block, by row and block */
};

struct span {
    int64_t start, stop;
};

/* The rows (or columns) of block number i. */
INLINE struct span span_of(const struct side *s, int64_t i) {
    int64_t start = i / s->blocks * s->length, end = (i % s->blocks + 1) * s->block - s->phase;
    int64_t begin = end - s->block;
    return (struct span){start + (begin > 0 ? begin : 0), start + smaller(end, s->length)};
}

static int64_t strips_of(const struct tensor *t) { return t->side[0].outer * t->side[0].blocks; }
INLINE int64_t column_blocks(const struct tensor *t) { return t->side[1].outer * t->side[1].blocks; }

/* Most blocks of columns in a panel, and most columns. */
static int64_t panel_blocks(const struct tensor *t) {
    int64_t most = (t->rounds || t->type[MOMENT] == CODE ? ROOM : PANEL) / t->side[1].block;
    return smaller(most ? most : 1, t->side[1].blocks);
}
static int64_t panel_columns(const struct tensor *t) {
    return smaller(panel_blocks(t) * t->side[1].block, t->side[1].length);
}

/* Floats of workspace that a panel needs. */
static int64_t panel_entries(const struct tensor *t) {
    int64_t rows = smaller(t->side[0].block, t->side[0].length), blocks = panel_blocks(t);
    return panel_columns(t) + (rows + 1) * blocks;
}

/* Accumulators, as the three matrices that they are. */
INLINE float *row_entries(const struct panel *p, int64_t row) {
    return p->t->accumulator[0] + row * column_blocks(p->t) + p->block;
}
INLINE float *column_entries(const struct panel *p) {
    return p->t->accumulator[1] + p->strip * p->t->side[1].outer * p->t->side[1].length + p->column;
}
INLINE float *tile_entries(const struct panel *p) {
    return p->t->accumulator[2] + p->strip * column_blocks(p->t) + p->block;
}

INLINE void take_columns(const struct panel *p, int product) {
    const float old = p->old, *entries = column_entries(p);
    float *floors = p->floors;
    for (int64_t i = 0, c = 0; i < p->blocks; i++) {
        const float tile = p->tiles[i];
        int64_t end = span_of(&p->t->side[1], p->block + i).stop - p->column;
        for (; c < end; c++) floors[c] = (product ? bounded(entries[c]) / tile : entries[c]) * old;
    }
}

/* (Entries of rows follow one another where the panel is as wide as the tensor.) */
INLINE void take_rows(const struct panel *p, int product) {
    const float old = p->old, *tiles = p->tiles;
    int together = product && p->blocks == column_blocks(p->t);
    int64_t n = together ? p->rows * p->blocks : p->blocks;
    for (int64_t r = 0; r < (together ? 1 : p->rows); r++) {
        const float *entries = row_entries(p, p->row + r);
        float *covers = p->covers + r * p->blocks;
        for (int64_t i = 0; i < n; i++) covers[i] = product ? bounded(entries[i]) : lesser(entries[i], tiles[i]) * old;
    }
}

/* Ask for the entries of the panel that follows, which a step has not touched yet: all this one's rows lie between. */
INLINE void prefetch_entries(const struct panel *p) {
    prefetch_lines(column_entries(p) + p->columns, p->columns * (int64_t)sizeof(float), 2);
    if (p->blocks == column_blocks(p->t))
        prefetch_lines(row_entries(p, p->row + p->rows), p->rows * p->blocks * (int64_t)sizeof(float), 2);
}

/* workspace: panel_entries() floats. */
INLINE void begin_panel(struct panel *p, float *workspace) {
    const float *tiles = tile_entries(p);
    p->floors = workspace;
    p->tiles = p->floors + p->columns;
    p->covers = p->tiles + p->blocks;
    for (int64_t i = 0; i < p->blocks; i++) p->tiles[i] = p->product ? divisor(tiles[i]) : tiles[i];
    if (p->product) {
        take_columns(p, 1);
        take_rows(p, 1);
    } else {
        take_columns(p, 0);
        take_rows(p, 0);
    }
    memset(column_entries(p), 0, (size_t)p->columns * sizeof(float));
    for (int64_t r = 0; r < p->rows; r++) memset(row_entries(p, p->row + r), 0, (size_t)p->blocks * sizeof(float));
    prefetch_entries(p);
}

/* The maximum of a tile is that of its rows'. */
INLINE void end_panel(const struct panel *p) {
    const int32_t *rows = (const int32_t *)row_entries(p, p->row);
    int32_t *tiles = (int32_t *)tile_entries(p), *columns = (int32_t *)column_entries(p);
    memset(tiles, 0, (size_t)p->blocks * sizeof *tiles);
    for (int64_t r = 0; r < p->rows; r++, rows += column_blocks(p->t))
        for (int64_t i = 0; i < p->blocks; i++) tiles[i] = larger(tiles[i], rows[i]);
    for (int64_t c = 0; c < p->columns; c++) columns[c] &= INT32_MAX; /* NaN may have a sign there */
}
