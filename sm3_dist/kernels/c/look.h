/* What would be loops in Python over thousands of tensors: how they lie in memory, and what dictionaries hold. */

/* What is asked of a tensor, whose Python object is given: by PyTorch's own functions, of the interface that it keeps for
 * compiled models, which return 0 for success. A tensor is a pointer to them, and they are told where that is. */
struct torch {
    int64_t within; /* where it is in the Python object */
    int (*data)(void **, void **);
    int (*layout)(void **, int32_t *);
    int (*type)(void **, int32_t *);
    int (*device)(void **, int32_t *);
    int (*which)(void **, int32_t *); /* of several devices of a kind */
    int (*dims)(void **, int64_t *);
    int (*sizes)(void **, int64_t **);
    int (*strides)(void **, int64_t **);
    int64_t cpu, types[3]; /* what it calls the CPU; float32, bfloat16 and float16, as in elements.h */
};

enum { MOST_DIMS = 64, HEAD = 4, TOGETHER = 64 };

static void **tensor_in(const struct torch *torch, char *object) { return (void **)(object + torch->within); }

struct form { /* of a tensor: its type, where it lies, how many dimensions; sizes, strides */
    int64_t words[HEAD + 2 * MOST_DIMS];
};

/* Whether it has strides, and its place, if that is asked for. (Of a tensor without strides PyTorch up to 2.9 prints an error when
 * it is asked for a place.) */
static int is_strided(const struct torch *torch, void **tensor, void **place) {
    int32_t layout = 0;
    return !torch->layout(tensor, &layout) && !layout && (!place || !torch->data(tensor, place));
}

/* How many words there are; 0 if PyTorch cannot tell. */
static int64_t form_of(const struct torch *torch, void **tensor, struct form *form) {
    int32_t type = 0, device = 0, which = 0;
    int64_t dims = 0, *sizes = 0, *strides = 0;
    if (torch->type(tensor, &type) || torch->dims(tensor, &dims)) return 0;
    if (torch->device(tensor, &device) || torch->which(tensor, &which)) return 0;
    if (dims > MOST_DIMS || torch->sizes(tensor, &sizes) || torch->strides(tensor, &strides)) return 0;
    int64_t *words = form->words;
    words[0] = type, words[1] = device, words[2] = which, words[3] = dims;
    for (int64_t i = 0; i < dims; i++) words[HEAD + i] = sizes[i], words[HEAD + dims + i] = strides[i];
    return HEAD + 2 * dims;
}

/* Whether it is the one noted, which may have fewer words. */
static int is_noted(const int64_t *noted, const struct form *form, int64_t n) {
    const int64_t *words = form->words;
    if (memcmp(noted, words, HEAD * sizeof *words)) return 0;
    return !memcmp(noted + HEAD, words + HEAD, (size_t)(n - HEAD) * sizeof *words);
}

static int has_elements(const struct form *form) {
    for (int64_t i = 0; i < form->words[HEAD - 1]; i++)
        if (!form->words[HEAD + i]) return 0;
    return 1;
}

/* Look at tensors. Returns how many words their forms are, or -1 if one cannot be looked at, or has no memory for its elements:
 * those of subclasses that are made of other tensors.
 *
 * places: written, where each lies; null: not asked for.
 * forms: written; null: not asked for.
 * noted: those of an earlier look; -1 if they are others now. Null: it does not matter. */
EXPORT int64_t sm3_look(const struct torch *torch, char **objects, int64_t count, void **places, int64_t *forms,
                        const int64_t *noted) {
    int64_t total = 0;
    struct form form;
    for (int64_t first = 0; first < count; first += TOGETHER) {
        int64_t end = smaller(first + TOGETHER, count);
        /* The place alone, of some: so a processor waits for the memory of several at once, and for what else is asked. */
        for (int64_t i = first; i < end; i++) {
            void **tensor = tensor_in(torch, objects[i]);
            __builtin_prefetch((char *)*tensor + LINE);
            __builtin_prefetch((char *)*tensor + 2 * LINE);
            if (!is_strided(torch, tensor, places ? places + i : 0)) return -1;
        }
        for (int64_t i = first; i < end; i++) {
            int64_t n = form_of(torch, tensor_in(torch, objects[i]), &form);
            if (!n || (noted && !is_noted(noted + total, &form, n))) return -1;
            if (places && !places[i] && has_elements(&form)) return -1;
            if (forms) memcpy(forms + total, form.words, (size_t)n * sizeof *forms);
            total += n;
        }
    }
    return total;
}

/* Whether dictionaries hold these keys and values, in turns, and no more. next: PyDict_Next, by which Python has them gone
 * through. */
EXPORT int64_t sm3_hold(int (*next)(void *, int64_t *, void **, void **), void **dicts, int64_t count, void **objects,
                        int64_t most) {
    int64_t held = 0;
    void *key, *value;
    for (int64_t i = 0; i < count; i++)
        for (int64_t place = 0; next(dicts[i], &place, &key, &value); held += 2)
            if (held == most || objects[held] != key || objects[held + 1] != value) return 0;
    return held == most;
}

/* averaged() of rms.py, of averages that lie anywhere. */
EXPORT void sm3_average(int64_t **averages, const int64_t *sums, int64_t count) {
    enum { STEPS = 10, AFTER_FIRST = -1 };
    for (int64_t i = 0; i < count; i++) {
        int64_t *average = averages[i], before = *average;
        if (sums[i] > 0) *average = before > 0 ? before - before / STEPS + sums[i] / STEPS : before ? sums[i] : AFTER_FIRST;
    }
}
