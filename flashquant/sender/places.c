/* What changed between two tensors, and back: what changes.py says, bit for bit.
 *
 *     differing   the places at which two tensors differ, and what is there now; the sums of
 *                 blocks (words.h) follow
 *     packed      those places as gaps, or as a bitmap: gaps of one bit
 *     span        how many places they stand for, and the last of them
 *     scattered   other elements there
 *     exchanged   the same, keeping what was there
 *
 * Compiled on the machine that runs it, by native.py.
 */
#include "../schemes/fingerprints/words.h"

/* One step of a comparison: LINE bytes, and the words in them. */
#if defined __AVX512BW__
enum { LINE = 64 };
#define DIFFERING(bits)                                                                            \
    static inline uint64_t differ_##bits(const void *one, const void *other) {                     \
        return _mm512_cmpneq_epi##bits##_mask(load(one), load(other));                             \
    }
#else
enum { LINE = 8 * LANES };
#define DIFFERING(bits)                                                                            \
    static inline uint64_t differ_##bits(const void *one, const void *other) {                     \
        uint##bits##_t a[LINE / sizeof(uint##bits##_t)], b[LINE / sizeof(uint##bits##_t)];         \
        uint64_t found = 0;                                                                        \
        if (!memcmp(one, other, LINE)) return 0;                                                   \
        memcpy(a, one, LINE);                                                                      \
        memcpy(b, other, LINE);                                                                    \
        for (unsigned i = 0; i < LINE / sizeof *a; i++) found |= (uint64_t)(a[i] != b[i]) << i;    \
        return found;                                                                              \
    }
#endif
DIFFERING(8)
DIFFERING(16)
DIFFERING(32)

/* What the lines of one block that differ add to its sums, before and after. */
typedef struct {
    lanes before[2], after[2];
} drift;

static inline void drift_by(drift *block, const void *old, const void *new, const uint64_t *keys) {
    for (int64_t j = 0; j < LINE / 8; j += LANES) {
        lanes before = load((const char *)old + 8 * j), after = load((const char *)new + 8 * j);
        for (int column = 0; column < 2; column++) {
            lanes key = load(keys + j + column);
            block->before[column] = plus(block->before[column], before, key);
            block->after[column] = plus(block->after[column], after, key);
        }
    }
}

static inline void end_of(const drift *block, sums *kept) {
    kept->first += total(block->after[0]) - total(block->before[0]);
    kept->second += total(block->after[1]) - total(block->before[1]);
}

/* What `differing` has found so far; `bytes` and `halves`: how many numbers more than places the
 * gaps take in 8 and in 16 bits. */
typedef struct {
    int64_t count, bytes, halves, next;
} found;

/* The bits that are set in `rest` stand for places from `i` on. Between two of one line lies no gap
 * that would not fit into 8 bits. */
static inline void note_gap(found *so_far, uint64_t rest, int64_t i) {
    int64_t gap = i + __builtin_ctzll(rest) - so_far->next;
    if (__builtin_expect(gap >= UINT8_MAX, 0)) {
        so_far->bytes += gap / UINT8_MAX;
        so_far->halves += gap / UINT16_MAX;
    }
    so_far->next = i + 64 - __builtin_clzll(rest);
}

