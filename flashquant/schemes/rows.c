/* Rows of floats become codes, each row in one visit to memory.
 *
 * The eager functions beside this file are the definition; these return the same bits.
 * A row is read twice, but the second time out of the cache. Maxima are taken of the bits of
 * absolute values: they order like the values, NaN is above Inf and Inf above every number, so
 * a scale that is not finite tells of a weight that is not; so does the largest of them all, which
 * some return. No sum of floats is formed anywhere, hence nothing depends on the order or on the
 * number of threads.
 *
 * Compiled on the machine that runs it, by native.py.
 */
#include <float.h>
#include <string.h>

#include "lanes.h"

/* Below this many elements, a second thread costs more than it brings. */
#define WORTH_THREADS (1 << 17)
#define ROWS _Pragma("omp parallel for schedule(static) if (n * k > WORTH_THREADS)")
#define ROWS_AND_TOP                                                                             \
    _Pragma("omp parallel for schedule(static) reduction(max : top) if (n * k > WORTH_THREADS)")
#define BLOCKS ROWS
enum { TOGETHER = 8 };
#define PARTS(j, part)                                                                           \
    some part;                                                                                   \
    for (int64_t j = 0; j < k && (part = up_to(k - j), 1); j += LANES)

#define SIGN 0x80000000u
#define MAGNITUDE 0x7fffffffu
#define EXPONENT 0x7f800000u

/* e4m3 of |x| <= 448, ties to even, by the adder of floats: added to a number 2^20 times the size
 * of its own exponent, x is rounded to eighths of it, and their count stands in the lowest bits.
 * Below 2^-6, where e4m3 has no smaller exponent, eighths of that are counted. */
static inline words e4m3(floats x) {
    words bits = as_bits(x);
    words exponent = larger(both(bits, each(EXPONENT)), each((127u - 6) << 23));
    words anchor = either(sum(exponent, each(20u << 23)), both(bits, each(SIGN)));
    words eighths = less(as_bits(plus(x, as_floats(anchor))), anchor);
    words code = sum(right(exponent, 20), less(eighths, each((127u - 6) << 3)));
    return either(code, both(right(bits, 24), each(0x80)));
}

/* Of x over a factor, which no clamp needs: the largest quotient is 448 to a rounding, which e4m3
 * does not see. Or of x times one, whatever that may be. */
static inline words coded(floats x, floats factor, int divides) {
    return e4m3(divides ? over(x, factor) : clamped(times(x, factor), -448.0f, 448.0f));
}

