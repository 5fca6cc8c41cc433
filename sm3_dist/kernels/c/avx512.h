/* What lines.h is made of, for AVX-512. */

#define OF(name) name##_avx512
#define TAKES_TURNS 1 /* whether rows of float32 do: it is memory that takes longest */
#define WIDE_INLINE static inline __attribute__((always_inline, target(AVX512)))
#define ALL 0xffff

typedef __m512 floats_avx512;
typedef __m512i ints_avx512;
typedef __mmask16 lanes_avx512; /* those of a vector that are there */

#define EACH(type, name, operation)                                                                                  \
    WIDE_INLINE type name##_avx512(type x, type y) { return operation(x, y); }
EACH(__m512, mul, _mm512_mul_ps)
EACH(__m512, add, _mm512_add_ps)
EACH(__m512, sub, _mm512_sub_ps)
EACH(__m512, div, _mm512_div_ps)
EACH(__m512, min, _mm512_min_ps)
EACH(__m512, max, _mm512_max_ps)
EACH(__m512i, plus, _mm512_add_epi32)
EACH(__m512i, larger, _mm512_max_epu32)
EACH(__m512i, and, _mm512_and_epi32)
EACH(__m512i, xor, _mm512_xor_epi64)
EACH(__m512i, product, _mm512_mul_epu32)

WIDE_INLINE __m512 sqrt_avx512(__m512 x) { return _mm512_sqrt_ps(x); }
WIDE_INLINE __m512i bits_avx512(__m512 x) { return _mm512_castps_si512(x); }
WIDE_INLINE __m512 real_avx512(__m512i x) { return _mm512_castsi512_ps(x); }
WIDE_INLINE __m512i upper_avx512(__m512i x) { return _mm512_srli_epi64(x, 32); }

WIDE_INLINE __m512 every_avx512(float x) { return _mm512_set1_ps(x); }
WIDE_INLINE __m512i every_int_avx512(int32_t x) { return _mm512_set1_epi32(x); }
WIDE_INLINE __m512i every_wide_avx512(int64_t x) { return _mm512_set1_epi64(x); }

/* Constants, of which compilers do not know that they are: they would put them together anew wherever one is used, which takes
 * more than to have them from memory. */
WIDE_INLINE __m512 hidden_avx512(float x) {
    __m512 all = _mm512_set1_ps(x);
    __asm__("" : "+v"(all));
    return all;
}
WIDE_INLINE __m512i hidden_int_avx512(int32_t x) { return _mm512_castps_si512(hidden_avx512(float_of(x))); }
WIDE_INLINE __m512i hidden_halves_avx512(int16_t x) { return hidden_int_avx512((int32_t)((uint16_t)x * 0x10001u)); }
WIDE_INLINE __m128i hidden_codes_avx512(int8_t x) {
    return _mm512_castsi512_si128(hidden_int_avx512((int32_t)((uint8_t)x * 0x1010101u)));
}

/* Leave x, computed here: compilers would bring it to where it is used. */
WIDE_INLINE void put_avx512(__m512 *to, __m512 x) {
    __asm__ volatile("" : "+v"(x));
    *to = x;
}

/* y where the mask says so. */
WIDE_INLINE __m512 choose_avx512(__m512 x, __m512 y, __m512 is_y) {
    return _mm512_mask_mov_ps(x, _mm512_movepi32_mask(_mm512_castps_si512(is_y)), y);
}

/* The lesser one; NaN if either is: where a number is NaN, the lesser is taken to be the second operand. */
WIDE_INLINE __m512 lesser_avx512(__m512 x, __m512 y) {
    return _mm512_mask_mov_ps(_mm512_min_ps(x, y), _mm512_cmpunord_ps_mask(x, x), x);
}

WIDE_INLINE __m512i raised_avx512(__m512i top, __m512i x) { return _mm512_max_epu32(top, x); }
WIDE_INLINE int32_t largest_avx512(__m512i x) { return (int32_t)_mm512_reduce_max_epu32(x) & INT32_MAX; }

/* The first lanes, as many as there are elements left. */
WIDE_INLINE __mmask16 lanes_of_avx512(int64_t left) { return left >= 16 ? ALL : (__mmask16)((1u << left) - 1); }

