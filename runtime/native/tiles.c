/* Products of tiles: 32 x 32 results at a time, by AMX or by AVX-512. The layout is told in kernels.h. */

#include "kernels.h"

#ifdef HAS_KERNELS
#include <string.h>

/* Instructions as such, since the intrinsics do not tell every compiler that they touch memory (gcc 12). Compilers know
   nothing of these registers, so nothing has to be kept for them. */
#define LOAD(tile, from) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((ptrdiff_t)DEPTH) : "memory")
#define STORE(tile, to) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((ptrdiff_t)DEPTH) : "memory")
#define CLEAR(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define ADD_BYTES(to, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #to : : :)
#define ADD_FLOATS(to, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #to : : :)

void open_matrices(void)
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

void close_matrices(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* Registers 0 to 3 are the results: the four tiles at c, 256 values of 4 bytes each, or zeros. */
static inline void take_results(const void *c, int add)
{
    const char *tile = c;
    if (add) {
        LOAD(0, tile);
        LOAD(1, tile + TILE_BYTES);
        LOAD(2, tile + 2 * TILE_BYTES);
        LOAD(3, tile + 3 * TILE_BYTES);
    } else {
        CLEAR(0);
        CLEAR(1);
        CLEAR(2);
        CLEAR(3);
    }
}

static inline void give_results(void *c)
{
    char *tile = c;
    STORE(0, tile);
    STORE(1, tile + TILE_BYTES);
    STORE(2, tile + 2 * TILE_BYTES);
    STORE(3, tile + 3 * TILE_BYTES);
}

void bytes_by_matrices(const int8_t *a, ptrdiff_t a_next, const int8_t *b, ptrdiff_t b_next, int32_t *c,
                       ptrdiff_t steps, int add)
{
    take_results(c, add);
    for (ptrdiff_t step = 0; step < steps; step++) {
        LOAD(4, a + step * TILE_BYTES);
        LOAD(6, b + step * TILE_BYTES);
        LOAD(5, a + a_next + step * TILE_BYTES);
        LOAD(7, b + b_next + step * TILE_BYTES);
        ADD_BYTES(0, 4, 6);
        ADD_BYTES(1, 4, 7);
        ADD_BYTES(2, 5, 6);
        ADD_BYTES(3, 5, 7);
    }
    give_results(c);
}

void split_by_matrices(const uint16_t *a, ptrdiff_t a_next, ptrdiff_t a_low, const uint16_t *b, ptrdiff_t b_next,
                              ptrdiff_t b_low, float *c, ptrdiff_t steps, int add)
{
    const ptrdiff_t tile = TILE_BYTES / 2;
    take_results(c, add);
    for (ptrdiff_t step = 0; step < steps; step++) {
        const uint16_t *left = a + step * tile, *right = b + step * tile;
        LOAD(4, left);
        LOAD(5, left + a_next);
        LOAD(6, right + b_low);
        LOAD(7, right + b_next + b_low);
        ADD_FLOATS(0, 4, 6);
        ADD_FLOATS(1, 4, 7);
        ADD_FLOATS(2, 5, 6);
        ADD_FLOATS(3, 5, 7);
        LOAD(6, right);
        LOAD(7, right + b_next);
        ADD_FLOATS(0, 4, 6);
        ADD_FLOATS(1, 4, 7);
        ADD_FLOATS(2, 5, 6);
        ADD_FLOATS(3, 5, 7);
        LOAD(4, left + a_low);
        LOAD(5, left + a_next + a_low);
        ADD_FLOATS(0, 4, 6);
        ADD_FLOATS(1, 4, 7);
        ADD_FLOATS(2, 5, 6);
        ADD_FLOATS(3, 5, 7);
    }
    give_results(c);
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

/* sum += pairs of bfloat16 times pairs of bfloat16; its intrinsic, given one pair for all lanes, crashes clang 16. */
#define ADD_PAIRS(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

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
                    const __m512i high = _mm512_loadu_si512(right + half * b_next);
                    const __m512i low = _mm512_loadu_si512(right + half * b_next + b_low);
                    for (int line = 0; line < LINES; line++) {
                        const uint16_t *left = rows + step * tile + line * row + group * 2;
                        int32_t two, rest;
                        memcpy(&two, left, sizeof two);
                        memcpy(&rest, left + a_low, sizeof rest);
                        const __m512i own = _mm512_set1_epi32(two);
                        ADD_PAIRS(sums[line][half], own, low);
                        ADD_PAIRS(sums[line][half], own, high);
                        ADD_PAIRS(sums[line][half], _mm512_set1_epi32(rest), high);
                    }
                }
            }
        for (int line = 0; line < LINES; line++)
            for (int half = 0; half < 2; half++)
                _mm512_storeu_ps(place + half * 256 + line * SIDE, sums[line][half]);
    }
}
#endif
