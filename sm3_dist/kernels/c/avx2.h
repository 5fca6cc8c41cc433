/* What lines.h is made of, for AVX2: 16 lanes too, as two vectors. Few of the many constants of the loop stay in the 16
 * registers, and memory is read twice per cycle at best: so a constant is read once for both. */

#define OF(name) name##_avx2
#define TAKES_TURNS 0 /* whether rows of float32 do: instructions are what takes longest here, and it would take more of them */
#define WIDE_INLINE static inline __attribute__((always_inline, target("avx2")))
#define ALL 16

typedef struct {
    __m256 a, b;
} floats_avx2;
typedef struct {
    __m256i a, b;
} ints_avx2;
typedef int lanes_avx2; /* how many there are, the first ones */

#define BOTH(type, name, operation)                                                                                  \
    WIDE_INLINE type name##_avx2(type x, type y) { return (type){operation(x.a, y.a), operation(x.b, y.b)}; }
BOTH(floats_avx2, mul, _mm256_mul_ps)
BOTH(floats_avx2, add, _mm256_add_ps)
BOTH(floats_avx2, sub, _mm256_sub_ps)
BOTH(floats_avx2, div, _mm256_div_ps)
BOTH(floats_avx2, min, _mm256_min_ps)
BOTH(floats_avx2, max, _mm256_max_ps)
BOTH(ints_avx2, plus, _mm256_add_epi32)
BOTH(ints_avx2, larger, _mm256_max_epu32)
BOTH(ints_avx2, and, _mm256_and_si256)
BOTH(ints_avx2, xor, _mm256_xor_si256)
BOTH(ints_avx2, product, _mm256_mul_epu32)

