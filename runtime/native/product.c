/* Bytes times block-quantized weights. A panel of 128 channels is expanded into a core's second cache, all rows go
   past it, and the next panel takes its place: weights are never in memory in 8 bits.

   y = sum * channel scale * row scale + bias, where the sum is an exact integer. */

#include "kernels.h"

#ifdef HAS_KERNELS
#define PANEL 128          /* channels: at 4,096 of the depth, half a megabyte */
#define DEPTH_AT_ONCE 4096 /* of a panel, which stays in the second cache */
#define DEPTH_IN_FIRST 512 /* of 32 rows, which stay in the first one for all channels of a panel */
#define SUMS (PAIR * PANEL) /* of 32 rows, in tiles */

typedef struct {
    int8_t *panel;  /* PANEL channels, DEPTH_AT_ONCE deep */
    int32_t *sums;  /* SUMS for every 32 rows */
    Terms terms[2]; /* of gate and up, or of the one matrix */
} Room;

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Lays a room out in scratch memory; returns its bytes. */
static size_t lay_out(Room *room, uint8_t *scratch, ptrdiff_t rows, ptrdiff_t blocks)
{
    size_t place = 0;
    const size_t numbers = aligned((size_t)PANEL * (size_t)blocks * sizeof(uint16_t));
    room->panel = (int8_t *)scratch;
    place += PANEL * DEPTH_AT_ONCE;
    room->sums = (int32_t *)(scratch + place);
    place += (size_t)(rows + PAIR - 1) / PAIR * SUMS * sizeof(int32_t);
    for (int matrix = 0; matrix < 2; matrix++) {
        room->terms[matrix].factors = (uint16_t *)(scratch + place);
        place += numbers;
        room->terms[matrix].offsets = (uint16_t *)(scratch + place);
        place += numbers;
        room->terms[matrix].scales = (float *)(scratch + place);
        place += PANEL * sizeof(float);
    }
    return place;
}

size_t room_bytes(ptrdiff_t rows, ptrdiff_t blocks)
{
    Room room;
    return lay_out(&room, NULL, rows, blocks) + 64;
}

/* Which of 16 columns are there. */
static inline __mmask16 columns_from(ptrdiff_t own, ptrdiff_t count)
{
    return count - own >= SIDE ? (__mmask16)0xffff : (__mmask16)((1u << (count - own)) - 1);
}

/* Where the sums of a row and of 16 columns are. */
static inline const int32_t *sums_of(const int32_t *sums, ptrdiff_t line, ptrdiff_t own)
{
    return sums + own / PAIR * (PAIR * PAIR) + line / SIDE * 512 + own / SIDE % 2 * 256 + line % SIDE * SIDE;
}

/* Row by row: what a row gets lies side by side, and the next row is in another page. */
VECTOR static void write_plain(const Product *product, const Room *room, const int32_t *sums, ptrdiff_t row,
                               ptrdiff_t first, ptrdiff_t count, ptrdiff_t column)
{
    for (ptrdiff_t line = 0; line < PAIR && row + line < product->rows; line++) {
        const __m512 by_row = _mm512_set1_ps(product->row_scales[row + line]);
        float *target = product->target + (row + line) * product->stride + column;
        for (ptrdiff_t own = 0; own < count; own += SIDE) {
            const __mmask16 there = columns_from(own, count);
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums_of(sums, line, own)));
            const __m512 scale = _mm512_maskz_loadu_ps(there, room->terms[0].scales + own);
            __m512 value = _mm512_mul_ps(_mm512_mul_ps(sum, scale), by_row);
            if (product->bias != NULL)
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, product->bias + first + own));
            _mm512_mask_storeu_ps(target + own, there, value);
        }
    }
}

