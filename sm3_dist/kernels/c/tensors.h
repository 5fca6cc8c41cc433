/* What a step goes through: tensors, their boxes, and where a tensor may be cut between threads. */

enum { DIMS = 8, TILE = 1024, LONG_ROW = 8192 };

/* The structs are declared once more in backend.py. */

struct box {
    int64_t shape[DIMS];
    int64_t start[DIMS];            /* where its entries begin in what is stored of each accumulator */
    int64_t stride[OPERANDS][DIMS]; /* in elements */
    int64_t offset[OPERANDS];       /* of its first element in the local tensors */
};

struct side { /* the rows, or columns, of accumulators with block covers; see matrices.py, for this and the next */
    int64_t outer, length; /* how often a pattern repeats, and rows of one */
    int64_t blocks, block; /* of one pattern; rows of a block */
    int64_t phase;         /* rows of the first block that come before */
};

struct matrix { /* consecutive rows and columns of a box */
    int64_t rows, columns;
    int64_t first_row, first_column;     /* among those stored */
    int64_t block;                       /* of columns in which it begins, among those stored */
    int64_t column_length, column_phase; /* columns of a block, and of the first one those that come before */
    int64_t row_place, column_place;     /* in the original tensor */
    int64_t offset[OPERANDS], stride[OPERANDS]; /* in the local tensors: where it begins, and from row to row */
    const int64_t *table; /* where its columns lie, for one operand after another; null: side by side */
};

struct tensor {
    int64_t param, group;
    int64_t type[OPERANDS];
    int64_t dims;
    int64_t block;            /* of the covers; 0 for whole slices */
    int64_t first_box, boxes; /* with block covers, of the matrices */
    int64_t numel;
    int64_t stored[DIMS]; /* entries of each accumulator */
    int64_t order[DIMS];  /* dimension of the original tensor that each one is; in memory the last changes fastest */
    int64_t extent_start[DIMS];   /* of the smallest box that contains all, in the original tensor */
    int64_t place[2][DIMS];       /* what an index counts in the place of an element's row, and of its column */
    struct side side[2];          /* rows and columns, with block covers */
    int64_t strided;              /* whether no dimension is side by side in all operands */
    int64_t rounds, number;       /* whether to round bfloat16 stochastically; the tensor's number */
    float *accumulator[DIMS];     /* by dimension; with block covers of rows, columns and tiles */
    char *moment;
    double whole_numel;       /* elements of the whole tensor */
    double cap;               /* the largest square of an update, in units */
    int64_t *partial, *average; /* sums of squares: of this step, added to; of those before. null: nobody asks */
};

struct param { /* what may differ in every step */
    char *weight;
    char *grad; /* null: no gradient, leave everything as it is */
    float *step;
};

struct piece { /* rows of a tensor to be worked through, from one position to another */
    int64_t box, row;
};

/* Where the running maxima of accumulator i lie among those that are gathered aside. */
static int64_t aside(const struct tensor *t, int64_t first, int64_t i) {
    int64_t n = 0;
    for (int64_t d = first; d < i; d++) n += t->stored[d];
    return n;
}

/* First dimension whose maxima are gathered aside. Dimension 0 is not, unless it is so short that shares end within rows;
 * a vector has none: each of its elements is its own maximum. */
static int64_t first_aside(const struct tensor *t, int64_t shares) {
    return t->dims > 1 && t->stored[0] < 16 * shares ? 0 : 1;
}

static int contiguous_from(const struct box *b, int64_t dims, int64_t d) {
    for (int operand = 0; operand < OPERANDS; operand++) {
        int64_t expected = 1;
        for (int64_t i = dims - 1; i >= d; i--) {
            if (b->shape[i] != 1 && b->stride[operand][i] != expected) return 0;
            expected *= b->shape[i];
        }
    }
    return 1;
}

static int64_t product(const int64_t *n, int64_t from, int64_t to) {
    int64_t p = 1;
    for (int64_t i = from; i < to; i++) p *= n[i];
    return p;
}

/* Number of leading dimensions that count rows; the others form the row, as many as make it long enough. */
static int64_t leading(const struct tensor *t, const struct box *b) {
    int64_t d = t->dims - 1;
    if (d == 0) return 0;
    while (d > 1 && product(b->shape, d - 1, t->dims) <= LONG_ROW && contiguous_from(b, t->dims, d - 1)) d--;
    return d;
}

static int64_t rows_of(const struct tensor *t, const struct box *b) {
    if (t->dims == 1) return (b->shape[0] + TILE - 1) / TILE;
    return product(b->shape, 0, leading(t, b));
}

/* The first place at or after element e of a tensor where it may be cut: within a box, between rows of dimension 0. The
 * start of a later box will not do, for it may go on with the row in which the box before ended. */
static struct piece cut_at(const struct tensor *t, const struct box *boxes, int64_t e, int64_t shares) {
    if (e <= 0) return (struct piece){0, 0};
    for (int64_t i = 0; i < t->boxes; i++) {
        const struct box *b = boxes + t->first_box + i;
        int64_t rows = rows_of(t, b), numel = product(b->shape, 0, t->dims);
        int64_t grain = t->dims > 1 && first_aside(t, shares) == 1 ? rows / b->shape[0] : 1;
        int64_t each = t->dims == 1 ? TILE : numel / rows * grain;
        int64_t row = e > 0 ? (e + each - 1) / each * grain : grain;
        if (row < rows) return (struct piece){i, row};
        e -= numel;
    }
    return (struct piece){t->boxes, 0};
}