WIDE_INLINE floats_avx2 sqrt_avx2(floats_avx2 x) { return (floats_avx2){_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
WIDE_INLINE ints_avx2 bits_avx2(floats_avx2 x) {
    return (ints_avx2){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
WIDE_INLINE floats_avx2 real_avx2(ints_avx2 x) {
    return (floats_avx2){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
WIDE_INLINE ints_avx2 shift_right_avx2(ints_avx2 x, int n) {
    return (ints_avx2){_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
}
WIDE_INLINE ints_avx2 upper_avx2(ints_avx2 x) {
    return (ints_avx2){_mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32)};
}

WIDE_INLINE floats_avx2 every_avx2(float x) { return (floats_avx2){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
WIDE_INLINE ints_avx2 every_int_avx2(int32_t x) { return (ints_avx2){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
WIDE_INLINE ints_avx2 every_wide_avx2(int64_t x) { return (ints_avx2){_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)}; }

/* Leave x, computed here: compilers would bring it to where it is used. */
WIDE_INLINE void put_avx2(floats_avx2 *to, floats_avx2 x) {
    *to = x;
    __asm__ volatile("" : "+m"(*to));
}

WIDE_INLINE __m256i blend_avx2(__m256i x, __m256i y, __m256 is_y) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), is_y));
}

/* y where the mask says so. */
WIDE_INLINE floats_avx2 choose_avx2(floats_avx2 x, floats_avx2 y, floats_avx2 is_y) {
    return (floats_avx2){_mm256_blendv_ps(x.a, y.a, is_y.a), _mm256_blendv_ps(x.b, y.b, is_y.b)};
}

WIDE_INLINE __m256i where_nan_avx2(__m256 x, __m256i bits, __m256i other) {
    return blend_avx2(bits, other, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

/* `other` where x is NaN, else `bits`. */
WIDE_INLINE ints_avx2 unless_nan_avx2(floats_avx2 x, ints_avx2 bits, int32_t other) {
    const __m256i others = _mm256_set1_epi32(other);
    return (ints_avx2){where_nan_avx2(x.a, bits.a, others), where_nan_avx2(x.b, bits.b, others)};
}

/* The lesser one; NaN if either is: where a number is NaN, the lesser is taken to be the second operand. */
WIDE_INLINE floats_avx2 lesser_avx2(floats_avx2 x, floats_avx2 y) {
    __m256 is_nan = _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q); /* (x is the same in all lanes) */
    floats_avx2 least = min_avx2(x, y);
    return (floats_avx2){_mm256_blendv_ps(least.a, x.a, is_nan), _mm256_blendv_ps(least.b, x.b, is_nan)};
}

/* A maximum of each lane, or of two. */
WIDE_INLINE ints_avx2 raised_avx2(ints_avx2 top, ints_avx2 x) {
    return (ints_avx2){_mm256_max_epu32(top.a, _mm256_max_epu32(x.a, x.b)), top.b};
}

WIDE_INLINE int32_t largest_avx2(ints_avx2 x) {
    __m256i y = _mm256_max_epu32(x.a, x.b);
    __m128i z = _mm_max_epu32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epu32(z, _mm_unpackhi_epi64(z, z));
    z = _mm_max_epu32(z, _mm_shuffle_epi32(z, 1));
    return _mm_cvtsi128_si32(z) & INT32_MAX;
}

/* The first lanes, as many as there are elements left. */
WIDE_INLINE int lanes_of_avx2(int64_t left) { return left >= ALL ? ALL : (int)left; }

WIDE_INLINE ints_avx2 mask_avx2(int there) {
    const __m256i n = _mm256_set1_epi32(there);
    return (ints_avx2){_mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
                       _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

WIDE_INLINE floats_avx2 load_some_avx2(const float *p, int there) {
    ints_avx2 mask = mask_avx2(there);
    return (floats_avx2){_mm256_maskload_ps(p, mask.a), _mm256_maskload_ps(p + 8, mask.b)};
}

WIDE_INLINE floats_avx2 load_floats_avx2(const float *p, int there) {
    if (there != ALL) return load_some_avx2(p, there);
    return (floats_avx2){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

WIDE_INLINE void store_floats_avx2(float *p, floats_avx2 x, int there) {
    if (there == ALL) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    } else {
        ints_avx2 mask = mask_avx2(there);
        _mm256_maskstore_ps(p, mask.a, x.a);
        _mm256_maskstore_ps(p + 8, mask.b, x.b);
    }
}

/* 16 bits of each lane, as its upper or its lower half. */
WIDE_INLINE __m256i spread_avx2(const uint16_t *p, int is_upper) {
    const __m256i lower = _mm256_setr_epi8(0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, /**/ 8, 9, -1, -1, 10, 11,
                                           -1, -1, 12, 13, -1, -1, 14, 15, -1, -1);
    const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, /**/ -1, -1, 8, 9, -1, -1,
                                           10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_shuffle_epi8(twice, is_upper ? upper : lower);
}

WIDE_INLINE ints_avx2 load_halves_avx2(const uint16_t *p, int there, int is_upper) {
    uint16_t some[ALL] = {0};
    if (there != ALL) p = memcpy(some, p, (size_t)there * sizeof *p);
    return (ints_avx2){spread_avx2(p, is_upper), spread_avx2(p + 8, is_upper)};
}

WIDE_INLINE ints_avx2 load_lower_avx2(const uint16_t *p, int there) { return load_halves_avx2(p, there, 0); }
WIDE_INLINE ints_avx2 load_upper_avx2(const uint16_t *p, int there) { return load_halves_avx2(p, there, 1); }

/* With what carries over to the upper half if it is to be rounded so. */
WIDE_INLINE ints_avx2 to_even_avx2(ints_avx2 bits) {
    ints_avx2 last = and_avx2(shift_right_avx2(bits, 16), every_int_avx2(1));
    return plus_avx2(bits, plus_avx2(last, every_int_avx2(0x7fff)));
}

/* The upper halves, or that of a NaN where x is one. */
WIDE_INLINE void store_upper_avx2(uint16_t *p, ints_avx2 bits, floats_avx2 x, int there, int nan) {
    ints_avx2 upper = shift_right_avx2(bits, 16);
    if (nan) upper = unless_nan_avx2(x, upper, 0x7fc0);
    __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper.a, upper.b), 0xd8);
    if (there == ALL)
        _mm256_storeu_si256((__m256i *)p, narrow);
    else
        memcpy(p, &narrow, (size_t)there * sizeof *p);
}

WIDE_INLINE int any_nan_avx2(floats_avx2 x, floats_avx2 y) {
    __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), b = _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q);
    return __builtin_expect(_mm256_movemask_ps(_mm256_or_ps(a, b)) != 0, 0);
}

WIDE_INLINE int convert_avx2(uint16_t *p, floats_avx2 x, int there) {
    (void)p, (void)x, (void)there;
    return 0; /* there is no such instruction */
}

/* Codes have no more bits than bfloat16, so that is what they become first. */
WIDE_INLINE floats_avx2 load_codes_avx2(const int8_t *p, int there) {
    /* As upper halves of 16 bits, in the order in which unpacking puts them right. */
    const __m256i order = _mm256_setr_epi8(-1, 0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, /**/ -1, 4, -1, 5, -1, 6,
                                           -1, 7, -1, 12, -1, 13, -1, 14, -1, 15);
    /* The values below 16 * 2^-10: lower halves, and upper ones. */
    const __m256i lower = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -128, 0, 0x40, -128, -96, -64, -32, 0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70));
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3a, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c,
                                                                    0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c));
    const __m256i zero = _mm256_setzero_si256();
    int8_t some[ALL] = {0};
    if (there != ALL) p = memcpy(some, p, (size_t)there);
    __m256i c = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    c = _mm256_srai_epi16(_mm256_shuffle_epi8(c, order), 8);
    __m256i length = _mm256_abs_epi16(c), is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(16), length);
    __m256i bits = _mm256_slli_epi16(_mm256_add_epi16(length, _mm256_set1_epi16(CODE_BIAS)), DROPPED - 16);
    __m256i small = _mm256_shuffle_epi8(upper, _mm256_slli_epi16(length, 8));
    small = _mm256_or_si256(small, _mm256_shuffle_epi8(lower, length));
    bits = _mm256_blendv_epi8(bits, small, is_small);
    bits = _mm256_or_si256(bits, _mm256_and_si256(c, _mm256_set1_epi16(INT16_MIN)));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi16(0x7fc0), _mm256_cmpeq_epi16(c, _mm256_set1_epi16(-128)));
    return real_avx2((ints_avx2){_mm256_unpacklo_epi16(zero, bits), _mm256_unpackhi_epi16(zero, bits)});
}