/* The first half of the panel's columns are of the gate. */
VECTOR static void write_gated(const Product *product, const Room *room, const int32_t *sums, ptrdiff_t row,
                               ptrdiff_t count, ptrdiff_t column)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    for (ptrdiff_t line = 0; line < PAIR && row + line < product->rows; line++) {
        const __m512 by_row = _mm512_set1_ps(product->row_scales[row + line]);
        float *target = product->target + (row + line) * product->stride + column;
        for (ptrdiff_t own = 0; own < count; own += SIDE) {
            const __mmask16 there = columns_from(own, count);
            const __m512 gates = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums_of(sums, line, own)));
            const __m512 ups = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums_of(sums, line, PANEL / 2 + own)));
            const __m512 gate_scale = _mm512_maskz_loadu_ps(there, room->terms[0].scales + own);
            const __m512 up_scale = _mm512_maskz_loadu_ps(there, room->terms[1].scales + own);
            const __m512 gate = _mm512_mul_ps(_mm512_mul_ps(gates, gate_scale), by_row);
            const __m512 up = _mm512_mul_ps(_mm512_mul_ps(ups, up_scale), by_row);
            const __m512 silu =
                _mm512_div_ps(gate, _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
            _mm512_mask_storeu_ps(target + own, there, _mm512_mul_ps(silu, up));
        }
    }
}

/* Channels `first` to `first + count` of one matrix, or half as many of two. */
VECTOR static void multiply_panel(const Product *product, const Blocks *one, const Blocks *two, ptrdiff_t first,
                                  ptrdiff_t count, ptrdiff_t column, const Room *room)
{
    BytesKernel *kernel = product->unit == UNIT_MATRIX ? bytes_by_matrices : bytes_by_vectors;
    const ptrdiff_t pieces = (product->depth + DEPTH_AT_ONCE - 1) / DEPTH_AT_ONCE;
    const ptrdiff_t usual = (product->depth / DEPTH + pieces - 1) / pieces * DEPTH;
    /* Columns that are not there hold whatever was there before, and are not written. */
    const ptrdiff_t half = PANEL / 2, width = two == NULL ? (count + PAIR - 1) / PAIR * PAIR : PANEL;
    find_terms(one, first, count, &room->terms[0]);
    if (two != NULL)
        find_terms(two, first, count, &room->terms[1]);
    for (ptrdiff_t start = 0; start < product->depth; start += usual) {
        const ptrdiff_t deep = product->depth - start < usual ? product->depth - start : usual;
        const int is_last = start + deep == product->depth;
        expand_panel(one, first, count, &room->terms[0], start, deep, room->panel);
        if (two != NULL)
            expand_panel(two, first, count, &room->terms[1], start, deep, room->panel + half * deep);
        for (ptrdiff_t row = 0; row < product->rows; row += PAIR) {
            const int8_t *left = product->left + row * product->depth + start * SIDE;
            int32_t *sums = pieces > 1 ? room->sums + row / PAIR * SUMS : room->sums;
            for (ptrdiff_t place = 0; place < deep; place += DEPTH_IN_FIRST) {
                const ptrdiff_t steps = (deep - place < DEPTH_IN_FIRST ? deep - place : DEPTH_IN_FIRST) / DEPTH;
                for (ptrdiff_t own = 0; own < width; own += PAIR)
                    kernel(left + place * SIDE, SIDE * product->depth, room->panel + own * deep + place * SIDE,
                           SIDE * deep, sums + own * PAIR, steps, start + place > 0);
            }
            if (!is_last)
                continue;
            if (two == NULL)
                write_plain(product, room, sums, row, first, count, column + first);
            else
                write_gated(product, room, sums, row, count, column + first);
        }
    }
}

void multiply(const Product *product, const Blocks *one, const Blocks *two, ptrdiff_t column, int64_t *next,
              uint8_t *scratch)
{
    const ptrdiff_t most = two == NULL ? PANEL : PANEL / 2;
    Room room;
    lay_out(&room, (uint8_t *)aligned((size_t)scratch), product->rows, one->blocks);
    if (product->unit == UNIT_MATRIX)
        open_matrices();
    for (;;) {
        const ptrdiff_t first = (ptrdiff_t)__atomic_fetch_add(next, 1, __ATOMIC_RELAXED) * most;
        if (first >= one->channels)
            break;
        const ptrdiff_t count = one->channels - first < most ? one->channels - first : most;
        multiply_panel(product, one, two, first, count, column, &room);
    }
    if (product->unit == UNIT_MATRIX)
        close_matrices();
}
#endif