#define EMIT(bits)                                                                                 \
    static inline void emit_##bits(found *so_far, uint64_t rest, int64_t i, const void *new,       \
                                   uint32_t *here, uint##bits##_t *values) {                       \
        for (; rest; rest &= rest - 1) {                                                           \
            int at = __builtin_ctzll(rest);                                                        \
            here[so_far->count] = (uint32_t)(i + at);                                              \
            values[so_far->count++] = ((const uint##bits##_t *)new)[at];                           \
        }                                                                                          \
    }
EMIT(8)
#if defined __AVX512BW__ && defined __AVX512VBMI2__
/* Floats change in many places of a line: all at once. */
static inline void emit_16(found *so_far, uint64_t rest, int64_t i, const void *new,
                           uint32_t *here, uint16_t *values) {
    const __m512i steps =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __mmask32 mask = (__mmask32)rest;
    _mm512_storeu_si512(values + so_far->count, _mm512_maskz_compress_epi16(mask, load(new)));
    for (int half = 0; half < 2; half++) {
        __mmask16 part = (__mmask16)(mask >> 16 * half);
        __m512i places = _mm512_add_epi32(steps, _mm512_set1_epi32((int)(i + 16 * half)));
        _mm512_storeu_si512(here + so_far->count, _mm512_maskz_compress_epi32(part, places));
        so_far->count += __builtin_popcount(part);
    }
}
#else
EMIT(16)
#endif
EMIT(32)

/* `here` has room for all places, which fit into 32 bits, and `values` for all elements, and both
 * for a line more; `blocks`:
 * the sums of the old tensor, which become those of the new one; or NULL.
 * `result`: how many places there are, and how many numbers their gaps take in 8, 16 and 32 bits.
 * No place needs a gap of all 32 bits: there are fewer than 2^32 - 1 elements. */
#define PLACES(bits)                                                                               \
    void differing_##bits(const uint##bits##_t *old, const uint##bits##_t *new, int64_t numel,     \
                          const uint64_t *keys, sums *blocks, uint32_t *here,                      \
                          uint##bits##_t *values, int64_t *result) {                               \
        const int64_t many = LINE / sizeof *old, block = BYTES / sizeof *old;                      \
        found so_far = {0, 0, 0, 0};                                                               \
        for (int64_t start = 0; start < numel; start += block, old += block, new += block) {       \
            int64_t left = numel - start < block ? numel - start : block, lines = 0, changed = 0;  \
            uint16_t which[BYTES / LINE];                                                          \
            uint64_t masks[BYTES / LINE];                                                          \
            uint##bits##_t rest[2][BYTES / sizeof *old];                                           \
            const uint##bits##_t *before = old, *after = new;                                      \
            if (left % many) {                                                                     \
                memset(rest, 0, sizeof rest);                                                      \
                before = memcpy(rest[0], old, left * sizeof *old);                                 \
                after = memcpy(rest[1], new, left * sizeof *old);                                  \
            }                                                                                      \
            for (int64_t i = 0; i < left; i += many, lines++) {                                    \
                uint64_t mask = differ_##bits(before + i, after + i);                              \
                __builtin_prefetch((const char *)(old + i) + BYTES);                               \
                __builtin_prefetch((const char *)(new + i) + BYTES);                               \
                masks[changed] = mask;                                                             \
                which[changed] = (uint16_t)lines;                                                  \
                changed += !!mask;                                                                 \
            }                                                                                      \
            if (!changed) continue;                                                                \
            drift sum = {{none(), none()}, {none(), none()}};                                      \
            for (int64_t n = 0; n < changed; n++) {                                                \
                int64_t i = which[n] * many;                                                       \
                note_gap(&so_far, masks[n], start + i);                                            \
                emit_##bits(&so_far, masks[n], start + i, after + i, here, values);                \
                drift_by(&sum, before + i, after + i, keys + which[n] * (LINE / 8));               \
            }                                                                                      \
            if (blocks) end_of(&sum, blocks + start / block);                                      \
        }                                                                                          \
        result[0] = so_far.count;                                                                  \
        result[1] = so_far.count + so_far.bytes;                                                   \
        result[2] = so_far.count + so_far.halves;                                                  \
        result[3] = so_far.count;                                                                  \
    }
PLACES(8)
PLACES(16)
PLACES(32)

/* Do something for each place, in order. */
#define EACH_GAP(width, places, size, body)                                                        \
    for (int64_t i = 0, at = 0; i < size; at += places[i++])                                       \
        if (places[i] != UINT##width##_MAX) {                                                      \
            int64_t place = at + places[i];                                                        \
            body;                                                                                  \
            at++;                                                                                  \
        }
#define EACH_BIT(width, places, size, body)                                                        \
    for (int64_t i = 0; i < size; i++)                                                             \
        for (unsigned rest = places[i]; rest; rest &= rest - 1) {                                  \
            int64_t place = 8 * i + __builtin_ctz(rest);                                           \
            body;                                                                                  \
        }

#define PACKED(width)                                                                              \
    void packed_##width(const uint32_t *here, int64_t count, uint##width##_t *gaps) {              \
        int64_t next = 0;                                                                          \
        for (int64_t i = 0; i < count; i++) {                                                      \
            uint32_t gap = (uint32_t)(here[i] - next);                                             \
            for (; gap >= UINT##width##_MAX; gap -= UINT##width##_MAX) *gaps++ = UINT##width##_MAX; \
            *gaps++ = (uint##width##_t)gap;                                                        \
            next = (int64_t)here[i] + 1;                                                           \
        }                                                                                          \
    }
PACKED(8)
PACKED(16)
PACKED(32)

/* The bitmap is zero. */
void packed_1(const uint32_t *here, int64_t count, uint8_t *bitmap) {
    for (int64_t i = 0; i < count; i++) bitmap[here[i] / 8] |= (uint8_t)(1 << here[i] % 8);
}

#define SPAN(width, type, EACH)                                                                    \
    void span_##width(const type *places, int64_t size, int64_t *result) {                         \
        int64_t last = -1, count = 0;                                                              \
        EACH(width, places, size, (last = place, count++))                                         \
        result[0] = count;                                                                         \
        result[1] = last;                                                                          \
    }                                                                                              \
    ELEMENTS(width, type, EACH, 8)                                                                 \
    ELEMENTS(width, type, EACH, 16)                                                                \
    ELEMENTS(width, type, EACH, 32)

/* The caller has looked at the span of the places: all lie in `live`. */
#define ELEMENTS(width, type, EACH, bits)                                                          \
    void scattered_##width##_##bits(uint##bits##_t *live, const type *places, int64_t size,        \
                                    const uint##bits##_t *values) {                                \
        EACH(width, places, size, live[place] = *values++)                                         \
    }                                                                                              \
    void exchanged_##width##_##bits(uint##bits##_t *live, const type *places, int64_t size,        \
                                    const uint##bits##_t *values, uint##bits##_t *old,             \
                                    int64_t *done) {                                               \
        EACH(width, places, size, (*old++ = live[place], live[place] = *values++))                 \
        *done = 1;                                                                                 \
    }

SPAN(8, uint8_t, EACH_GAP)
SPAN(16, uint16_t, EACH_GAP)
SPAN(32, uint32_t, EACH_GAP)
SPAN(1, uint8_t, EACH_BIT)
