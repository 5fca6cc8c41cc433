/* Stochastic rounding to bfloat16 and to codes, by the random numbers of rounding.py. */

struct philox { /* counter and key of one row */
    uint32_t row, tensor, step;
    uint64_t seed;
};

#define M0 0xd2511f53u /* the factors of Philox4x32 */
#define M1 0xcd9e8d57u

enum { PHILOX_ROUNDS = 7, ROOM = 8192, ROW_WORDS = ROOM / 2 + 256 }; /* elements that there is room for; words */

struct random { /* bits of up to ROOM elements, 16 for each, and four words for each eight elements: */
    uint32_t words[ROW_WORDS];  /* those of weights, */
    uint32_t turned[ROW_WORDS]; /* and of momentum: the halves of each word change places */
};

/* Random bits of some groups of eight elements, from number `first` on, to word `at` and those after it: Philox4x32-7. */
INLINE void random_words(int64_t groups, uint32_t first, const struct philox *p, struct random *random, int64_t at) {
    const uint32_t row = p->row, tensor = p->tensor, step = p->step;
    const uint32_t low = (uint32_t)p->seed, high = (uint32_t)(p->seed >> 32);
    for (int64_t i = 0; i < groups; i++) {
        uint32_t c0 = first + (uint32_t)i, c1 = row, c2 = tensor, c3 = step, k0 = low, k1 = high;
        for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
            uint64_t p0 = (uint64_t)c0 * M0, p1 = (uint64_t)c2 * M1;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)p0;
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int k = 0; k < 4; k++) {
            random->words[at + 4 * i + k] = words[k];
            random->turned[at + 4 * i + k] = words[k] << 16 | words[k] >> 16;
        }
    }
}

/* Away from zero if the noise, added to the bits that are dropped, carries over. */
INLINE uint16_t to_bfloat16_randomly(float x, uint32_t noise) {
    uint32_t rounded = ((union bits){.f = x}).u + noise;
    return (uint16_t)(x != x ? 0x7fc0 : rounded >> 16);
}

INLINE void round_randomly(int64_t n, void *restrict to, const float *restrict from, const uint16_t *restrict noise,
                           int type) {
    for (int64_t j = 0; j < n; j++) {
        if (type == CODE)
            ((int8_t *)to)[j] = to_code(from[j], noise[j]);
        else
            ((uint16_t *)to)[j] = to_bfloat16_randomly(from[j], noise[j]);
    }
}
