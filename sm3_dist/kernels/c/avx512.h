/* shaped.h for AVX-512.
 *
 * Division and square root take as long as all other arithmetic together, but beside it. What they wait for and what waits
 * for them must therefore be under way at the same time, and the processor does not look far enough ahead. So the loop
 * brings together the first half of the work on some elements, up to the inverse root, and the second on those before. */

#include <immintrin.h>

enum { SIDE = 64, COUNT = SIDE / 16, CHUNK = 1024 }; /* elements of a group, vectors of a group, elements staged at a time */

#define AVX512_INLINE static inline __attribute__((always_inline, target(AVX512)))
#define ALL 0xffff

/* Of 16 elements those that are there. */
AVX512_INLINE __m512 load_floats(const float *p, __mmask16 there) {
    return there == ALL ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(there, p);
}

AVX512_INLINE void store_floats(float *p, __m512 x, __mmask16 there) {
    if (there == ALL)
        _mm512_storeu_ps(p, x);
    else
        _mm512_mask_storeu_ps(p, there, x);
}

AVX512_INLINE __m256i load_halves(const uint16_t *p, __mmask16 there) {
    return there == ALL ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(there, p);
}

AVX512_INLINE void store_halves(uint16_t *p, __m512i x, __mmask16 there) {
    if (there == ALL)
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x));
    else
        _mm512_mask_cvtepi32_storeu_epi16(p, there, x);
}

AVX512_INLINE __m512 from_codes(__m512i c) {
    const __m512i normal = _mm512_set1_epi32(8);
    __m512i length = _mm512_abs_epi32(c);
    __mmask16 is_small = _mm512_cmplt_epi32_mask(length, normal);
    __m512i bits = _mm512_add_epi32(length, _mm512_set1_epi32(CODE_BIAS));
    /* c * 2^-15 for c < 8 as 2^-12 * (1 + c / 8) - 2^-12 */
    bits = _mm512_slli_epi32(_mm512_mask_add_epi32(bits, is_small, bits, normal), DROPPED);
    __m512 value = _mm512_castsi512_ps(bits);
    value = _mm512_mask_sub_ps(value, is_small, value, _mm512_set1_ps(NORMAL));
    bits = _mm512_or_epi32(_mm512_castps_si512(value), _mm512_and_epi32(c, _mm512_set1_epi32(INT32_MIN)));
    __mmask16 is_nan = _mm512_cmpeq_epi32_mask(c, _mm512_set1_epi32(-128));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, is_nan, _mm512_set1_epi32(0x7fc00000)));
}

AVX512_INLINE __m512i to_codes(__m512 x, __m512i noise) {
    const __m512 normal = _mm512_set1_ps(NORMAL);
    __m512 length = _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x);
    __m512i fixed = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_min_ps(length, normal), _mm512_set1_ps(0x1p31f)));
    __m512i code = _mm512_sub_epi32(_mm512_castps_si512(length), _mm512_set1_epi32(CODE_BIAS << DROPPED));
    __mmask16 is_small = _mm512_cmp_ps_mask(length, normal, _CMP_LT_OQ);
    code = _mm512_mask_slli_epi32(code, is_small, fixed, 4);
    code = _mm512_add_epi32(code, _mm512_slli_epi32(noise, DROPPED - 16));
    code = _mm512_min_epi32(_mm512_srai_epi32(code, DROPPED), _mm512_set1_epi32(127));
    code = _mm512_mask_sub_epi32(code, _mm512_movepi32_mask(_mm512_castps_si512(x)), _mm512_setzero_si512(), code);
    return _mm512_mask_mov_epi32(code, _mm512_cmpunord_ps_mask(x, x), _mm512_set1_epi32(-128));
}

