/* SM3-II for the CPU: a whole step in one call, each weight and gradient touched once.
 *
 * The definition is update_box() in update.py; every result here is the same to the bit. Each operation of that function
 * is one IEEE operation here, in the same order, so the file must be compiled without contraction to fused multiply-adds.
 *
 * A tensor is swept row by row. The accumulator of dimension 0 is complete, and overwritten, as a row ends. Those of the
 * other dimensions are still read by later rows: their maxima are gathered aside and written at the end. Where a tensor is
 * cut between shares, each gathers its own, and the maximum of both is taken after all have finished.
 *
 * Threads take one share of the elements after another, ever smaller ones, so that they end together though one of them
 * began late or has the slower tensors.
 *
 * (Slices. What is different with block covers says blocks.h.)
 *
 * Maxima are taken of bit patterns as integers. Values of nu have no sign, so these are ordered like the floats, with NaN
 * on top, and a NaN gradient reaches the accumulators; its sign bit, which means nothing, is cleared.
 */

#include <pthread.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#include "elements.h"
#include "settings.h"
#include "tensors.h"
#include "widths.h"
#include "pass.h"
#include "slices.h"
#include "blocks.h"
#include "look.h"
#include "threads.h"
#include "finite.h"

enum { ROUNDS = 6, GAP = 16 };

struct share { /* of all elements, of whichever thread takes it */
    const struct tensor *cut[2]; /* tensors of which other shares have a part: the first and the last one here */
    int32_t *peaks[2];           /* their maxima so far */
};

struct team { /* of the threads of one step */
    const struct step *step;
    struct share *shares;
    char *workspaces;
    int64_t workspace;     /* bytes of each */
    int64_t joined, taken; /* how many threads there are so far, and how many shares they took */
};

static int64_t shares_for(int64_t threads) { return threads == 1 ? 1 : threads * ROUNDS; }

/* The element with which a share begins: in each round threads share half of what is left, in the last one all. */
static int64_t share_start(const struct step *step, int64_t index) {
    int64_t threads = step->shares / ROUNDS;
    if (index == 0 || index == step->shares) return index ? step->numel : 0;
    int64_t round = index / threads, rest = step->numel >> round;
    int64_t part = round == ROUNDS - 1 ? rest : rest / 2;
    return step->numel - rest + part * (index % threads) / threads;
}

/* What setup.py was told by sources.py, which is asked again when this is loaded. */
EXPORT int64_t sm3_sources(void) { return SM3_SOURCES; }

/* Name of vector width number i, or null if there are fewer or this processor lacks it. */
EXPORT const char *sm3_width(int i) {
    int known = (int)(sizeof widths / sizeof *widths);
    return 0 <= i && i < known && supported(i) ? widths[i].name : 0;
}

/* Bytes of maxima gathered aside for the largest tensor, in whole cache lines. */
static int64_t largest_aside(const struct tensor *tensors, int64_t count, int64_t shares) {
    int64_t most = 0;
    for (const struct tensor *t = tensors; t < tensors + count; t++) {
        int64_t n = t->dims == 1 || t->block ? 0 : aside(t, first_aside(t, shares), t->dims);
        if (n > most) most = n;
    }
    return (most + GAP - 1) / GAP * GAP * (int64_t)sizeof(int32_t);
}

/* Bytes of workspace for some rows, or a panel. */
static int64_t workspace_bytes(const struct tensor *tensors, int64_t count) {
    int64_t most = 2 * LONG_ROW;
    for (const struct tensor *t = tensors; t < tensors + count; t++) {
        int64_t n = t->block && t->numel ? panel_entries(t) : 0;
        if (n > most) most = n;
    }
    return (most + GAP - 1) / GAP * GAP * (int64_t)sizeof(float);
}

/* A share needs room for the maxima of two tensors, the first and the last in it; a thread, for some rows. */
EXPORT int64_t sm3_scratch_bytes(const struct tensor *tensors, int64_t count, int64_t threads) {
    int64_t shares = shares_for(threads);
    return shares * 2 * largest_aside(tensors, count, shares) + threads * workspace_bytes(tensors, count);
}