/* With 16 bits after the point. As bits of a float a code is no larger than by arithmetic where arithmetic holds. */
WIDE_INLINE __m256i to_codes_avx2(__m256 x, __m256i noise, int nan) {
    __m256 length = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    __m256 small = _mm256_min_ps(length, _mm256_set1_ps(NORMAL));
    __m256i fixed = _mm256_cvttps_epi32(_mm256_mul_ps(small, _mm256_set1_ps(0x1p26f)));
    __m256i code = _mm256_sub_epi32(_mm256_castps_si256(length), _mm256_set1_epi32(CODE_BIAS << DROPPED));
    code = _mm256_max_epi32(_mm256_srai_epi32(code, DROPPED - 16), fixed);
    code = _mm256_srai_epi32(_mm256_add_epi32(code, noise), 16);
    code = _mm256_sign_epi32(_mm256_min_epi32(code, _mm256_set1_epi32(127)), _mm256_castps_si256(x));
    return nan ? where_nan_avx2(x, code, _mm256_set1_epi32(-128)) : code;
}

WIDE_INLINE void store_codes_avx2(int8_t *p, floats_avx2 x, ints_avx2 noise, int there, int nan) {
    __m256i half = _mm256_packs_epi32(to_codes_avx2(x.a, noise.a, nan), to_codes_avx2(x.b, noise.b, nan));
    half = _mm256_permute4x64_epi64(half, 0xd8);
    __m128i narrow = _mm_packs_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    if (there == ALL)
        _mm_storeu_si128((__m128i *)p, narrow);
    else
        memcpy(p, &narrow, (size_t)there);
}

