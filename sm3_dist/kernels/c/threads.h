/* Threads that work together: PyTorch's own, or some that live for one call. */

enum { MAX_THREADS = 256 };

/* GOMP_parallel of the OpenMP runtime that PyTorch uses: calls a function on a number of its threads. */
typedef void parallel_function(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

struct job { /* of each of several threads */
    void (*work)(void *);
    void *argument;
};

static void *work_apart(void *given) {
    struct job *job = given;
    job->work(job->argument);
    return 0;
}

/* Let `threads` threads work, of which one calls. Where another cannot be had, the others do its part. */
static void work_together(void (*work)(void *), void *argument, int64_t threads, parallel_function *parallel) {
    pthread_t handles[MAX_THREADS];
    int started[MAX_THREADS];
    struct job job = {work, argument};
    if (parallel && threads > 1) {
        parallel(work, argument, (unsigned)threads, 0);
        return;
    }
    for (int64_t i = 1; i < threads; i++) started[i] = pthread_create(&handles[i], 0, work_apart, &job) == 0;
    work(argument);
    for (int64_t i = 1; i < threads; i++)
        if (started[i]) pthread_join(handles[i], 0);
}
