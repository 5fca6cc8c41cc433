/* random_words() for one width. Counters are in 64 bits each, of which the upper half is not looked at; and some vectors go
 * side by side, so that none has to wait for its own round before. In the first two rounds half of the words are the same
 * for all groups. */

struct OF(keys) { /* of a row, and what is the same for all groups after the second round */
    OF(ints) same[4], k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];
};

/* `count` vectors of groups, a constant. */
WIDE_INLINE void OF(vectors_of_words)(int count, int64_t first, const struct OF(keys) *keys, struct random *random,
                                      int64_t at) {
    enum { GROUPS = LANES / 2 };
    const OF(ints) f0 = OF(every_wide)(M0), f1 = OF(every_wide)(M1);
    OF(ints) c0[SIDE_BY_SIDE], c1[SIDE_BY_SIDE], c2[SIDE_BY_SIDE], c3[SIDE_BY_SIDE];
    for (int v = 0; v < count; v++) {
        OF(ints) p0 = OF(product)(OF(groups)(first + GROUPS * v), f0);
        c1[v] = OF(product)(OF(xor)(OF(upper)(p0), keys->same[0]), f1);
        c0[v] = OF(xor)(OF(upper)(c1[v]), keys->same[1]);
        c2[v] = OF(xor)(p0, keys->same[2]);
        c3[v] = keys->same[3];
    }
#pragma GCC unroll 8
    for (int r = 2; r < PHILOX_ROUNDS; r++) {
        for (int v = 0; v < count; v++) {
            OF(ints) p0 = OF(product)(c0[v], f0), p1 = OF(product)(c2[v], f1);
            c0[v] = OF(xor)(OF(upper)(p1), OF(xor)(c1[v], keys->k0[r]));
            c2[v] = OF(xor)(OF(upper)(p0), OF(xor)(c3[v], keys->k1[r]));
            c1[v] = p1, c3[v] = p0;
        }
    }
    for (int v = 0; v < count; v++) OF(store_words)(random, at + 4 * GROUPS * v, c0[v], c1[v], c2[v], c3[v]);
}

WIDE_INLINE void OF(random_words)(int64_t groups, uint32_t first, const struct philox *p, struct random *random,
                                  int64_t at) {
    enum { GROUPS = LANES / 2 };
    uint32_t low[PHILOX_ROUNDS], high[PHILOX_ROUNDS];
    for (uint32_t r = 0; r < PHILOX_ROUNDS; r++)
        low[r] = (uint32_t)p->seed + r * 0x9e3779b9u, high[r] = (uint32_t)(p->seed >> 32) + r * 0xbb67ae85u;
    uint64_t second = (uint64_t)M1 * p->tensor;                                     /* of the first round */
    uint64_t product = (uint64_t)M0 * ((uint32_t)(second >> 32) ^ p->row ^ low[0]); /* of the second */
    struct OF(keys) keys = {.same = {OF(every_wide)(p->step ^ high[0]), OF(every_wide)((uint32_t)second ^ low[1]),
                                     OF(every_wide)((uint32_t)(product >> 32) ^ high[1]),
                                     OF(every_wide)((uint32_t)product)}};
    for (int r = 2; r < PHILOX_ROUNDS; r++) keys.k0[r] = OF(every_wide)(low[r]), keys.k1[r] = OF(every_wide)(high[r]);
    int64_t i = 0;
    for (; groups - i > GROUPS * (SIDE_BY_SIDE - 1); i += GROUPS * SIDE_BY_SIDE)
        OF(vectors_of_words)(SIDE_BY_SIDE, (int64_t)first + i, &keys, random, at + 4 * i);
    for (; i < groups; i += GROUPS) OF(vectors_of_words)(1, (int64_t)first + i, &keys, random, at + 4 * i);
}
