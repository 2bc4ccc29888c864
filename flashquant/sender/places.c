/* What changed between two tensors, and back: what changes.py says, bit for bit.
 *
 *     differing   the places at which two tensors differ
 *     sizes       how many numbers the gaps between places take, in 8, 16 and 32 bits
 *     packed      those gaps
 *     span        how many places gaps stand for, and the last of them
 *     gathered    the elements there
 *     scattered   other elements there
 *     exchanged   both, in one pass
 *
 * Compiled on the machine that runs it, by native.py.
 */
#include <stdint.h>
#include <string.h>

#if defined __AVX512BW__
#include <immintrin.h>
#define BYTES 64
#define DIFFERING(bits)                                                                            \
    static inline uint64_t differ_##bits(const void *one, const void *other) {                     \
        return _mm512_cmpneq_epi##bits##_mask(_mm512_loadu_si512(one), _mm512_loadu_si512(other)); \
    }
DIFFERING(8)
DIFFERING(16)
DIFFERING(32)
#else
#define BYTES 8
#define DIFFERING(bits)                                                                            \
    static inline uint64_t differ_##bits(const void *one, const void *other) {                     \
        uint##bits##_t a[BYTES / sizeof(uint##bits##_t)], b[BYTES / sizeof(uint##bits##_t)];       \
        uint64_t found = 0, left, right;                                                           \
        memcpy(&left, one, BYTES);                                                                 \
        memcpy(&right, other, BYTES);                                                              \
        if (left == right) return 0;                                                               \
        memcpy(a, one, BYTES);                                                                     \
        memcpy(b, other, BYTES);                                                                   \
        for (unsigned i = 0; i < BYTES / sizeof *a; i++) found |= (uint64_t)(a[i] != b[i]) << i;   \
        return found;                                                                              \
    }
DIFFERING(8)
DIFFERING(16)
DIFFERING(32)
#endif

/* `here` has room for `numel` places; they fit into 32 bits. */
#define PLACES(bits)                                                                               \
    int64_t differing_##bits(const uint##bits##_t *old, const uint##bits##_t *new, int64_t numel,  \
                             uint32_t *here) {                                                     \
        const int64_t many = BYTES / sizeof *old;                                                  \
        int64_t i = 0, count = 0;                                                                  \
        for (; i + many <= numel; i += many)                                                       \
            for (uint64_t rest = differ_##bits(old + i, new + i); rest; rest &= rest - 1)          \
                here[count++] = (uint32_t)(i + __builtin_ctzll(rest));                             \
        for (; i < numel; i++)                                                                     \
            if (old[i] != new[i]) here[count++] = (uint32_t)i;                                     \
        return count;                                                                              \
    }                                                                                              \
    void picked_##bits(const uint##bits##_t *from, const uint32_t *here, int64_t count,            \
                       uint##bits##_t *values) {                                                   \
        for (int64_t i = 0; i < count; i++) values[i] = from[here[i]];                             \
    }
PLACES(8)
PLACES(16)
PLACES(32)

void sizes(const uint32_t *here, int64_t count, int64_t *result) {
    int64_t next = 0, bytes = count, halves = count;
    for (int64_t i = 0; i < count; i++) {
        uint32_t gap = (uint32_t)(here[i] - next);
        bytes += gap / UINT8_MAX;
        halves += gap / UINT16_MAX;
        next = (int64_t)here[i] + 1;
    }
    result[0] = bytes;
    result[1] = halves;
    result[2] = count; /* no place needs a gap of all bits: there are fewer than 2^32 - 1 */
}

#define GAPS(width)                                                                                \
    void packed_##width(const uint32_t *here, int64_t count, uint##width##_t *gaps) {              \
        int64_t next = 0;                                                                          \
        for (int64_t i = 0; i < count; i++) {                                                      \
            uint32_t gap = (uint32_t)(here[i] - next);                                             \
            for (; gap >= UINT##width##_MAX; gap -= UINT##width##_MAX) *gaps++ = UINT##width##_MAX; \
            *gaps++ = (uint##width##_t)gap;                                                        \
            next = (int64_t)here[i] + 1;                                                           \
        }                                                                                          \
    }                                                                                              \
    void span_##width(const uint##width##_t *gaps, int64_t size, int64_t *result) {                \
        int64_t next = 0, last = -1, count = 0;                                                    \
        for (int64_t i = 0; i < size; i++) {                                                       \
            int is_skip = gaps[i] == UINT##width##_MAX;                                            \
            next += (int64_t)gaps[i] + !is_skip;                                                   \
            last = is_skip ? last : next - 1;                                                      \
            count += !is_skip;                                                                     \
        }                                                                                          \
        result[0] = count;                                                                         \
        result[1] = last;                                                                          \
    }                                                                                              \
    ELEMENTS(width, 8)                                                                             \
    ELEMENTS(width, 16)                                                                            \
    ELEMENTS(width, 32)

/* The caller has looked at the span of the gaps: all places lie in `at`. */
#define ELEMENTS(width, bits)                                                                      \
    void gathered_##width##_##bits(const uint##bits##_t *at, const uint##width##_t *gaps,          \
                                   int64_t size, uint##bits##_t *values) {                         \
        for (int64_t i = 0; i < size; at += gaps[i++])                                             \
            if (gaps[i] != UINT##width##_MAX) *values++ = at[gaps[i]], at++;                       \
    }                                                                                              \
    void scattered_##width##_##bits(uint##bits##_t *at, const uint##width##_t *gaps, int64_t size, \
                                    const uint##bits##_t *values) {                                \
        for (int64_t i = 0; i < size; at += gaps[i++])                                             \
            if (gaps[i] != UINT##width##_MAX) at[gaps[i]] = *values++, at++;                       \
    }                                                                                              \
    void exchanged_##width##_##bits(uint##bits##_t *at, const uint##width##_t *gaps, int64_t size, \
                                    const uint##bits##_t *values, uint##bits##_t *old,             \
                                    int64_t *done) {                                               \
        for (int64_t i = 0; i < size; at += gaps[i++])                                             \
            if (gaps[i] != UINT##width##_MAX) {                                                    \
                *old++ = at[gaps[i]];                                                              \
                at[gaps[i]] = *values++;                                                           \
                at++;                                                                              \
            }                                                                                      \
        *done = 1;                                                                                 \
    }
GAPS(8)
GAPS(16)
GAPS(32)
