/* random_words() for one width. Counters are in 64 bits each, of which the upper half is not looked at; and some vectors go
 * side by side, so that none has to wait for its own round before. In the first two rounds half of the words are the same
 * for all groups. */

WIDE_INLINE void OF(random_words)(int64_t groups, uint32_t first, const struct philox *p, struct random *random) {
    enum { GROUPS = LANES / 2 };
    const uint64_t m0 = 0xd2511f53, m1 = 0xcd9e8d57;
    uint32_t low[PHILOX_ROUNDS], high[PHILOX_ROUNDS];
    for (uint32_t r = 0; r < PHILOX_ROUNDS; r++)
        low[r] = (uint32_t)p->seed + r * 0x9e3779b9u, high[r] = (uint32_t)(p->seed >> 32) + r * 0xbb67ae85u;
    uint64_t second = m1 * p->tensor;                                   /* of the first round */
    uint64_t product = m0 * ((uint32_t)(second >> 32) ^ p->row ^ low[0]); /* of the second */
    const OF(ints) f0 = OF(every_wide)(m0), f1 = OF(every_wide)(m1), same3 = OF(every_wide)((uint32_t)product);
    const OF(ints) same2 = OF(every_wide)((uint32_t)(product >> 32) ^ high[1]);
    const OF(ints) same1 = OF(every_wide)((uint32_t)second ^ low[1]), same0 = OF(every_wide)(p->step ^ high[0]);
    OF(ints) k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];
    for (int r = 2; r < PHILOX_ROUNDS; r++) k0[r] = OF(every_wide)(low[r]), k1[r] = OF(every_wide)(high[r]);
    for (int64_t i = 0; i < groups; i += GROUPS * SIDE_BY_SIDE) {
        OF(ints) c0[SIDE_BY_SIDE], c1[SIDE_BY_SIDE], c2[SIDE_BY_SIDE], c3[SIDE_BY_SIDE];
        for (int v = 0; v < SIDE_BY_SIDE; v++) {
            OF(ints) p0 = OF(product)(OF(groups)((int64_t)first + i + GROUPS * v), f0);
            c1[v] = OF(product)(OF(xor)(OF(upper)(p0), same0), f1);
            c0[v] = OF(xor)(OF(upper)(c1[v]), same1);
            c2[v] = OF(xor)(p0, same2);
            c3[v] = same3;
        }
#pragma GCC unroll 8
        for (int r = 2; r < PHILOX_ROUNDS; r++) {
            for (int v = 0; v < SIDE_BY_SIDE; v++) {
                OF(ints) p0 = OF(product)(c0[v], f0), p1 = OF(product)(c2[v], f1);
                c0[v] = OF(xor)(OF(upper)(p1), OF(xor)(c1[v], k0[r]));
                c2[v] = OF(xor)(OF(upper)(p0), OF(xor)(c3[v], k1[r]));
                c1[v] = p1, c3[v] = p0;
            }
        }
        for (int v = 0; v < SIDE_BY_SIDE; v++)
            OF(store_words)(random, 4 * (i + GROUPS * v), c0[v], c1[v], c2[v], c3[v]);
    }
}