WIDE_INLINE __m512 load_floats_avx512(const float *p, __mmask16 there) {
    return there == ALL ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(there, p);
}

WIDE_INLINE void store_floats_avx512(float *p, __m512 x, __mmask16 there) {
    if (there == ALL)
        _mm512_storeu_ps(p, x);
    else
        _mm512_mask_storeu_ps(p, there, x);
}

/* As load_floats(), where it is not known when this is compiled whether all are there. */
WIDE_INLINE __m512 load_some_avx512(const float *p, __mmask16 there) { return _mm512_maskz_loadu_ps(there, p); }

WIDE_INLINE __m256i some_halves_avx512(const uint16_t *p, __mmask16 there) {
    return there == ALL ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(there, p);
}

/* 16 bits of each lane, as its lower or its upper half. */
WIDE_INLINE __m512i load_lower_avx512(const uint16_t *p, __mmask16 there) {
    return _mm512_cvtepu16_epi32(some_halves_avx512(p, there));
}

WIDE_INLINE __m512i upper_halves_avx512(__m256i halves) {
    const __m512i order = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi256_si512(halves));
}

WIDE_INLINE __m512i load_upper_avx512(const uint16_t *p, __mmask16 there) {
    return upper_halves_avx512(some_halves_avx512(p, there));
}

/* With what carries over to the upper half if it is to be rounded so. */
WIDE_INLINE __m512i to_even_avx512(__m512i bits) {
    __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(bits, is_odd, bits, _mm512_set1_epi32(1));
}

/* The upper halves, or that of a NaN where x is one. */
WIDE_INLINE void store_upper_avx512(uint16_t *p, __m512i bits, __m512 x, __mmask16 there, int nan) {
    const __m512i first = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0,
                                            0, 0, 0, 0, 0, 0, 0); /* every second half */
    __m256i upper = _mm512_castsi512_si256(_mm512_permutexvar_epi16(first, bits));
    if (nan) upper = _mm256_mask_mov_epi16(upper, _mm512_cmpunord_ps_mask(x, x), _mm256_set1_epi16(0x7fc0));
    if (there == ALL)
        _mm256_storeu_si256((__m256i *)p, upper);
    else
        _mm256_mask_storeu_epi16(p, there, upper);
}

WIDE_INLINE int any_nan_avx512(__m512 x, __m512 y) {
    return __builtin_expect(_mm512_cmpunord_ps_mask(x, y) != 0, 0);
}

/* Store rounded to the nearest, by the instruction that does just that; but of numbers that are too small to be normal it makes
 * 0, and keeps something of a NaN. Returns whether there were none of these, and all were stored. */
WIDE_INLINE int convert_avx512(uint16_t *p, __m512 x, __mmask16 there) {
#ifdef CONVERTS
    enum { QUIET_NAN = 0x01, DENORMAL = 0x20, SIGNALLING_NAN = 0x80 };
    __m256i upper;
    if (there != ALL || _mm512_fpclass_ps_mask(x, QUIET_NAN | DENORMAL | SIGNALLING_NAN)) return 0;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(upper) : "v"(x)); /* (as an intrinsic it would take functions of another target) */
    _mm256_storeu_si256((__m256i *)p, upper);
    return 1;
#else
    (void)p, (void)x, (void)there;
    return 0;
#endif
}

/* Codes have no more bits than bfloat16, so that is what they become first, in vectors of half the size. */
WIDE_INLINE __m512i decoded_avx512(__m256i codes) {
    /* The values below 16 * 2^-10. */
    const __m256i small = _mm256_setr_epi16(0, 0x3a80, 0x3b00, 0x3b40, 0x3b80, 0x3ba0, 0x3bc0, 0x3be0, 0x3c00, 0x3c10, 0x3c20,
                                            0x3c30, 0x3c40, 0x3c50, 0x3c60, 0x3c70);
    __m512i c = _mm512_cvtepi8_epi16(codes), length = _mm512_abs_epi16(c);
    __m512i bits = _mm512_slli_epi16(_mm512_add_epi16(length, hidden_halves_avx512(CODE_BIAS)), DROPPED - 16);
    __mmask32 is_small = _mm512_cmplt_epi16_mask(length, hidden_halves_avx512(16));
    bits = _mm512_mask_permutexvar_epi16(bits, is_small, length, _mm512_castsi256_si512(small));
    bits = _mm512_or_si512(bits, _mm512_and_si512(c, hidden_halves_avx512(INT16_MIN)));
    __mmask32 is_nan = _mm512_cmpeq_epi16_mask(c, hidden_halves_avx512(-128));
    return _mm512_mask_mov_epi16(bits, is_nan, hidden_halves_avx512(0x7fc0));
}