AVX512_INLINE __m512 load_of(const void *p, int64_t j, int type, __mmask16 there) {
    if (type == FLOAT32) return load_floats((const float *)p + j, there);
    if (type == CODE) {
        const int8_t *codes = (const int8_t *)p + j;
        __m128i narrow = there == ALL ? _mm_loadu_si128((const __m128i *)codes) : _mm_maskz_loadu_epi8(there, codes);
        return from_codes(_mm512_cvtepi8_epi32(narrow));
    }
    __m256i halves = load_halves((const uint16_t *)p + j, there);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* `noise`: 16 bits by element; null: round to the nearest. */
AVX512_INLINE void store_of(void *p, int64_t j, __m512 x, const uint16_t *noise, int type, __mmask16 there) {
    if (type == FLOAT32) {
        store_floats((float *)p + j, x, there);
        return;
    }
    __m512i bits = _mm512_castps_si512(x), random = _mm512_setzero_si512();
    if (noise) random = _mm512_cvtepu16_epi32(load_halves(noise + j, there));
    if (type == CODE) {
        __m512i codes = to_codes(x, random);
        if (there == ALL)
            _mm_storeu_si128((__m128i *)((int8_t *)p + j), _mm512_cvtepi32_epi8(codes));
        else
            _mm512_mask_cvtepi32_storeu_epi8((int8_t *)p + j, there, codes);
        return;
    }
    if (!noise) {
        random = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        random = _mm512_add_epi32(random, _mm512_set1_epi32(0x7fff));
    }
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, random), 16);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpunord_ps_mask(x, x), _mm512_set1_epi32(0x7fc0));
    store_halves((uint16_t *)p + j, bits, there);
}

struct line { /* elements of a row, and what is the same for all of them */
    struct settings s;
    int weight, grad, moment; /* types, constants wherever this is inlined */
    int is_unscaled, is_scaled, decays; /* gradients, updates, weights */
    void *w, *m;
    const void *g;
    const uint16_t *noise[OPERANDS];
    const float *floors;
    int32_t *peaks, *nus; /* nus: null, or where to leave the bits of nu */
    __m512i sum[2];
};

AVX512_INLINE __m512 grads_of(const struct line *x, int64_t j, __mmask16 there) {
    __m512 g = load_of(x->g, j, x->grad, there);
    return x->is_unscaled ? _mm512_mul_ps(g, _mm512_set1_ps(x->s.unscale)) : g;
}

/* The first half: raises peaks and `top`, and returns the inverse root. */
AVX512_INLINE __m512 inverse_root(const struct line *x, int64_t j, __m512 cover, int blocked, __mmask16 there,
                                  __m512i *top) {
    __m512 g = grads_of(x, j, there), floor = load_floats(x->floors + j, there);
    if (blocked) floor = _mm512_mul_ps(cover, floor);
    __m512 nu = _mm512_mul_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(x->s.one_minus_beta));
    nu = _mm512_add_ps(nu, _mm512_mul_ps(floor, _mm512_set1_ps(x->s.beta)));
    __m512i bits = _mm512_and_epi32(_mm512_castps_si512(nu), _mm512_set1_epi32(INT32_MAX));
    __m512i peak = _mm512_castps_si512(load_floats((const float *)(x->peaks + j), there));
    store_floats((float *)(x->peaks + j), _mm512_castsi512_ps(_mm512_max_epi32(peak, bits)), there);
    if (blocked)
        *top = _mm512_max_epi32(*top, bits);
    else
        store_floats((float *)(x->nus + j), _mm512_castsi512_ps(bits), there);
    nu = _mm512_add_ps(_mm512_mul_ps(nu, _mm512_set1_ps(x->s.correction)), _mm512_set1_ps(x->s.eps));
    return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(nu));
}

