/* Some elements of a row at a time: sixteen with AVX-512, one without.
 *
 * One at a time is left to the compiler to vectorize, which it does well on every CPU; only its
 * way from 16-bit loads to 8-bit stores through AVX-512 is two times slower than by hand. A part
 * at the end of a row has fewer; those beyond it are read as zeros, and not stored.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bf16;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#include <immintrin.h>

enum { LANES = 16 };
typedef __m512 floats;
typedef __m512i words;
typedef __mmask16 some;

static inline some up_to(int64_t left) { return left >= LANES ? 0xffff : (some)((1u << left) - 1); }

static inline floats load_bf16(const bf16 *from, some part) {
    __m256i bits = part == 0xffff ? _mm256_loadu_si256((const __m256i *)from)
                                  : _mm256_maskz_loadu_epi16(part, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

static inline floats load_f32(const float *from, some part) {
    return _mm512_maskz_loadu_ps(part, from);
}

static inline void store(void *to, words values, some part) {
    __m128i bytes = _mm512_cvtepi32_epi8(values);
    if (part == 0xffff) _mm_storeu_si128((__m128i *)to, bytes);
    else _mm_mask_storeu_epi8(to, part, bytes);
}

static inline floats every(float value) { return _mm512_set1_ps(value); }
static inline words each(uint32_t value) { return _mm512_set1_epi32((int)value); }
static inline floats times(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats over(floats a, floats b) { return _mm512_div_ps(a, b); }
static inline floats plus(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats clamped(floats x, float low, float high) {
    return _mm512_max_ps(every(low), _mm512_min_ps(x, every(high)));
}
static inline words rounded(floats x) { return _mm512_cvtps_epi32(x); }
static inline words as_bits(floats x) { return _mm512_castps_si512(x); }
static inline floats as_floats(words x) { return _mm512_castsi512_ps(x); }
static inline words both(words a, words b) { return _mm512_and_si512(a, b); }
static inline words either(words a, words b) { return _mm512_or_si512(a, b); }
static inline words sum(words a, words b) { return _mm512_add_epi32(a, b); }
static inline words less(words a, words b) { return _mm512_sub_epi32(a, b); }
static inline words right(words a, int by) { return _mm512_srli_epi32(a, (unsigned)by); }
static inline words larger(words a, words b) { return _mm512_max_epu32(a, b); }
static inline words counted(words count, words value, uint32_t most) {
    some over_it = _mm512_cmpgt_epu32_mask(value, each(most));
    return _mm512_mask_add_epi32(count, over_it, count, each(1));
}
static inline uint32_t largest(words a) { return _mm512_reduce_max_epu32(a); }
static inline uint32_t total(words a) { return (uint32_t)_mm512_reduce_add_epi32(a); }

#else

enum { LANES = 1 };
typedef float floats;
typedef uint32_t words;
typedef int some;

static inline some up_to(int64_t left) { return (int)(left > 0); }
static inline floats load_bf16(const bf16 *from, some part) {
    (void)part;
    return float_of((uint32_t)from->bits << 16);
}
static inline floats load_f32(const float *from, some part) { (void)part; return *from; }
static inline void store(void *to, words value, some part) {
    (void)part;
    *(uint8_t *)to = (uint8_t)value;
}
static inline floats every(float value) { return value; }
static inline words each(uint32_t value) { return value; }
static inline floats times(floats a, floats b) { return a * b; }
static inline floats over(floats a, floats b) { return a / b; }
static inline floats plus(floats a, floats b) { return a + b; }
static inline floats clamped(floats x, float low, float high) {
    x = x < high ? x : high; /* so is NaN */
    return x > low ? x : low;
}
static inline words rounded(floats x) { return (uint32_t)(int32_t)rintf(x); }
static inline words as_bits(floats x) { return bits_of(x); }
static inline floats as_floats(words x) { return float_of(x); }
static inline words both(words a, words b) { return a & b; }
static inline words either(words a, words b) { return a | b; }
static inline words sum(words a, words b) { return a + b; }
static inline words less(words a, words b) { return a - b; }
static inline words right(words a, int by) { return a >> by; }
static inline words larger(words a, words b) { return a > b ? a : b; }
static inline words counted(words count, words value, uint32_t most) {
    return count + (value > most);
}
static inline uint32_t largest(words a) { return a; }
static inline uint32_t total(words a) { return a; }

#endif
