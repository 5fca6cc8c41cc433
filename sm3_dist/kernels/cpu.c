/* SM3-II for the CPU: a whole step in one call, each weight and gradient touched once.
 *
 * The definition is update_box() in update.py; every result here is the same to the bit. Each operation of that function
 * is one IEEE operation here, in the same order, so the file must be compiled without contraction to fused multiply-adds.
 *
 * A tensor is swept row by row. The accumulator of dimension 0 is complete, and overwritten, as a row ends. Those of the
 * other dimensions are still read by later rows: their maxima are gathered aside and written at the end. Where a tensor is
 * cut between threads, each gathers its own, and the maximum of both is taken after all have finished.
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
#include "widths.h"
#include "tensors.h"
#include "pass.h"
#include "slices.h"
#include "blocks.h"

enum { MAX_THREADS = 256, GAP = 16 };

struct worker {
    const struct step *step;
    int64_t index;
    const struct tensor *cut[2]; /* tensors of which other threads have a part: the first and the last one here */
    int32_t *peaks[2];           /* their maxima so far */
};

/* Sizes of the structs that cpu.py declares as well: a library compiled from other sources is told by them. */
EXPORT int64_t sm3_layout(void) {
    return (int64_t)((sizeof(struct settings) << 48) + (sizeof(struct box) << 32) + (sizeof(struct tensor) << 16) +
                     sizeof(struct param));
}

/* Name of vector width number i, or null if there are fewer or this processor lacks it. */
EXPORT const char *sm3_width(int i) {
    int known = (int)(sizeof widths / sizeof *widths);
    return 0 <= i && i < known && supported(i) ? widths[i].name : 0;
}

/* Bytes of maxima gathered aside for the largest tensor, in whole cache lines. */
static int64_t largest_aside(const struct tensor *tensors, int64_t count, int64_t threads) {
    int64_t most = 0;
    for (const struct tensor *t = tensors; t < tensors + count; t++) {
        int64_t n = t->dims == 1 ? 0 : aside(t, first_aside(t, threads), t->dims);
        if (t->block) n = strip_entries(t);
        if (n > most) most = n;
    }
    return (most + GAP - 1) / GAP * GAP * (int64_t)sizeof(int32_t);
}

static const int64_t workspace_bytes = (BLOCK_WORKSPACE > 2 * LONG_ROW ? BLOCK_WORKSPACE : 2 * LONG_ROW) * sizeof(float);

/* A thread needs room for the maxima of two tensors, the first and the last that it works on, and for some rows. */
EXPORT int64_t sm3_scratch_bytes(const struct tensor *tensors, int64_t count, int64_t threads) {
    return threads * (2 * largest_aside(tensors, count, threads) + workspace_bytes);
}

/* The strip of a tensor with block covers at which it may be cut, for element e. */
static int64_t strip_at(const struct tensor *t, int64_t e) {
    int64_t strips = strips_of(t);
    return e <= 0 ? 0 : e >= t->numel ? strips : (int64_t)((double)e / (double)t->numel * (double)strips);
}

static void *work(void *argument) {
    struct worker *worker = argument;
    const struct step *step = worker->step;
    int64_t start = step->numel * worker->index / step->threads, stop = step->numel * (worker->index + 1) / step->threads;
    int64_t room = (step->scratch_per_thread - workspace_bytes) / 2;
    char *scratch = step->scratch + worker->index * step->scratch_per_thread, *workspace = scratch + 2 * room;
    int64_t before = 0;
    for (const struct tensor *t = step->tensors; t < step->tensors + step->count && before < stop; t++) {
        if (!step->params[t->param].grad || !t->numel) continue;
        if (before + t->numel > start && t->block) {
            int64_t from = strip_at(t, start - before), to = strip_at(t, stop - before);
            int32_t *maxima = (int32_t *)(scratch + (before >= start) * room);
            sweep_blocks(step, t, from, to, maxima, (float *)workspace);
        } else if (before + t->numel > start) {
            struct piece from = cut_at(t, step->boxes, start - before, step->threads);
            struct piece to = cut_at(t, step->boxes, smaller(stop - before, t->numel), step->threads);
            if (before + t->numel <= stop) to = (struct piece){t->boxes, 0};
            int is_cut = before < start || before + t->numel > stop, slot = before >= start;
            int32_t *peaks = (int32_t *)(scratch + slot * room);
            sweep_tensor(step, t, from, to, peaks, workspace);
            if (is_cut) {
                worker->cut[slot] = t;
                worker->peaks[slot] = peaks;
            } else {
                overwrite(t, peaks, step->threads);
            }
        }
        before += t->numel;
    }
    return 0;
}

/* Put together the maxima of tensors that were cut between threads. */
static void merge(struct worker *workers, int64_t threads) {
    const struct tensor *t = 0;
    int32_t *peaks = 0;
    for (struct worker *w = workers; w < workers + threads; w++)
        for (int slot = 0; slot < 2; slot++) {
            if (!w->cut[slot] || w->cut[slot]->dims == 1) continue;
            if (w->cut[slot] != t) {
                if (t) overwrite(t, peaks, threads);
                t = w->cut[slot];
                peaks = w->peaks[slot];
                continue;
            }
            int64_t n = aside(t, first_aside(t, threads), t->dims);
            for (int64_t j = 0; j < n; j++) peaks[j] = larger(peaks[j], w->peaks[slot][j]);
        }
    if (t) overwrite(t, peaks, threads);
}

/* One step of every tensor whose param has a gradient; their step counters are raised by 1.
 *
 * scratch: sm3_scratch_bytes() bytes, aligned to 64, with the same number of threads. Threads live only as long as this
 * call: nothing is left to go wrong at a fork or at exit. Where one cannot be had, the calling thread does its part. */
EXPORT void sm3_step(const struct tensor *tensors, int64_t count, const struct box *boxes, const struct param *params,
                     int64_t param_count, const struct settings *settings, int64_t threads, int64_t width, char *scratch) {
    struct step step = {tensors, boxes, params, settings, count, &widths[width], threads, 0, 0, scratch};
    for (const struct tensor *t = tensors; t < tensors + count; t++)
        if (params[t->param].grad) step.numel += t->numel;
    step.scratch_per_thread = sm3_scratch_bytes(tensors, count, threads) / threads;
    struct worker workers[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS];
    memset(workers, 0, sizeof workers);
    for (int64_t i = threads - 1; i >= 0; i--) {
        workers[i].step = &step;
        workers[i].index = i;
        started[i] = i && pthread_create(&handles[i], 0, work, &workers[i]) == 0;
    }
    for (int64_t i = 0; i < threads; i++)
        if (!started[i]) work(&workers[i]);
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(handles[i], 0);
    merge(workers, threads);
    for (const struct param *p = params; p < params + param_count; p++)
        if (p->grad && p->step) *p->step += 1.0f;
}