/* The second half. */
AVX512_INLINE void update_by(struct line *x, int64_t j, __m512 root, __mmask16 there) {
    __m512 u = _mm512_mul_ps(root, grads_of(x, j, there));
    if (x->is_scaled) {
        __m512 square = _mm512_mul_ps(_mm512_mul_ps(u, u), _mm512_set1_ps(x->s.per_one));
        square = _mm512_min_ps(square, _mm512_set1_ps(x->s.cap)); /* of NaN and the cap, the second */
        if (there != ALL) square = _mm512_maskz_mov_ps(there, square);
        x->sum[0] = _mm512_add_epi64(x->sum[0], _mm512_cvtps_epi64(_mm512_castps512_ps256(square)));
        x->sum[1] = _mm512_add_epi64(x->sum[1], _mm512_cvtps_epi64(_mm512_extractf32x8_ps(square, 1)));
        u = _mm512_max_ps(_mm512_set1_ps(-x->s.limit), _mm512_mul_ps(u, _mm512_set1_ps(x->s.scale)));
        u = _mm512_min_ps(_mm512_set1_ps(x->s.limit), u);
    }
    u = _mm512_mul_ps(u, _mm512_set1_ps(x->s.fresh));
    if (x->moment != NONE) {
        const __m512 momentum = _mm512_set1_ps(x->s.momentum);
        __m512 mean = _mm512_add_ps(_mm512_mul_ps(load_of(x->m, j, x->moment, there), momentum), u);
        store_of(x->m, j, mean, x->noise[MOMENT], x->moment, there);
        u = x->s.nesterov ? _mm512_add_ps(u, _mm512_mul_ps(mean, momentum)) : mean;
    }
    __m512 w = load_of(x->w, j, x->weight, there);
    if (x->decays) w = _mm512_mul_ps(w, _mm512_set1_ps(x->s.decay));
    w = _mm512_sub_ps(w, _mm512_mul_ps(u, _mm512_set1_ps(x->s.lr)));
    store_of(x->w, j, w, x->noise[WEIGHT], x->weight, there);
}

/* n elements; if they are `blocked`, a multiple of SIDE, with a cover and a maximum for each group, else floors are whole. */
AVX512_INLINE void step_line(struct line *x, int64_t n, int blocked, const float *covers, int32_t *tops) {
    const __m512i zero = _mm512_setzero_si512();
    __m512 roots[COUNT], cover = _mm512_setzero_ps();
    __m512i top = zero;
    int64_t j = 0;
    for (; n - j >= SIDE; j += SIDE) {
        __m512 next[COUNT];
        if (blocked) cover = _mm512_set1_ps(*covers++);
        top = zero;
        for (int i = 0; i < COUNT; i++) {
            next[i] = inverse_root(x, j + 16 * i, cover, blocked, ALL, &top);
            if (j) update_by(x, j - SIDE + 16 * i, roots[i], ALL);
        }
        for (int i = 0; i < COUNT; i++) roots[i] = next[i];
        if (blocked) {
            *tops = larger(*tops, _mm512_reduce_max_epi32(top));
            tops++;
        }
    }
    for (int i = 0; j && i < COUNT; i++) update_by(x, j - SIDE + 16 * i, roots[i], ALL);
    for (; n - j >= 16; j += 16) update_by(x, j, inverse_root(x, j, cover, 0, ALL, &top), ALL);
    if (j == n) return;
    __mmask16 there = (__mmask16)((1u << (n - j)) - 1);
    update_by(x, j, inverse_root(x, j, cover, 0, there, &top), there);
}

/* The first of the lanes, as many as there are left. */
AVX512_INLINE __mmask16 lanes(int64_t left) { return left >= 16 ? ALL : (__mmask16)((1u << left) - 1); }

/* The floors of each element with the covers, for blocks of any length; up to 15 more are written. */
AVX512_INLINE void stage(const struct stretch *x, float *floors) {
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        const __m512 cover = _mm512_set1_ps(x->covers[b]);
        const __mmask16 is_nan = _mm512_cmpunord_ps_mask(cover, cover);
        for (int64_t i = j; i < end; i += 16) {
            __m512 floor = _mm512_maskz_loadu_ps(lanes(end - i), x->floors + i);
            /* Where a number is NaN, the lesser is taken to be the second operand. */
            floor = x->product ? _mm512_mul_ps(cover, floor)
                               : _mm512_mask_mov_ps(_mm512_min_ps(cover, floor), is_nan, cover);
            _mm512_storeu_ps(floors + i, floor);
        }
        j = end;
        end = smaller(x->n, end + x->block);
    }
}

