/* Products of tiles: 32 x 32 results at a time, by AMX or by AVX-512. The layout is told in kernels.h. */

#include "kernels.h"

#ifdef HAS_KERNELS
#include <string.h>

/* The intrinsics for tiles do not say that they touch memory, to some compilers at least. */
#define MEMORY __asm__ volatile("" ::: "memory")

MATRIX void open_matrices(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = DEPTH;
        shapes.rows[tile] = SIDE;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

MATRIX void close_matrices(void) { __asm__ volatile("tilerelease" ::: "memory"); }

MATRIX void bytes_by_matrices(const int8_t *a, ptrdiff_t a_next, const int8_t *b, ptrdiff_t b_next, int32_t *c,
                              ptrdiff_t steps, int add)
{
    MEMORY;
    if (add) {
        _tile_loadd(0, c, DEPTH);
        _tile_loadd(1, c + 256, DEPTH);
        _tile_loadd(2, c + 512, DEPTH);
        _tile_loadd(3, c + 768, DEPTH);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t step = 0; step < steps; step++) {
        _tile_loadd(4, a + step * TILE_BYTES, DEPTH);
        _tile_loadd(6, b + step * TILE_BYTES, DEPTH);
        _tile_loadd(5, a + a_next + step * TILE_BYTES, DEPTH);
        _tile_loadd(7, b + b_next + step * TILE_BYTES, DEPTH);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, c, DEPTH);
    _tile_stored(1, c + 256, DEPTH);
    _tile_stored(2, c + 512, DEPTH);
    _tile_stored(3, c + 768, DEPTH);
    MEMORY;
}

MATRIX void split_by_matrices(const uint16_t *a, ptrdiff_t a_next, ptrdiff_t a_low, const uint16_t *b, ptrdiff_t b_next,
                              ptrdiff_t b_low, float *c, ptrdiff_t steps, int add)
{
    const ptrdiff_t tile = TILE_BYTES / 2;
    MEMORY;
    if (add) {
        _tile_loadd(0, c, DEPTH);
        _tile_loadd(1, c + 256, DEPTH);
        _tile_loadd(2, c + 512, DEPTH);
        _tile_loadd(3, c + 768, DEPTH);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t step = 0; step < steps; step++) {
        const uint16_t *left = a + step * tile, *right = b + step * tile;
        _tile_loadd(4, left, DEPTH);
        _tile_loadd(5, left + a_next, DEPTH);
        _tile_loadd(6, right + b_low, DEPTH);
        _tile_loadd(7, right + b_next + b_low, DEPTH);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, right, DEPTH);
        _tile_loadd(7, right + b_next, DEPTH);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, left + a_low, DEPTH);
        _tile_loadd(5, left + a_next + a_low, DEPTH);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, DEPTH);
    _tile_stored(1, c + 256, DEPTH);
    _tile_stored(2, c + 512, DEPTH);
    _tile_stored(3, c + 768, DEPTH);
    MEMORY;
}

#define LINES 8 /* rows of results in registers at once: 8 times two vectors of 16 columns */

/* VNNI multiplies unsigned by signed bytes. 128 is added to the left ones, and what that adds to the sums, which is
   128 times the sum of a column, taken off again. */
VECTOR void bytes_by_vectors(const int8_t *a, ptrdiff_t a_next, const int8_t *b, ptrdiff_t b_next, int32_t *c,
                             ptrdiff_t steps, int add)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i excess[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (ptrdiff_t step = 0; step < steps; step++)
        for (int group = 0; group < SIDE; group++)
            for (int half = 0; half < 2; half++)
                excess[half] = _mm512_dpbusd_epi32(
                    excess[half], flip, _mm512_loadu_si512(b + half * b_next + step * TILE_BYTES + group * DEPTH));
    for (int first = 0; first < PAIR; first += LINES) {
        const int upper = first / SIDE;
        const int8_t *rows = a + upper * a_next + first % SIDE * DEPTH;
        int32_t *place = c + upper * 512 + first % SIDE * SIDE;
        __m512i sums[LINES][2];
        for (int line = 0; line < LINES; line++)
            for (int half = 0; half < 2; half++) {
                const __m512i from = add ? _mm512_loadu_si512(place + half * 256 + line * SIDE) : _mm512_setzero_si512();
                sums[line][half] = _mm512_sub_epi32(from, excess[half]);
            }
        for (ptrdiff_t step = 0; step < steps; step++)
            for (int group = 0; group < SIDE; group++) {
                const int8_t *right = b + step * TILE_BYTES + group * DEPTH;
                const __m512i b0 = _mm512_loadu_si512(right), b1 = _mm512_loadu_si512(right + b_next);
                for (int line = 0; line < LINES; line++) {
                    int32_t four;
                    memcpy(&four, rows + step * TILE_BYTES + line * DEPTH + group * 4, sizeof four);
                    const __m512i left = _mm512_set1_epi32(four ^ (int32_t)0x80808080);
                    sums[line][0] = _mm512_dpbusd_epi32(sums[line][0], left, b0);
                    sums[line][1] = _mm512_dpbusd_epi32(sums[line][1], left, b1);
                }
            }
        for (int line = 0; line < LINES; line++)
            for (int half = 0; half < 2; half++)
                _mm512_storeu_si512(place + half * 256 + line * SIDE, sums[line][half]);
    }
}

VECTOR void split_by_vectors(const uint16_t *a, ptrdiff_t a_next, ptrdiff_t a_low, const uint16_t *b, ptrdiff_t b_next,
                             ptrdiff_t b_low, float *c, ptrdiff_t steps, int add)
{
    const ptrdiff_t tile = TILE_BYTES / 2, row = DEPTH / 2;
    for (int first = 0; first < PAIR; first += LINES) {
        const int upper = first / SIDE;
        const uint16_t *rows = a + upper * a_next + first % SIDE * row;
        float *place = c + upper * 512 + first % SIDE * SIDE;
        __m512 sums[LINES][2];
        for (int line = 0; line < LINES; line++)
            for (int half = 0; half < 2; half++)
                sums[line][half] = add ? _mm512_loadu_ps(place + half * 256 + line * SIDE) : _mm512_setzero_ps();
        for (ptrdiff_t step = 0; step < steps; step++)
            for (int group = 0; group < SIDE; group++) {
                const uint16_t *right = b + step * tile + group * row;
                for (int half = 0; half < 2; half++) {
                    const __m512bh high = (__m512bh)_mm512_loadu_si512(right + half * b_next);
                    const __m512bh low = (__m512bh)_mm512_loadu_si512(right + half * b_next + b_low);
                    for (int line = 0; line < LINES; line++) {
                        const uint16_t *left = rows + step * tile + line * row + group * 2;
                        int32_t two, rest;
                        memcpy(&two, left, sizeof two);
                        memcpy(&rest, left + a_low, sizeof rest);
                        const __m512bh own = (__m512bh)_mm512_set1_epi32(two);
                        sums[line][half] = _mm512_dpbf16_ps(sums[line][half], own, low);
                        sums[line][half] = _mm512_dpbf16_ps(sums[line][half], own, high);
                        sums[line][half] =
                            _mm512_dpbf16_ps(sums[line][half], (__m512bh)_mm512_set1_epi32(rest), high);
                    }
                }
            }
        for (int line = 0; line < LINES; line++)
            for (int half = 0; half < 2; half++)
                _mm512_storeu_ps(place + half * 256 + line * SIDE, sums[line][half]);
    }
}
#endif