/* The strip of a tensor with block covers at which it may be cut, for element e. */
static int64_t strip_at(const struct tensor *t, int64_t e) {
    int64_t strips = strips_of(t);
    return e <= 0 ? 0 : e >= t->numel ? strips : (int64_t)((double)e / (double)t->numel * (double)strips);
}

static void work_on(const struct step *step, struct share *share, int64_t index, char *workspace) {
    int64_t start = share_start(step, index), stop = share_start(step, index + 1), before = 0;
    char *scratch = step->scratch + index * 2 * step->room;
    for (const struct tensor *t = step->tensors; t < step->tensors + step->count && before < stop; t++) {
        if (!step->params[t->param].grad || !t->numel) continue;
        if (before + t->numel > start && t->block) {
            int64_t from = strip_at(t, start - before), to = strip_at(t, stop - before);
            sweep_blocks(step, t, from, to, (float *)workspace);
        } else if (before + t->numel > start) {
            struct piece from = cut_at(t, step->boxes, start - before, step->shares);
            struct piece to = cut_at(t, step->boxes, smaller(stop - before, t->numel), step->shares);
            if (before + t->numel <= stop) to = (struct piece){t->boxes, 0};
            int is_cut = before < start || before + t->numel > stop, slot = before >= start;
            int32_t *peaks = (int32_t *)(scratch + slot * step->room);
            sweep_tensor(step, t, from, to, peaks, workspace);
            if (is_cut) {
                share->cut[slot] = t;
                share->peaks[slot] = peaks;
            } else {
                overwrite(t, peaks, step->shares);
            }
        }
        before += t->numel;
    }
}

static void work(void *argument) {
    struct team *team = argument;
    char *workspace = team->workspaces + __atomic_fetch_add(&team->joined, 1, __ATOMIC_RELAXED) * team->workspace;
    for (;;) {
        int64_t index = __atomic_fetch_add(&team->taken, 1, __ATOMIC_RELAXED);
        if (index >= team->step->shares) return;
        work_on(team->step, team->shares + index, index, workspace);
    }
}

/* Put together the maxima of tensors that were cut between shares. */
static void merge(const struct share *shares, int64_t count) {
    const struct tensor *t = 0;
    int32_t *peaks = 0;
    for (const struct share *share = shares; share < shares + count; share++)
        for (int slot = 0; slot < 2; slot++) {
            if (!share->cut[slot] || share->cut[slot]->dims == 1) continue;
            if (share->cut[slot] != t) {
                if (t) overwrite(t, peaks, count);
                t = share->cut[slot];
                peaks = share->peaks[slot];
                continue;
            }
            int64_t n = aside(t, first_aside(t, count), t->dims);
            for (int64_t j = 0; j < n; j++) peaks[j] = larger(peaks[j], share->peaks[slot][j]);
        }
    if (t) overwrite(t, peaks, count);
}

/* One step of every tensor whose param has a gradient; their step counters are raised by 1.
 *
 * scratch: sm3_scratch_bytes() bytes, aligned to 64, with the same number of threads.
 * parallel: how to have PyTorch's threads, which would otherwise be in the way: idle ones spin for milliseconds, in wait of
 *     its next operation. Null: threads are made that live only as long as this call. */
EXPORT void sm3_step(const struct tensor *tensors, int64_t count, const struct box *boxes, const struct matrix *matrices,
                     const struct param *params, int64_t param_count, const struct settings *settings, int64_t threads,
                     int64_t width, char *scratch, parallel_function *parallel) {
    struct step step = {.tensors = tensors, .boxes = boxes, .matrices = matrices, .params = params, .settings = settings,
                        .count = count, .width = &widths[width], .shares = shares_for(threads), .scratch = scratch};
    struct share shares[MAX_THREADS * ROUNDS];
    for (const struct tensor *t = tensors; t < tensors + count; t++)
        if (params[t->param].grad) step.numel += t->numel;
    step.room = largest_aside(tensors, count, step.shares);
    memset(shares, 0, (size_t)step.shares * sizeof *shares);
    struct team team = {&step, shares, scratch + step.shares * 2 * step.room, workspace_bytes(tensors, count), 0, 0};
    work_together(work, &team, threads, parallel);
    merge(shares, step.shares);
    for (const struct param *p = params; p < params + param_count; p++)
        if (p->grad && p->step) *p->step += 1.0f;
}