/* Raise the maxima of blocks to the bits of nu. */
AVX512_INLINE void raise_tops(const struct stretch *x, const int32_t *nus) {
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        __m512i top = _mm512_setzero_si512();
        for (int64_t i = j; i < end; i += 16)
            top = _mm512_max_epi32(top, _mm512_maskz_loadu_epi32(lanes(end - i), nus + i));
        x->tops[b] = larger(x->tops[b], _mm512_reduce_max_epi32(top));
        j = end;
        end = smaller(x->n, end + x->block);
    }
}

AVX512_INLINE void stretch_of_avx512(int weight, int grad, int moment, struct stretch *x) {
    const __m512i zero = _mm512_setzero_si512();
    struct line line = {.s = *x->settings, .weight = weight, .grad = grad, .moment = moment, .sum = {zero, zero}};
    float floors[CHUNK + 16];
    int32_t nus[CHUNK];
    line.is_unscaled = line.s.unscale != 1, line.is_scaled = line.s.per_one != 0, line.decays = line.s.decay != 1;
    int is_blocked = x->product && x->block == SIDE && x->phase == 0 && x->n % SIDE == 0;
    for (int64_t rest = x->n; rest > 0; rest -= x->n) {
        x->n = is_blocked ? rest : smaller(rest, CHUNK);
        line.w = x->w, line.g = x->g, line.m = x->m;
        for (int o = 0; o < OPERANDS; o++) line.noise[o] = x->noise[o];
        line.floors = is_blocked ? x->floors : floors;
        line.peaks = x->peaks, line.nus = nus;
        if (is_blocked) {
            step_line(&line, x->n, 1, x->covers, x->tops);
        } else {
            stage(x, floors);
            step_line(&line, x->n, 0, 0, 0);
            raise_tops(x, nus);
        }
        advance(x, size_of(weight), size_of(grad), size_of(moment));
    }
    x->squares += (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(line.sum[0], line.sum[1]));
}

/* random_words(): eight counters in a vector, each in 64 bits, of which the upper half is not looked at; and some vectors
 * side by side, so that none has to wait for its own round before. */
enum { VECTORS = 4 };

AVX512_INLINE void random_words_avx512(int64_t groups, uint32_t first, const struct philox *p, uint32_t *words) {
    const __m512i m0 = _mm512_set1_epi64(0xd2511f53), m1 = _mm512_set1_epi64(0xcd9e8d57);
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i each = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t i = 0; i < groups; i += 8 * VECTORS) {
        __m512i c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            c0[v] = _mm512_add_epi64(_mm512_set1_epi64((int64_t)first + i + 8 * v), each);
            c1[v] = _mm512_set1_epi64(p->row);
            c2[v] = _mm512_set1_epi64(p->tensor);
            c3[v] = _mm512_set1_epi64(p->step);
        }
        __m512i k0 = _mm512_set1_epi64((uint32_t)p->seed), k1 = _mm512_set1_epi64((uint32_t)(p->seed >> 32));
        for (int round = 0; round < 10; round++) {
            for (int v = 0; v < VECTORS; v++) {
                __m512i p0 = _mm512_mul_epu32(c0[v], m0), p1 = _mm512_mul_epu32(c2[v], m1);
                c0[v] = _mm512_xor_epi64(_mm512_xor_epi64(_mm512_srli_epi64(p1, 32), c1[v]), k0);
                c2[v] = _mm512_xor_epi64(_mm512_xor_epi64(_mm512_srli_epi64(p0, 32), c3[v]), k1);
                c1[v] = p1, c3[v] = p0;
            }
            k0 = _mm512_add_epi32(k0, _mm512_set1_epi64(0x9e3779b9));
            k1 = _mm512_add_epi32(k1, _mm512_set1_epi64(0xbb67ae85));
        }
        for (int v = 0; v < VECTORS; v++) {
            __m512i upper = _mm512_mask_blend_epi32(0xaaaa, c0[v], _mm512_slli_epi64(c1[v], 32));
            __m512i lower = _mm512_mask_blend_epi32(0xaaaa, c2[v], _mm512_slli_epi64(c3[v], 32));
            uint32_t *to = words + 4 * i + 32 * v;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(upper, low, lower));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(upper, high, lower));
        }
    }
}
