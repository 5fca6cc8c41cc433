/* One thread's way through a tensor with block covers, which matrices.py has made a list of matrices.
 *
 * A strip is a block of rows, and shares no accumulator entry with another: threads take whole strips. It is worked through
 * panel by panel. */

/* Rows of a matrix, from number `top` to `bottom`, as far as they lie in the panel: n columns from number `column` on. */
static void step_panel_rows(struct pass *pass, const struct panel *p, const struct matrix *m, int64_t top, int64_t bottom,
                            int64_t column, int64_t n) {
    int64_t stored = m->first_column + column - p->column, in_block = m->column_phase + column;
    int64_t i = m->block + in_block / m->column_length - p->block;
    struct stretch x = {
        .n = n,
        .rows = bottom - top,
        .block = m->column_length,
        .phase = in_block % m->column_length,
        .covers = p->covers + (m->first_row + top - p->row) * p->blocks + i,
        .floors = p->floors + stored,
        .peaks = (int32_t *)column_entries(p) + stored,
        .tops = (int32_t *)row_entries(p, m->first_row + top) + i,
        .line_of_covers = p->blocks,
        .line_of_tops = column_blocks(p->t),
    };
    struct place at = {.row = m->row_place + top, .column = m->column_place + column};
    for (int o = 0; o < OPERANDS; o++) {
        at.offset[o] = m->offset[o] + top * m->stride[o] + (m->table ? 0 : column);
        at.step[o] = 1;
        at.table[o] = m->table ? m->table + o * m->columns + column : 0;
    }
    step_stretch(pass, &at, &x, m->stride);
}

static void sweep_panel(struct pass *pass, const struct panel *p, const struct matrix *first, const struct matrix *end) {
    for (const struct matrix *m = first; m < end && m->first_row < p->row + p->rows; m++) {
        int64_t top = p->row > m->first_row ? p->row - m->first_row : 0;
        int64_t bottom = smaller(m->rows, p->row + p->rows - m->first_row);
        int64_t left = p->column > m->first_column ? p->column - m->first_column : 0;
        int64_t right = smaller(m->columns, p->column + p->columns - m->first_column);
        if (left < right && top < bottom) step_panel_rows(pass, p, m, top, bottom, left, right - left);
    }
}

static void sweep_blocks(const struct step *step, const struct tensor *t, int64_t from, int64_t to, float *workspace) {
    struct pass pass = pass_over(step, t);
    struct panel p = {.t = t, .product = pass.settings.product, .old = pass.settings.old};
    look_ahead(&pass, step);
    pass.settings.old = 1; /* what the covers say is multiplied with it before the rows are worked through */
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
            step->width->begin_panel(&p, workspace);
            sweep_panel(&pass, &p, first, end);
            step->width->end_panel(&p);
        }
    }
    finish(&pass);
}
