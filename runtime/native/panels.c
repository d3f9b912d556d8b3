/* Expansion: fields of block-quantized weights become 8-bit integers, in tiles, a few channels at a time.

   The same integers as expansion.py gives, whose arithmetic is told in blocks.py; only where they are put differs.
   A 16-bit lane holds two neighbouring weights of a channel, and what is computed is the high byte of each. */

#include "kernels.h"

#ifdef HAS_KERNELS
#define ONE 256
#define TOP (127 * ONE + ONE / 2 - 1)

/* Zero points of 16 blocks from `block` on. */
VECTOR static inline __m512i zeros_of(const Blocks *in, ptrdiff_t channel, ptrdiff_t block, int count)
{
    if (in->zero_points == NULL)
        return _mm512_set1_epi32(1 << (in->bits - 1));
    const uint8_t *row = in->zero_points + channel * in->zero_bytes;
    if (in->bits == 8)
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), row + block));
    const __m128i pairs = _mm_maskz_loadu_epi8((__mmask16)((1u << (count + 1) / 2) - 1), row + block / 2);
    const __m128i low = _mm_set1_epi8(15);
    return _mm512_cvtepu8_epi32(
        _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low)));
}

VECTOR void find_terms(const Blocks *in, ptrdiff_t first, ptrdiff_t count, const Terms *terms)
{
    const __m512i most = _mm512_set1_epi32((1 << in->bits) - 1);
    for (ptrdiff_t own = 0; own < count; own++) {
        const ptrdiff_t channel = first + own;
        const float *scales = in->scales + channel * in->blocks;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 broken = 0; /* a scale that is no number makes the channel's one that, as in numpy */
        for (ptrdiff_t block = 0; block < in->blocks; block += 16) {
            const int here = in->blocks - block < 16 ? (int)(in->blocks - block) : 16;
            const __m512 scale = _mm512_maskz_loadu_ps((__mmask16)((1u << here) - 1), scales + block);
            const __m512i zero = zeros_of(in, channel, block, here);
            const __m512 reach = _mm512_cvtepi32_ps(_mm512_max_epi32(zero, _mm512_sub_epi32(most, zero)));
            const __m512 value = _mm512_mul_ps(_mm512_abs_ps(scale), reach);
            broken |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
            largest = _mm512_max_ps(largest, value);
        }
        const float found = broken ? __builtin_nanf("") : _mm512_reduce_max_ps(largest) / 127.0f;
        const __m512 safe = _mm512_set1_ps(found > 0 ? found : 1.0f);
        terms->scales[own] = found;
        uint16_t *factors = terms->factors + own * in->blocks, *offsets = terms->offsets + own * in->blocks;
        for (ptrdiff_t block = 0; block < in->blocks; block += 16) {
            const int here = in->blocks - block < 16 ? (int)(in->blocks - block) : 16;
            const __mmask16 there = (__mmask16)((1u << here) - 1);
            const __m512 scale = _mm512_maskz_loadu_ps(there, scales + block);
            const __m512i zero = zeros_of(in, channel, block, here);
            const __m512 reach = _mm512_cvtepi32_ps(_mm512_max_epi32(zero, _mm512_sub_epi32(most, zero)));
            const __m512 limit = _mm512_roundscale_ps(_mm512_div_ps(_mm512_set1_ps(TOP), reach), 9); /* down */
            __m512 ratio =
                _mm512_roundscale_ps(_mm512_mul_ps(_mm512_div_ps(scale, safe), _mm512_set1_ps(ONE)), 8); /* nearest */
            ratio = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(ratio, ratio, _CMP_ORD_Q), ratio);
            ratio = _mm512_max_ps(_mm512_min_ps(ratio, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
            const __m512i factor = _mm512_cvtps_epi32(ratio);
            const __m512i offset = _mm512_sub_epi32(_mm512_set1_epi32(ONE / 2), _mm512_mullo_epi32(zero, factor));
            _mm512_mask_cvtepi32_storeu_epi16(factors + block, there, factor);
            _mm512_mask_cvtepi32_storeu_epi16(offsets + block, there, offset);
        }
    }
}

/* What is the same for all channels of a panel at one place of the depth. */
typedef struct {
    ptrdiff_t byte, block, next; /* of a row; `next` is the block of the second half */
    __mmask64 stored, weights;   /* bytes that are there, weights that are */
} Place;

static inline __mmask64 lowest(ptrdiff_t count)
{
    return count >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << (count > 0 ? count : 0)) - 1;
}

static inline Place place_at(const Blocks *in, ptrdiff_t block_size, ptrdiff_t weight)
{
    const ptrdiff_t byte = weight * in->bits / 8, block = weight / block_size;
    const ptrdiff_t next = block_size == 32 ? block + 1 : block, end = in->blocks - 1;
    return (Place){byte, block < end ? block : end, next < end ? next : end,
                   lowest(in->blocks * in->block_bytes - byte), lowest(in->columns - weight)};
}

