/* Two sums of bytes, each byte read once: what definition.py says, bit for bit.
 *
 * Compiled on the machine that runs it, by native.py.
 */
#include "words.h"

/* Below this many blocks, a second thread costs more than it brings. */
#define WORTH_THREADS 64

static inline sums of_block(const unsigned char *bytes, const uint64_t *keys) {
    lanes ones = none(), others = none();
#pragma GCC unroll 8
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        lanes words = load(bytes + 8 * j);
        ones = plus(ones, words, load(keys + j));
        others = plus(others, words, load(keys + j + 1));
    }
    return (sums){total(ones), total(others)};
}

/* The last block, of fewer bytes: zeros behind them. */
static sums of_rest(const unsigned char *bytes, int64_t size, const uint64_t *keys) {
    unsigned char rest[BYTES] = {0};
    memcpy(rest, bytes, size);
    return of_block(rest, keys);
}

/* `keys`: BLOCK + 1 of them. `result`: both sums. */
void sums_of(const unsigned char *bytes, int64_t size, const uint64_t *keys, uint64_t *result) {
    int64_t blocks = size / BYTES;
    uint64_t first = 0, second = 0;
#pragma omp parallel for schedule(static) reduction(+ : first, second) if (blocks > WORTH_THREADS)
    for (int64_t i = 0; i < blocks; i++) {
        sums block = closed(of_block(bytes + i * BYTES, keys), i);
        first += block.first;
        second += block.second;
    }
    if (size % BYTES) {
        sums block = closed(of_rest(bytes + blocks * BYTES, size % BYTES, keys), blocks);
        first += block.first;
        second += block.second;
    }
    result[0] = first;
    result[1] = second;
}

/* `result`: both sums of each block. */
void blocks_of(const unsigned char *bytes, int64_t size, const uint64_t *keys, sums *result) {
    int64_t blocks = size / BYTES;
#pragma omp parallel for schedule(static) if (blocks > WORTH_THREADS)
    for (int64_t i = 0; i < blocks; i++) result[i] = of_block(bytes + i * BYTES, keys);
    if (size % BYTES)
        result[blocks] = of_rest(bytes + blocks * BYTES, size % BYTES, keys);
}

/* Of blocks, `result`: both sums of the tensor. */
void closed_of(const sums *blocks, int64_t count, uint64_t *result) {
    uint64_t first = 0, second = 0;
    for (int64_t i = 0; i < count; i++) {
        sums block = closed(blocks[i], i);
        first += block.first;
        second += block.second;
    }
    result[0] = first;
    result[1] = second;
}