#define DEFINE_CODED(T, name)                                                                    \
    static inline void one_by_one_##name(const T *row, uint8_t *codes, int64_t k, float factor,  \
                                         int divides) {                                          \
        floats by = every(factor);                                                               \
        PARTS(j, part) store(codes + j, coded(load_##name(row + j, part), by, divides), part);   \
    }

DEFINE_CODED(bf16, bf16)
DEFINE_CODED(float, f32)
#include "mantissas.h"

static inline uint32_t peak_bf16(const bf16 *restrict row, int64_t k) {
    uint16_t peak = 0;
    for (int64_t j = 0; j < k; j++) {
        uint16_t bits = row[j].bits & 0x7fffu;
        peak = bits > peak ? bits : peak;
    }
    return (uint32_t)peak << 16;
}

static inline uint32_t peak_f32(const float *restrict row, int64_t k) {
    uint32_t peak = 0;
    for (int64_t j = 0; j < k; j++) {
        uint32_t bits = bits_of(row[j]) & MAGNITUDE;
        peak = bits > peak ? bits : peak;
    }
    return peak;
}

/* What the largest int8 code stands for in a row with this maximum: rows of zeros, or of numbers so
 * small that 127 over them overflows, become zeros. */
static inline float held_by(float peak) { return 127.0f / peak > FLT_MAX ? 1.0f : peak; }

#define DEFINE(T, name)                                                                          \
                                                                                                 \
    float peak_of_##name(const T *values, int64_t count) {                                       \
        return float_of(peak_##name(values, count));                                             \
    }                                                                                            \
                                                                                                 \
    void absmax_##name(const T *weight, int64_t stride, float *maxima, int64_t n, int64_t k) {   \
        ROWS for (int64_t i = 0; i < n; i++)                                                     \
            maxima[i] = float_of(peak_##name(weight + i * stride, k));                           \
    }                                                                                            \
                                                                                                 \
    /* As they are. */                                                                           \
    float copied_##name(const T *weight, int64_t stride, T *home, int64_t out, int64_t n,        \
                        int64_t k) {                                                             \
        uint32_t top = 0;                                                                        \
        ROWS_AND_TOP for (int64_t i = 0; i < n; i++) {                                           \
            memmove(home + i * out, weight + i * stride, k * sizeof(T));                         \
            uint32_t bits = peak_##name(weight + i * stride, k);                                 \
            top = bits > top ? bits : top;                                                       \
        }                                                                                        \
        return float_of(top);                                                                    \
    }                                                                                            \
                                                                                                 \
    float int8_channel_##name(const T *weight, int64_t stride, int8_t *codes, int64_t out,       \
                              float *scales, int64_t n, int64_t k) {                             \
        uint32_t top = 0;                                                                        \
        ROWS_AND_TOP for (int64_t i = 0; i < n; i++) {                                           \
            const T *row = weight + i * stride;                                                  \
            uint32_t bits = peak_##name(row, k);                                                 \
            float peak = held_by(float_of(bits));                                                \
            floats inverse = every(127.0f / peak);                                               \
            top = bits > top ? bits : top;                                                       \
            scales[i] = peak / 127.0f;                                                           \
            PARTS(j, part)                                                                       \
                store(codes + i * out + j, rounded(times(load_##name(row + j, part), inverse)),  \
                      part);                                                                     \
        }                                                                                        \
        return float_of(top);                                                                    \
    }                                                                                            \
                                                                                                 \
    float fp8_channel_##name(const T *weight, int64_t stride, uint8_t *codes, int64_t out,       \
                             float *scales, float least, int64_t n, int64_t k) {                 \
        uint32_t top = 0;                                                                        \
        ROWS_AND_TOP for (int64_t i = 0; i < n; i++) {                                           \
            const T *row = weight + i * stride;                                                  \
            uint32_t bits = peak_##name(row, k);                                                 \
            float scale = float_of(bits) / 448.0f;                                               \
            scale = scale < least ? least : scale;                                               \
            top = bits > top ? bits : top;                                                       \
            scales[i] = scale;                                                                   \
            coded_##name(row, codes + i * out, k, scale, 1);                                     \
        }                                                                                        \
        return float_of(top);                                                                    \
    }                                                                                            \
                                                                                                 \
    /* `step` is 1 where each row has its own factor, 0 where all have the same. */              \
    void fp8_static_##name(const T *weight, int64_t stride, uint8_t *codes, int64_t out,         \
                           const float *inverses, int64_t step, int64_t n, int64_t k) {          \
        ROWS for (int64_t i = 0; i < n; i++)                                                     \
            coded_##name(weight + i * stride, codes + i * out, k, inverses[i * step], 0);        \
    }                                                                                            \
                                                                                                 \
    /* (w * by_row) * by_column: the order is FlashRL's. Some rows at once: they come from memory   \
     * beside each other, and read each factor of the columns together. */                       \
    static inline __attribute__((always_inline)) void refresh_##name(                            \
        const T *weight, int64_t stride, int8_t *codes, int64_t out, const float *by_row,        \
        const float *by_column, const float *weight_scale, float *scales, int64_t k,             \
        const int rows) {                                                                        \
        words bits[TOGETHER];                                                                    \
        floats inverse[TOGETHER];                                                                \
        for (int r = 0; r < rows; r++) bits[r] = each(0);                                        \
        PARTS(j, part) {                                                                         \
            floats columns = load_f32(by_column + j, part);                                      \
            for (int r = 0; r < rows; r++) {                                                     \
                floats x = times(load_##name(weight + r * stride + j, part), every(by_row[r]));  \
                bits[r] = larger(bits[r], both(as_bits(times(x, columns)), each(MAGNITUDE)));    \
            }                                                                                    \
        }                                                                                        \
        for (int r = 0; r < rows; r++) {                                                         \
            float peak = held_by(float_of(largest(bits[r])));                                    \
            inverse[r] = every(127.0f / peak);                                                   \
            scales[r] = weight_scale[r] * (peak / 127.0f);                                       \
        }                                                                                        \
        PARTS(l, rest) {                                                                         \
            floats columns = load_f32(by_column + l, rest);                                      \
            for (int r = 0; r < rows; r++) {                                                     \
                floats x = times(load_##name(weight + r * stride + l, rest), every(by_row[r]));  \
                x = times(times(x, columns), inverse[r]);                                        \
                store(codes + r * out + l, rounded(x), rest);                                    \
            }                                                                                    \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    void int8_refreshed_##name(const T *weight, int64_t stride, int8_t *codes, int64_t out,      \
                               const float *by_row, const float *by_column,                      \
                               const float *weight_scale, float *scales, int64_t n, int64_t k) { \
        BLOCKS for (int64_t i = 0; i < n; i += TOGETHER) {                                       \
            if (i + TOGETHER <= n)                                                               \
                refresh_##name(weight + i * stride, stride, codes + i * out, out, by_row + i,    \
                               by_column, weight_scale + i, scales + i, k, TOGETHER);            \
            else                                                                                 \
                for (int64_t l = i; l < n; l++)                                                  \
                    refresh_##name(weight + l * stride, stride, codes + l * out, out,            \
                                   by_row + l, by_column, weight_scale + l, scales + l, k, 1);   \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    static inline __attribute__((always_inline)) void freeze_##name(                             \
        const T *weight, int64_t stride, int8_t *codes, int64_t out, const float *by_row,        \
        const float *by_column, uint32_t most, float *peaks, int64_t *clipped, int64_t k,        \
        const int rows) {                                                                        \
        words peak[TOGETHER], outside[TOGETHER];                                                 \
        for (int r = 0; r < rows; r++) peak[r] = outside[r] = each(0);                           \
        PARTS(j, part) {                                                                         \
            floats columns = load_f32(by_column + j, part);                                      \
            for (int r = 0; r < rows; r++) {                                                     \
                floats x = times(load_##name(weight + r * stride + j, part), every(by_row[r]));  \
                x = times(x, columns);                                                           \
                words bits = both(as_bits(x), each(MAGNITUDE));                                  \
                peak[r] = larger(peak[r], bits);                                                 \
                outside[r] = counted(outside[r], bits, most);                                    \
                store(codes + r * out + j, rounded(clamped(x, -128.0f, 127.0f)), part);          \
            }                                                                                    \
        }                                                                                        \
        for (int r = 0; r < rows; r++) {                                                         \
            peaks[r] = float_of(largest(peak[r]));                                               \
            clipped[r] = total(outside[r]);                                                      \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    void int8_frozen_##name(const T *weight, int64_t stride, int8_t *codes, int64_t out,         \
                            const float *by_row, const float *by_column, float held,             \
                            float *peaks, int64_t *clipped, int64_t n, int64_t k) {              \
        uint32_t most = bits_of(held);                                                           \
        BLOCKS for (int64_t i = 0; i < n; i += TOGETHER) {                                       \
            if (i + TOGETHER <= n)                                                               \
                freeze_##name(weight + i * stride, stride, codes + i * out, out, by_row + i,     \
                              by_column, most, peaks + i, clipped + i, k, TOGETHER);             \
            else                                                                                 \
                for (int64_t l = i; l < n; l++)                                                  \
                    freeze_##name(weight + l * stride, stride, codes + l * out, out, by_row + l, \
                                  by_column, most, peaks + l, clipped + l, k, 1);                \
        }                                                                                        \
    }

DEFINE(bf16, bf16)
DEFINE(float, f32)