/* 64 weights of a channel, those beyond the last one 0. */
VECTOR static inline __attribute__((always_inline)) __m512i weigh(const uint8_t *row, const uint16_t *factors,
                                                                  const uint16_t *offsets, const Place *at,
                                                                  const int bits, const int halves)
{
    __m512i even, odd;
    if (bits == 4) {
        const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)at->stored, row + at->byte));
        even = _mm512_and_si512(wide, _mm512_set1_epi16(15));
        odd = _mm512_srli_epi16(wide, 4);
    } else {
        const __m512i wide = _mm512_maskz_loadu_epi8(at->stored, row + at->byte);
        even = _mm512_and_si512(wide, _mm512_set1_epi16(255));
        odd = _mm512_srli_epi16(wide, 8);
    }
    __m512i factor = _mm512_set1_epi16((short)factors[at->block]);
    __m512i offset = _mm512_set1_epi16((short)offsets[at->block]);
    if (halves) {
        factor = _mm512_mask_set1_epi16(factor, 0xffff0000u, (short)factors[at->next]);
        offset = _mm512_mask_set1_epi16(offset, 0xffff0000u, (short)offsets[at->next]);
    }
    even = _mm512_srli_epi16(_mm512_add_epi16(_mm512_mullo_epi16(even, factor), offset), 8);
    odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, factor), offset);
    return _mm512_maskz_mov_epi8(at->weights, _mm512_or_si512(even, _mm512_andnot_si512(_mm512_set1_epi16(255), odd)));
}

/* Rows of 16 groups of four bytes become rows of one group of 16 channels. */
VECTOR static inline void turn(__m512i *rows)
{
    __m512i woven[SIDE];
    for (int row = 0; row < SIDE; row += 2) {
        woven[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
        woven[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
    }
    for (int row = 0; row < SIDE; row += 4) {
        rows[row] = _mm512_unpacklo_epi64(woven[row], woven[row + 2]);
        rows[row + 1] = _mm512_unpackhi_epi64(woven[row], woven[row + 2]);
        rows[row + 2] = _mm512_unpacklo_epi64(woven[row + 1], woven[row + 3]);
        rows[row + 3] = _mm512_unpackhi_epi64(woven[row + 1], woven[row + 3]);
    }
    /* Now a row holds, per quarter, one group of its four channels. */
    for (int row = 0; row < 4; row++)
        for (int pair = 0; pair < 2; pair++) {
            woven[row + 8 * pair] = _mm512_shuffle_i32x4(rows[row + 8 * pair], rows[row + 4 + 8 * pair], 0x88);
            woven[row + 4 + 8 * pair] = _mm512_shuffle_i32x4(rows[row + 8 * pair], rows[row + 4 + 8 * pair], 0xdd);
        }
    for (int row = 0; row < 8; row++) {
        rows[row] = _mm512_shuffle_i32x4(woven[row], woven[row + 8], 0x88);
        rows[row + 8] = _mm512_shuffle_i32x4(woven[row], woven[row + 8], 0xdd);
    }
}

#define AHEAD 8 /* steps that a row is asked for before its turn: it comes from memory, and 16 rows at a time */

VECTOR static inline __attribute__((always_inline)) void expand(const Blocks *in, ptrdiff_t first, ptrdiff_t count,
                                                                const Terms *terms, ptrdiff_t start, ptrdiff_t depth,
                                                                int8_t *panel, const int bits, const int halves)
{
    const ptrdiff_t row_bytes = in->blocks * in->block_bytes, steps = depth / DEPTH;
    const ptrdiff_t block_size = in->block_bytes * 8 / bits, step_bytes = DEPTH * bits / 8;
    for (ptrdiff_t own = 0; own < count; own += SIDE) {
        const ptrdiff_t lines = count - own < SIDE ? count - own : SIDE;
        const uint8_t *row = in->data + (first + own) * row_bytes;
        const uint16_t *factors = terms->factors + own * in->blocks, *offsets = terms->offsets + own * in->blocks;
        for (ptrdiff_t step = 0; step < steps; step++) {
            const Place at = place_at(in, block_size, start + step * DEPTH);
            const uint8_t *later = row + at.byte + AHEAD * step_bytes;
            if (step + AHEAD >= steps) /* the next 16 channels, which lie behind these */
                later += SIDE * row_bytes - steps * step_bytes;
            __m512i rows[SIDE];
            for (ptrdiff_t line = 0; line < SIDE; line++) {
                const ptrdiff_t there = line < lines ? line : 0;
                rows[line] = weigh(row + there * row_bytes, factors + there * in->blocks, offsets + there * in->blocks,
                                   &at, bits, halves);
                _mm_prefetch((const char *)later + line * row_bytes, _MM_HINT_T0);
            }
            turn(rows);
            int8_t *tile = panel + own * depth + step * TILE_BYTES;
            for (int line = 0; line < SIDE; line++)
                _mm512_storeu_si512(tile + line * DEPTH, rows[line]);
        }
    }
}

VECTOR void expand_panel(const Blocks *in, ptrdiff_t first, ptrdiff_t count, const Terms *terms, ptrdiff_t start,
                         ptrdiff_t depth, int8_t *panel)
{
    const int halves = in->block_bytes * 8 / in->bits == 32;
    if (in->bits == 4 && halves)
        expand(in, first, count, terms, start, depth, panel, 4, 1);
    else if (in->bits == 4)
        expand(in, first, count, terms, start, depth, panel, 4, 0);
    else
        expand(in, first, count, terms, start, depth, panel, 8, halves);
}
#endif