WIDE_INLINE void load_more_codes_avx2(const int8_t *p, floats_avx2 *first, floats_avx2 *second) {
    *first = load_codes_avx2(p, ALL);
    *second = load_codes_avx2(p + LANES, ALL);
}

/* The sum is rounded to the nearest, and one more is added where that was less. */
WIDE_INLINE __m256i add_eight_avx2(__m256i sum, __m256 square, __m256 carrier) {
    __m256 carried = _mm256_add_ps(square, carrier);
    __m256 is_less = _mm256_cmp_ps(_mm256_sub_ps(carried, carrier), square, _CMP_LT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(sum, _mm256_castps_si256(carried)), _mm256_castps_si256(is_less));
}

/* With the carrier in the sum each time. */
WIDE_INLINE ints_avx2 add_grains_avx2(ints_avx2 sum, floats_avx2 square, floats_avx2 carrier, int there) {
    if (there != ALL) square = real_avx2(and_avx2(bits_avx2(square), mask_avx2(there)));
    return (ints_avx2){add_eight_avx2(sum.a, square.a, carrier.a), add_eight_avx2(sum.b, square.b, carrier.b)};
}

/* The sum of so many times 16 lanes, without the carrier. */
WIDE_INLINE uint64_t total_avx2(ints_avx2 sum, float carrier, int64_t times) {
    const __m256i carried = _mm256_set1_epi32((int32_t)((uint32_t)bits_of(carrier) * (uint32_t)times));
    const __m256i halves[] = {_mm256_sub_epi32(sum.a, carried), _mm256_sub_epi32(sum.b, carried)};
    __m256i four = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
        four = _mm256_add_epi64(four, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(halves[h])));
        four = _mm256_add_epi64(four, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(halves[h], 1)));
    }
    __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return (uint64_t)(_mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1));
}

/* For random_words(): how many go side by side, their groups, and how words are left for groups in this order. */
#define SIDE_BY_SIDE 1

WIDE_INLINE ints_avx2 groups_avx2(int64_t first) {
    const __m256i each = _mm256_setr_epi64x(0, 2, 1, 3);
    return (ints_avx2){_mm256_add_epi64(_mm256_set1_epi64x(first), each),
                       _mm256_add_epi64(_mm256_set1_epi64x(first + 4), each)};
}

/* Eight words, and turned. */
WIDE_INLINE void store_eight_avx2(struct random *to, int64_t at, __m256i words) {
    const __m256i turn = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    _mm256_storeu_si256((__m256i *)(to->words + at), words);
    _mm256_storeu_si256((__m256i *)(to->turned + at), _mm256_shuffle_epi8(words, turn));
}

WIDE_INLINE void store_four_avx2(struct random *to, int64_t at, __m256i c0, __m256i c1, __m256i c2, __m256i c3) {
    __m256i upper = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    __m256i lower = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    store_eight_avx2(to, at, _mm256_unpacklo_epi64(upper, lower));
    store_eight_avx2(to, at + 8, _mm256_unpackhi_epi64(upper, lower));
}

WIDE_INLINE void store_words_avx2(struct random *to, int64_t at, ints_avx2 c0, ints_avx2 c1, ints_avx2 c2, ints_avx2 c3) {
    store_four_avx2(to, at, c0.a, c1.a, c2.a, c3.a);
    store_four_avx2(to, at + 16, c0.b, c1.b, c2.b, c3.b);
}
