/* Two sums of bytes, each byte read once: what definition.py says, bit for bit.
 *
 * Products of 32-bit halves are what every vector unit has. Sums wrap, so neither the number of
 * lanes nor that of threads shows in them.
 *
 * Compiled on the machine that runs it, by native.py.
 */
#include <stdint.h>
#include <string.h>

enum { BLOCK = 512, BYTES = 8 * BLOCK };

/* Below this many blocks, a second thread costs more than it brings. */
#define WORTH_THREADS 64

typedef struct { uint64_t first, second; } sums;

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
static inline lanes plus(lanes acc, lanes words, lanes keys) {
    uint32_t low = (uint32_t)words + (uint32_t)keys;
    uint32_t high = (uint32_t)(words >> 32) + (uint32_t)(keys >> 32);
    return acc + (uint64_t)low * high;
}
static inline uint64_t total(lanes acc) { return acc; }

#endif

static inline uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
    return word ^ (word >> 31);
}

static inline sums of_block(const unsigned char *bytes, const uint64_t *keys, int64_t position) {
    lanes ones = none(), others = none();
#pragma GCC unroll 8
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        lanes words = load(bytes + 8 * j);
        ones = plus(ones, words, load(keys + j));
        others = plus(others, words, load(keys + j + 1));
    }
    uint64_t first = mixed(total(ones) + (uint64_t)(position + 1) * 0x9e3779b97f4a7c15u);
    uint64_t second = mixed(total(others) ^ first);
    return (sums){second, mixed(first + second)};
}

/* `keys`: BLOCK + 1 of them. `result`: both sums. */
void sums_of(const unsigned char *bytes, int64_t size, const uint64_t *keys, uint64_t *result) {
    int64_t blocks = size / BYTES;
    uint64_t first = 0, second = 0;
#pragma omp parallel for schedule(static) reduction(+ : first, second) if (blocks > WORTH_THREADS)
    for (int64_t i = 0; i < blocks; i++) {
        sums block = of_block(bytes + i * BYTES, keys, i);
        first += block.first;
        second += block.second;
    }
    if (size % BYTES) {
        unsigned char rest[BYTES] = {0};
        memcpy(rest, bytes + blocks * BYTES, size % BYTES);
        sums block = of_block(rest, keys, blocks);
        first += block.first;
        second += block.second;
    }
    result[0] = first;
    result[1] = second;
}
