/* What happens to rows of hidden states between products: norms, rounding to bytes, rotary embedding. */

#include "kernels.h"

#ifdef HAS_KERNELS
#define LANES 16
#define TOP 127.0f
#define TINY (1e-30f * TOP) /* a row of zeros has a scale all the same */

VECTOR static inline __mmask16 lanes(ptrdiff_t left)
{
    return left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << (left > 0 ? left : 0)) - 1);
}

/* x * factor * weight, of LANES values; without a weight, x * factor. */
VECTOR static inline __m512 weighted(const float *x, const float *weight, float factor, ptrdiff_t place,
                                     __mmask16 there)
{
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + place), _mm512_set1_ps(factor));
    return weight == NULL ? value : _mm512_mul_ps(value, _mm512_maskz_loadu_ps(there, weight + place));
}

/* The row x * factor * weight as bytes: max|x| becomes 127. */
VECTOR static void round_row(const float *x, const float *weight, float factor, ptrdiff_t width, ptrdiff_t row,
                             const Bytes *bytes)
{
    __m512 most = _mm512_setzero_ps();
    for (ptrdiff_t place = 0; place < width; place += LANES)
        most = _mm512_max_ps(most, _mm512_abs_ps(weighted(x, weight, factor, place, lanes(width - place))));
    float largest = _mm512_reduce_max_ps(most);
    largest = largest > TINY ? largest : TINY;
    bytes->scales[row] = largest / TOP;
    const __m512 steps = _mm512_set1_ps(TOP / largest);
    int8_t *target = bytes->tiles + row / SIDE * SIDE * bytes->depth + row % SIDE * DEPTH;
    for (ptrdiff_t place = 0; place < bytes->depth; place += LANES) {
        const __m512 value = weighted(x, weight, factor, place, lanes(width - place));
        _mm_storeu_si128((__m128i *)(target + place / DEPTH * TILE_BYTES + place % DEPTH),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(value, steps))));
    }
}

/* 1 / rms(x) */
VECTOR static float inverse_rms(const float *x, ptrdiff_t width, float eps)
{
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (ptrdiff_t place = 0; place < width; place += LANES) {
        const __m512 value = _mm512_maskz_loadu_ps(lanes(width - place), x + place);
        sums[place / LANES % 4] = _mm512_fmadd_ps(value, value, sums[place / LANES % 4]);
    }
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / (float)width + eps);
}

void round_rows(const float *x, ptrdiff_t width, ptrdiff_t first, ptrdiff_t count, const Bytes *bytes)
{
    for (ptrdiff_t row = first; row < first + count; row++)
        round_row(x + row * width, NULL, 1.0f, width, row, bytes);
}

void norm_rows(const float *x, const float *weight, float eps, ptrdiff_t width, ptrdiff_t first, ptrdiff_t count,
               const Bytes *bytes)
{
    for (ptrdiff_t row = first; row < first + count; row++) {
        const float *own = x + row * width;
        round_row(own, weight, inverse_rms(own, width, eps), width, row, bytes);
    }
}

VECTOR void join_rows(float *stream, const float *branch, const float *branch_weight, const float *weight, float eps,
                      ptrdiff_t width, ptrdiff_t first, ptrdiff_t count, const Bytes *bytes)
{
    for (ptrdiff_t row = first; row < first + count; row++) {
        float *own = stream + row * width;
        const float *added = branch + row * width;
        const float factor = inverse_rms(added, width, eps);
        for (ptrdiff_t place = 0; place < width; place += LANES) {
            const __mmask16 there = lanes(width - place);
            const __m512 value = weighted(added, branch_weight, factor, place, there);
            _mm512_mask_storeu_ps(own + place, there,
                                  _mm512_add_ps(_mm512_maskz_loadu_ps(there, own + place), value));
        }
        if (weight != NULL)
            round_row(own, weight, inverse_rms(own, width, eps), width, row, bytes);
    }
}

/* Pairs of neighbours turn: (a cos - b sin, b cos + a sin), the first `rotary` values of each head. */
VECTOR void rotate_rows(float *x, ptrdiff_t stride, ptrdiff_t heads, ptrdiff_t head_dim, ptrdiff_t rotary,
                        const float *cos, const float *sin, ptrdiff_t first, ptrdiff_t count)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (ptrdiff_t row = first; row < first + count; row++)
        for (ptrdiff_t head = 0; head < heads; head++)
            for (ptrdiff_t place = 0; place < rotary; place += LANES) {
                const __mmask16 there = lanes(rotary - place), halves = lanes((rotary - place) / 2);
                float *own = x + row * stride + head * head_dim + place;
                const ptrdiff_t angle = row * (rotary / 2) + place / 2;
                const __m512 value = _mm512_maskz_loadu_ps(there, own);
                const __mmask16 eight = halves & 0xff;
                const __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(eight, cos + angle));
                const __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(eight, sin + angle));
                const __m512 other = _mm512_mul_ps(_mm512_permute_ps(value, 0xb1), s);
                _mm512_mask_storeu_ps(own, there, _mm512_fmaddsub_ps(value, c, other));
            }
}
#endif
