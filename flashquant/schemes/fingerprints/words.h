/* Words, and what they add to the sums of their block: definition.py, bit for bit.
 *
 * Products of 32-bit halves are what every vector unit has. Sums wrap, so neither the number of
 * lanes nor that of threads shows in them.
 */
#ifndef FLASHQUANT_WORDS_H
#define FLASHQUANT_WORDS_H

#include <stdint.h>
#include <string.h>

enum { BLOCK = 512, BYTES = 8 * BLOCK };

typedef struct { uint64_t first, second; } sums;

/* What one word adds to a sum of its block. */
static inline uint64_t product(uint64_t word, uint64_t key) {
    uint32_t low = (uint32_t)word + (uint32_t)key;
    uint32_t high = (uint32_t)(word >> 32) + (uint32_t)(key >> 32);
    return (uint64_t)low * high;
}

#if defined __AVX512F__
#include <immintrin.h>

enum { LANES = 8 };
typedef __m512i lanes;
static inline lanes none(void) { return _mm512_setzero_si512(); }
static inline lanes load(const void *from) { return _mm512_loadu_si512(from); }
static inline lanes plus(lanes acc, lanes words, lanes keys) {
    lanes x = _mm512_add_epi32(words, keys);
    return _mm512_add_epi64(acc, _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)));
}
static inline uint64_t total(lanes acc) { return (uint64_t)_mm512_reduce_add_epi64(acc); }

#elif defined __AVX2__
#include <immintrin.h>

enum { LANES = 4 };
typedef __m256i lanes;
static inline lanes none(void) { return _mm256_setzero_si256(); }
static inline lanes load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline lanes plus(lanes acc, lanes words, lanes keys) {
    lanes x = _mm256_add_epi32(words, keys);
    return _mm256_add_epi64(acc, _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
}
static inline uint64_t total(lanes acc) {
    uint64_t each[LANES];
    memcpy(each, &acc, sizeof each);
    return each[0] + each[1] + each[2] + each[3];
}

#else

enum { LANES = 1 };
typedef uint64_t lanes;
static inline lanes none(void) { return 0; }
static inline lanes load(const void *from) {
    lanes word;
    memcpy(&word, from, sizeof word);
    return word;
}
static inline lanes plus(lanes acc, lanes words, lanes keys) { return acc + product(words, keys); }
static inline uint64_t total(lanes acc) { return acc; }

#endif

static inline uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
    return word ^ (word >> 31);
}

/* What a block adds to the sums of its tensor. */
static inline sums closed(sums block, int64_t position) {
    uint64_t first = mixed(block.first + (uint64_t)(position + 1) * 0x9e3779b97f4a7c15u);
    uint64_t second = mixed(block.second ^ first);
    return (sums){second, mixed(first + second)};
}

#endif
