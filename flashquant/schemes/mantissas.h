/* e4m3 of a row of bf16, 64 weights at a time, from what the row's factor makes of 128 mantissas.
 *
 * A power of two passes through a product, a quotient and the rounding to e4m3 unharmed, as eight
 * codes each, where nothing leaves the normal numbers. So the code of a weight is that of its
 * mantissa with one fixed exponent, and eight times how far its own is from that: a look into 128
 * bytes instead of arithmetic in float32. Below e4m3's normal numbers the steps are of one size;
 * a block with such weights in it goes `one_by_one`, unless they are so small that they are zeros.
 */
#pragma once
#include "lanes.h"

#ifdef __AVX512VBMI__

enum { BLOCK = 64, WORTH_A_TABLE = 256 };
enum { NORMAL = -6, NOTHING = -12, TOP = 8 }; /* exponents, counted from the fixed one */

typedef struct {
    __m512i first, second; /* codes of the mantissas 0 to 63, and 64 to 127 */
    int fixed;             /* the exponent that these have */
} table;

/* The exponent, biased, with which mantissas become 1 to 4. */
static inline int fixed_by(float factor, int divides) {
    int exponent = (int)(bits_of(factor) >> 23);
    int rest = (bits_of(factor) & 0x7fffffu) != 0;
    return divides ? exponent + rest : 254 - exponent;
}

static inline table tabulated(float factor, int fixed, int divides) {
    uint8_t codes[128];
    const words lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (uint32_t m = 0; m < 128; m += LANES) {
        words bits = sum(each((uint32_t)fixed << 23 | m << 16), _mm512_slli_epi32(lane, 16));
        store(codes + m, coded(as_floats(bits), every(factor), divides), 0xffff);
    }
    return (table){_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + BLOCK), fixed};
}

/* One byte of each of 64 weights: the lower ones, or the upper ones. */
static inline __m512i bytes(__m512i some, __m512i others, int upper) {
    const __m512i lower = _mm512_set_epi8(
        126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100, 98, 96, 94, 92, 90, 88,
        86, 84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42,
        40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i place = upper ? _mm512_add_epi8(lower, _mm512_set1_epi8(1)) : lower;
    return _mm512_permutex2var_epi8(some, place, others);
}

static inline __m512i all(int value) { return _mm512_set1_epi8((char)value); }

/* Code up to 64 weights; 0, and nothing done, if some are small or beyond 1024. */
static inline int looked_up(const bf16 *row, uint8_t *codes, int64_t left, table known) {
    __mmask64 part = left >= BLOCK ? ~0ull : (1ull << left) - 1;
    __m512i some = _mm512_maskz_loadu_epi16((__mmask32)part, row);
    __m512i others = _mm512_maskz_loadu_epi16((__mmask32)(part >> 32), row + BLOCK / 2);
    __m512i exponent = bytes(_mm512_srli_epi16(some, 7), _mm512_srli_epi16(others, 7), 0);
    __mmask64 nothing = _mm512_cmple_epu8_mask(exponent, all(known.fixed + NOTHING));
    __mmask64 small = _mm512_cmplt_epu8_mask(exponent, all(known.fixed + NORMAL)) ^ nothing;
    if (small | _mm512_cmpgt_epu8_mask(exponent, all(known.fixed + TOP))) return 0;
    __m512i code = _mm512_permutex2var_epi8(known.first, bytes(some, others, 0), known.second);
    __m512i apart = _mm512_slli_epi16(_mm512_sub_epi8(exponent, all(known.fixed)), 3);
    code = _mm512_add_epi8(code, _mm512_and_si512(apart, all(0xf8)));
    code = _mm512_maskz_min_epu8(~nothing, code, all(0x7e)); /* 448 */
    __m512i sign = _mm512_and_si512(bytes(some, others, 1), all(0x80));
    _mm512_mask_storeu_epi8(codes, part, _mm512_or_si512(code, sign));
    return 1;
}

static inline void coded_bf16(const bf16 *row, uint8_t *codes, int64_t k, float factor,
                              int divides) {
    int fixed = fixed_by(factor, divides);
    if (k < WORTH_A_TABLE || fixed + NOTHING < 0 || fixed + TOP > 254) {
        one_by_one_bf16(row, codes, k, factor, divides);
        return;
    }
    table known = tabulated(factor, fixed, divides);
    for (int64_t j = 0; j < k; j += BLOCK) {
        int64_t left = k - j < BLOCK ? k - j : BLOCK;
        if (!looked_up(row + j, codes + j, left, known))
            one_by_one_bf16(row + j, codes + j, left, factor, divides);
    }
}

#else

static inline void coded_bf16(const bf16 *row, uint8_t *codes, int64_t k, float factor,
                              int divides) {
    one_by_one_bf16(row, codes, k, factor, divides);
}

#endif

static inline void coded_f32(const float *row, uint8_t *codes, int64_t k, float factor,
                             int divides) {
    one_by_one_f32(row, codes, k, factor, divides);
}
