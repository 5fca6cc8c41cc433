/* Which tensors have an element that is NaN or infinite: one whose exponent has all bits set. */

struct run { /* the elements of a tensor, side by side in memory */
    const char *place;
    int64_t numel;
    int64_t type; /* FLOAT32, BFLOAT16 or FLOAT16; NONE: they are not side by side, or of another type */
};

typedef int special_function(const char *place, int64_t n);

struct search {
    const struct run *runs;
    int64_t count;
    int32_t *flags;
    special_function *const *special; /* by type, whether one of n elements is NaN or infinite */
    int64_t taken;                    /* how many parts threads took */
};

enum { PART = 1 << 16, WORTH_A_THREAD = 1 << 17 }; /* elements */

/* Whether elements are side by side, in whatever order of dimensions. */
static int is_side_by_side(const int64_t *sizes, const int64_t *strides, int64_t dims, int64_t numel) {
    int64_t side = 1;
    for (int found = 1; found && side != numel;) {
        found = 0;
        for (int64_t i = dims - 1; i >= 0; i--)
            if (sizes[i] != 1 && strides[i] == side) side *= sizes[i], found = 1;
    }
    return side == numel;
}

static struct run run_of(const struct torch *torch, void **tensor) {
    struct run run = {0, 1, NONE};
    struct form form;
    void *place = 0;
    if (!is_strided(torch, tensor, &place) || !form_of(torch, tensor, &form) || form.words[1] != torch->cpu) return run;
    int64_t dims = form.words[HEAD - 1], *sizes = form.words + HEAD;
    for (int64_t i = 0; i < dims; i++) run.numel *= sizes[i];
    run.place = place;
    if (run.numel && (!place || !is_side_by_side(sizes, sizes + dims, dims, run.numel))) return run;
    for (int type = FLOAT32; type <= FLOAT16; type++)
        if (form.words[0] == torch->types[type]) run.type = type;
    return run;
}

/* Find where the elements of tensors lie, whose Python objects are given. Returns of how many it could not. */
EXPORT int64_t sm3_runs(const struct torch *torch, char **objects, int64_t count, struct run *runs) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        runs[i] = run_of(torch, tensor_in(torch, objects[i]));
        left += runs[i].type == NONE;
    }
    return left;
}

/* An exponent with all bits set carries over to where the sign is. */
#define IS_SPECIAL(name, target, bits, exponent, least)                                                              \
    target static int name(const char *place, int64_t n) {                                                           \
        bits carried = 0;                                                                                            \
        for (int64_t i = 0; i < n; i++) {                                                                            \
            bits x;                                                                                                  \
            memcpy(&x, place + i * (int64_t)sizeof x, sizeof x);                                                     \
            carried |= (bits)((x & exponent) + least);                                                               \
        }                                                                                                            \
        return carried >> (8 * sizeof carried - 1);                                                                  \
    }
#define OF_ALL_TYPES(width, target)                                                                                  \
    IS_SPECIAL(special_float32_##width, target, uint32_t, 0x7f800000u, 0x800000u)                                    \
    IS_SPECIAL(special_bfloat16_##width, target, uint16_t, 0x7f80u, 0x80u)                                           \
    IS_SPECIAL(special_float16_##width, target, uint16_t, 0x7c00u, 0x400u)
#define BY_TYPE(width) {special_float32_##width, special_bfloat16_##width, special_float16_##width}

OF_ALL_TYPES(baseline, )
#ifdef X86
OF_ALL_TYPES(avx2, __attribute__((target("avx2"))))
static special_function *const specials[][3] = {BY_TYPE(baseline), BY_TYPE(avx2)};
#else
static special_function *const specials[][3] = {BY_TYPE(baseline)};
#endif

static int64_t parts_of(const struct run *run) { return run->type == NONE ? 0 : (run->numel + PART - 1) / PART; }

static void search(void *argument) {
    struct search *s = argument;
    for (int64_t i = 0, before = 0;;) {
        int64_t part = __atomic_fetch_add(&s->taken, 1, __ATOMIC_RELAXED);
        for (; i < s->count && part >= before + parts_of(s->runs + i); i++) before += parts_of(s->runs + i);
        if (i == s->count) return;
        const struct run *run = s->runs + i;
        int64_t from = (part - before) * PART;
        if (s->special[run->type](run->place + from * size_of(run->type), smaller(PART, run->numel - from)))
            __atomic_store_n(s->flags + i, 1, __ATOMIC_RELAXED);
    }
}

/* Set the flags of those that have such an element.
 *
 * flags: all 0.
 * parallel: as for sm3_step(). */
EXPORT void sm3_not_finite(const struct run *runs, int64_t count, int32_t *flags, int64_t threads,
                           parallel_function *parallel) {
    struct search s = {runs, count, flags, specials[supported(1) != 0], 0};
    int64_t numel = 0;
    for (const struct run *run = runs; run < runs + count; run++) numel += run->type == NONE ? 0 : run->numel;
    work_together(search, &s, smaller(smaller(threads, MAX_THREADS), numel / WORTH_A_THREAD + 1), parallel);
}