WIDE_INLINE __m512 load_codes_avx512(const int8_t *p, __mmask16 there) {
    __m128i codes = there == ALL ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8(there, p);
    return _mm512_castsi512_ps(upper_halves_avx512(_mm512_castsi512_si256(decoded_avx512(_mm256_castsi128_si256(codes)))));
}

/* Two vectors of them. */
WIDE_INLINE void load_more_codes_avx512(const int8_t *p, __m512 *first, __m512 *second) {
    const __m512i order = _mm512_slli_epi32(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16);
    __m512i halves = decoded_avx512(_mm256_loadu_si256((const __m256i *)p));
    *first = _mm512_castsi512_ps(upper_halves_avx512(_mm512_castsi512_si256(halves)));
    *second = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, halves));
}

/* With 16 bits after the point. As bits of a float a code is no larger than by arithmetic where arithmetic holds. */
WIDE_INLINE void store_codes_avx512(int8_t *p, __m512 x, __m512i noise, __mmask16 there, int nan) {
    enum { LEAST_LENGTH = 0x0a, CUT = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC };
    __m512 length = _mm512_range_ps(x, hidden_avx512(LONGEST_CODE), LEAST_LENGTH);
    __m512i code = _mm512_castps_si512(_mm512_add_round_ps(length, _mm512_max_ps(length, hidden_avx512(NORMAL)), CUT));
    code = _mm512_srli_epi32(_mm512_add_epi32(code, _mm512_slli_epi32(noise, DROPPED - 16)), DROPPED);
    __m128i codes = _mm_sub_epi8(_mm512_cvtepi32_epi8(code), hidden_codes_avx512((int8_t)(CODE_BIAS + 16)));
    codes = _mm_mask_sub_epi8(codes, _mm512_movepi32_mask(_mm512_castps_si512(x)), _mm_setzero_si128(), codes);
    if (nan) codes = _mm_mask_mov_epi8(codes, _mm512_cmpunord_ps_mask(x, x), _mm_set1_epi8(-128));
    if (there == ALL)
        _mm_storeu_si128((__m128i *)p, codes);
    else
        _mm_mask_storeu_epi8(p, there, codes);
}

/* With the carrier in the sum each time. */
WIDE_INLINE __m512i add_grains_avx512(__m512i sum, __m512 square, __m512 carrier, __mmask16 there) {
    if (there != ALL) square = _mm512_maskz_mov_ps(there, square);
    __m512 carried = _mm512_add_round_ps(square, carrier, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    return _mm512_add_epi32(sum, _mm512_castps_si512(carried));
}

/* The sum of so many times 16 lanes, without the carrier. */
WIDE_INLINE uint64_t total_avx512(__m512i sum, float carrier, int64_t times) {
    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32((int32_t)((uint32_t)bits_of(carrier) * (uint32_t)times)));
    __m512i lower = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(sum));
    __m512i upper = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(sum, 1));
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(lower, upper));
}

/* For random_words(): how many go side by side, their groups, and how words are left for groups in this order. */
#define SIDE_BY_SIDE 4

WIDE_INLINE __m512i groups_avx512(int64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Sixteen words, and turned. */
WIDE_INLINE void store_sixteen_avx512(struct random *to, int64_t at, __m512i words) {
    _mm512_storeu_si512(to->words + at, words);
    _mm512_storeu_si512(to->turned + at, _mm512_rol_epi32(words, 16));
}

WIDE_INLINE void store_words_avx512(struct random *to, int64_t at, __m512i c0, __m512i c1, __m512i c2, __m512i c3) {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    __m512i upper = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
    __m512i lower = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
    store_sixteen_avx512(to, at, _mm512_permutex2var_epi64(upper, low, lower));
    store_sixteen_avx512(to, at + 16, _mm512_permutex2var_epi64(upper, high, lower));
}
