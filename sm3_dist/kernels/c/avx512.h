/* shaped.h for AVX-512. */

#include <immintrin.h>

enum { COUNT = 2 }; /* vectors at a time */

#define EACH for (int i = 0; i < count; i++)
#define AT (j + 16 * i)
#define AVX512_INLINE static inline __attribute__((always_inline, target(AVX512)))

/* Of 16 elements those that are there; `all` is a constant, for masks are slow to store under. */
AVX512_INLINE __m512 load_there(const float *p, int all, __mmask16 there) {
    return all ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(there, p);
}

AVX512_INLINE void store_there(float *p, __m512 x, int all, __mmask16 there) {
    if (all)
        _mm512_storeu_ps(p, x);
    else
        _mm512_mask_storeu_ps(p, there, x);
}

AVX512_INLINE __m512 load_moment(const void *m, int64_t j, int moment, int all, __mmask16 there) {
    if (moment == FLOAT32) return load_there((const float *)m + j, all, there);
    const uint16_t *p = (const uint16_t *)m + j;
    __m256i bits = all ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(there, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

AVX512_INLINE void store_moment(void *m, int64_t j, __m512 x, int moment, int all, __mmask16 there) {
    if (moment == FLOAT32) {
        store_there((float *)m + j, x, all, there);
        return;
    }
    uint16_t *p = (uint16_t *)m + j;
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpunord_ps_mask(x, x), _mm512_set1_epi32(0x7fc0));
    if (all)
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bits));
    else
        _mm256_mask_storeu_epi16(p, there, _mm512_cvtepi32_epi16(bits));
}

struct stretch_state { /* while a stretch is walked through */
    struct settings s;
    __m512 cover;
    __mmask16 no_cover; /* it is NaN */
    __m512i top, sum[2];
};

/* Step `count` vectors of 16 elements from element j on, of which only the first is there if not all are. One operation
 * after another on all vectors, so that each has not to wait for the one before. */
AVX512_INLINE void step_vectors(int moment, int product, int count, int all, __mmask16 there,
                                const struct stretch *x, int64_t j, struct stretch_state *v) {
    const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    __m512 g[COUNT], nu[COUNT], u[COUNT], mean[COUNT], old[COUNT];
    if (all) prefetch(x->w, FLOAT32, x->g, FLOAT32, x->m, moment, j, 16 * count);
    EACH g[i] = load_there(x->g + AT, all, there);
    if (v->s.unscale != 1) EACH g[i] = _mm512_mul_ps(g[i], _mm512_set1_ps(v->s.unscale));
    EACH old[i] = load_there(x->floors + AT, all, there);
    /* Where a number is NaN, the lesser is taken to be the second operand. */
    if (product)
        EACH old[i] = _mm512_mul_ps(v->cover, old[i]);
    else
        EACH old[i] = _mm512_mask_mov_ps(_mm512_min_ps(v->cover, old[i]), v->no_cover, v->cover);
    EACH nu[i] = _mm512_mul_ps(_mm512_mul_ps(g[i], g[i]), _mm512_set1_ps(v->s.one_minus_beta));
    EACH nu[i] = _mm512_add_ps(nu[i], _mm512_mul_ps(old[i], _mm512_set1_ps(v->s.beta)));
    EACH u[i] = _mm512_add_ps(_mm512_mul_ps(nu[i], _mm512_set1_ps(v->s.correction)), _mm512_set1_ps(v->s.eps));
    EACH u[i] = _mm512_div_ps(one, _mm512_sqrt_ps(u[i]));
    EACH u[i] = _mm512_mul_ps(u[i], g[i]);
    EACH old[i] = _mm512_mul_ps(_mm512_mul_ps(u[i], u[i]), _mm512_set1_ps(v->s.per_one));
    EACH old[i] = _mm512_min_ps(old[i], _mm512_set1_ps(v->s.cap));
    if (!all) old[0] = _mm512_maskz_mov_ps(there, old[0]);
    EACH v->sum[0] = _mm512_add_epi64(v->sum[0], _mm512_cvtps_epi64(_mm512_castps512_ps256(old[i])));
    EACH v->sum[1] = _mm512_add_epi64(v->sum[1], _mm512_cvtps_epi64(_mm512_extractf32x8_ps(old[i], 1)));
    EACH u[i] = _mm512_max_ps(_mm512_set1_ps(-v->s.limit), _mm512_mul_ps(u[i], _mm512_set1_ps(v->s.scale)));
    EACH u[i] = _mm512_mul_ps(_mm512_min_ps(_mm512_set1_ps(v->s.limit), u[i]), _mm512_set1_ps(v->s.fresh));
    if (moment != NONE) {
        const __m512 momentum = _mm512_set1_ps(v->s.momentum);
        EACH mean[i] = _mm512_add_ps(_mm512_mul_ps(load_moment(x->m, AT, moment, all, there), momentum), u[i]);
        EACH store_moment(x->m, AT, mean[i], moment, all, there);
        if (v->s.nesterov)
            EACH u[i] = _mm512_add_ps(u[i], _mm512_mul_ps(mean[i], momentum));
        else
            EACH u[i] = mean[i];
    }
    EACH u[i] = _mm512_mul_ps(u[i], _mm512_set1_ps(v->s.lr));
    EACH {
        __m512 w = load_there(x->w + AT, all, there);
        if (v->s.decay != 1) w = _mm512_mul_ps(w, _mm512_set1_ps(v->s.decay));
        store_there(x->w + AT, _mm512_sub_ps(w, u[i]), all, there);
    }
    EACH nu[i] = _mm512_andnot_ps(sign, nu[i]);
    if (!all) nu[0] = _mm512_maskz_mov_ps(there, nu[0]);
    EACH v->top = _mm512_max_epi32(v->top, _mm512_castps_si512(nu[i]));
    EACH {
        __m512i peak = _mm512_castps_si512(load_there((const float *)(x->peaks + AT), all, there));
        peak = _mm512_max_epi32(peak, _mm512_castps_si512(nu[i]));
        store_there((float *)(x->peaks + AT), _mm512_castsi512_ps(peak), all, there);
    }
}

AVX512_INLINE void stretch_of_avx512(int moment, int product, struct stretch *x) {
    const __m512i zero = _mm512_setzero_si512();
    struct stretch_state v = {.s = *x->settings, .sum = {zero, zero}};
    int64_t end = smaller(x->n, x->block - x->phase);
    for (int64_t j = 0, b = 0; j < x->n; b++) {
        v.cover = _mm512_set1_ps(x->covers[b]);
        v.no_cover = _mm512_cmpunord_ps_mask(v.cover, v.cover);
        v.top = zero;
        for (; end - j >= 16 * COUNT; j += 16 * COUNT) step_vectors(moment, product, COUNT, 1, 0xffff, x, j, &v);
        for (; end - j >= 16; j += 16) step_vectors(moment, product, 1, 1, 0xffff, x, j, &v);
        if (j < end) step_vectors(moment, product, 1, 0, (__mmask16)((1u << (end - j)) - 1), x, j, &v);
        x->tops[b] = larger(x->tops[b], _mm512_reduce_max_epi32(v.top));
        j = end;
        end = smaller(x->n, end + x->block);
    }
    x->squares += (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(v.sum[0], v.sum[1]));
}
