/* Attention of many queries at once, in blocks of keys, with the softmax carried along (Milakov and Gimelshein 2018;
   Dao et al. 2022): memory is linear in keys, and nothing of the size queries times keys is ever stored.

   Every float is taken as the sum of two bfloat16, which have 16 bits of it together, and a product as the sum of
   three: the fourth, low times low, is below the last of these bits. Blocks of keys begin at multiples of KEYS,
   whatever a prompt is cut into, so a token's result does not depend on that. */

#include "kernels.h"

#ifdef HAS_KERNELS
#include <string.h>

#define KEYS 128 /* of a block; packed, 128 kB with heads of 128 */
#define WIDEST 256
#define LANES 16
#define TILE (TILE_BYTES / 2) /* bfloat16 of a tile */
#define STEP 32               /* of the depth in a tile */

static ptrdiff_t padded(ptrdiff_t head_dim) { return (head_dim + STEP - 1) / STEP * STEP; }

static ptrdiff_t block_size(ptrdiff_t head_dim) { return 4 * KEYS * padded(head_dim); }

ptrdiff_t packed_size(ptrdiff_t keys, ptrdiff_t head_dim) { return (keys + KEYS - 1) / KEYS * block_size(head_dim); }

/* The nearest bfloat16, as a float, and the nearest one to what is left. */
VECTOR static inline __m512 high_of(__m512 x)
{
    const __m256i near = (__m256i)_mm512_cvtneps_pbh(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(near), 16));
}

VECTOR static inline __m512i pair_of(__m512 lower, __m512 upper) { return (__m512i)_mm512_cvtne2ps_pbh(upper, lower); }

VECTOR static inline void split_pair(__m512 lower, __m512 upper, uint16_t *high, uint16_t *low)
{
    const __m512 first = high_of(lower), second = high_of(upper);
    _mm512_storeu_si512(high, pair_of(first, second));
    _mm512_storeu_si512(low, pair_of(_mm512_sub_ps(lower, first), _mm512_sub_ps(upper, second)));
}

VECTOR static inline __m512 some(const float *x, ptrdiff_t left, float factor)
{
    const __mmask16 there = left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << (left > 0 ? left : 0)) - 1);
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(there, x), _mm512_set1_ps(factor));
}

VECTOR void pack_keys(const float *keys, const float *values, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t head_dim,
                      uint16_t *packed)
{
    const ptrdiff_t deep = padded(head_dim), part = KEYS * deep;
    float wide[2 * WIDEST];
    for (ptrdiff_t first = 0; first < count; first += KEYS, packed += block_size(head_dim)) {
        const ptrdiff_t here = count - first < KEYS ? count - first : KEYS;
        uint16_t *key_high = packed, *key_low = packed + part, *value_high = packed + 2 * part,
                 *value_low = packed + 3 * part;
        if (here < KEYS)
            memset(packed, 0, (size_t)(4 * part) * sizeof *packed);
        for (ptrdiff_t key = 0; key < here; key++) {
            /* Two of the depth side by side, keys along a row of the tile. */
            const float *row = keys + (first + key) * stride;
            uint16_t high[WIDEST], low[WIDEST];
            for (ptrdiff_t place = 0; place < deep; place += STEP)
                split_pair(some(row + place, head_dim - place, 1), some(row + place + LANES, head_dim - place - LANES, 1),
                           high + place, low + place);
            const ptrdiff_t column = key / SIDE * (deep / STEP * TILE) + key % SIDE * 2;
            for (ptrdiff_t two = 0; two < deep; two += 2) {
                const ptrdiff_t place = column + two / STEP * TILE + two % STEP / 2 * STEP;
                memcpy(key_high + place, high + two, 4);
                memcpy(key_low + place, low + two, 4);
            }
        }
        for (ptrdiff_t key = 0; key < here; key += 2) {
            /* Two keys side by side, the head's values along a row of the tile. */
            const float *row = values + (first + key) * stride, *other = row + stride;
            for (ptrdiff_t place = 0; place < deep; place += LANES) {
                const __m512 one = some(row + place, head_dim - place, 1);
                const __m512 two = key + 1 < here ? some(other + place, head_dim - place, 1) : _mm512_setzero_ps();
                const __m512i evens = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                const __m512i odds = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
                _mm512_storeu_ps(wide, _mm512_permutex2var_ps(one, evens, two));
                _mm512_storeu_ps(wide + LANES, _mm512_permutex2var_ps(one, odds, two));
                const ptrdiff_t target = place / SIDE * (KEYS / STEP * TILE) + key / STEP * TILE + key % STEP / 2 * STEP;
                split_pair(_mm512_loadu_ps(wide), _mm512_loadu_ps(wide + LANES), value_high + target,
                           value_low + target);
            }
        }
    }
}

typedef struct {
    uint16_t query[2][PAIR * WIDEST], weight[2][PAIR * KEYS]; /* high and low, in tiles */
    float scores[PAIR * KEYS], result[PAIR * WIDEST];         /* in pairs of tiles */
    float most[PAIR], sum[PAIR];
} Room __attribute__((aligned(64)));

/* Where the 16 columns `sixteen` of a row lie in 32 x 32 results side by side. */
static inline ptrdiff_t place_of(ptrdiff_t row, ptrdiff_t sixteen)
{
    return sixteen / 2 * (PAIR * PAIR) + row / SIDE * 512 + sixteen % 2 * 256 + row % SIDE * SIDE;
}

VECTOR static void take_queries(const Attention *given, ptrdiff_t head, ptrdiff_t token, Room *room)
{
    const ptrdiff_t deep = padded(given->head_dim);
    for (ptrdiff_t row = 0; row < PAIR; row++) {
        const int is_there = token + row < given->tokens;
        const float *own = given->queries + (is_there ? token + row : token) * given->stride + head * given->head_dim;
        for (ptrdiff_t place = 0; place < deep; place += STEP) {
            const ptrdiff_t target = row / SIDE * (SIDE * deep) + place / STEP * TILE + row % SIDE * STEP;
            split_pair(some(own + place, given->head_dim - place, given->scale),
                       some(own + place + LANES, given->head_dim - place - LANES, given->scale),
                       room->query[0] + target, room->query[1] + target);
        }
    }
}

/* Scores of one row become weights, `seen` keys of the block being there for it. Returns what the row's earlier
   results are to be multiplied by. */
VECTOR static float weigh_row(Room *room, ptrdiff_t row, ptrdiff_t seen)
{
    __m512 scores[KEYS / LANES], most = _mm512_set1_ps(room->most[row]), sum = _mm512_setzero_ps();
    __mmask16 there[KEYS / LANES];
    for (int lane = 0; lane < KEYS / LANES; lane++) {
        const ptrdiff_t left = seen - lane * LANES;
        there[lane] = left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << (left > 0 ? left : 0)) - 1);
        scores[lane] = _mm512_loadu_ps(room->scores + place_of(row, lane));
        most = _mm512_mask_max_ps(most, there[lane], most, scores[lane]);
    }
    const float before = room->most[row], largest = _mm512_reduce_max_ps(most);
    for (int lane = 0; lane < KEYS / LANES; lane++) {
        scores[lane] = _mm512_maskz_mov_ps(there[lane], exp_of(_mm512_sub_ps(scores[lane], _mm512_set1_ps(largest))));
        sum = _mm512_add_ps(sum, scores[lane]);
    }
    for (int lane = 0; lane < KEYS / LANES; lane += 2) {
        const ptrdiff_t target = row / SIDE * (SIDE * KEYS) + lane / 2 * TILE + row % SIDE * STEP;
        split_pair(scores[lane], scores[lane + 1], room->weight[0] + target, room->weight[1] + target);
    }
    const float factor =
        before == largest ? 1.0f : _mm512_cvtss_f32(exp_of(_mm512_set1_ps(before - largest)));
    room->most[row] = largest;
    room->sum[row] = room->sum[row] * factor + _mm512_reduce_add_ps(sum);
    return factor;
}

VECTOR static void attend_block(const Attention *given, ptrdiff_t head, ptrdiff_t token, Room *room)
{
    SplitKernel *kernel = given->unit == UNIT_MATRIX ? split_by_matrices : split_by_vectors;
    const ptrdiff_t deep = padded(given->head_dim), part = KEYS * deep;
    const ptrdiff_t past = given->keys - given->tokens;
    const ptrdiff_t last = token + PAIR < given->tokens ? token + PAIR : given->tokens;
    const ptrdiff_t visible = given->causal ? past + last : given->keys;
    const uint16_t *packed = given->packed + head / (given->heads / given->kv_heads) *
                                                 packed_size(given->keys, given->head_dim);
    take_queries(given, head, token, room);
    for (ptrdiff_t row = 0; row < PAIR; row++)
        room->most[row] = -3e38f, room->sum[row] = 0;
    for (ptrdiff_t first = 0; first < visible; first += KEYS, packed += block_size(given->head_dim)) {
        for (ptrdiff_t key = 0; key < KEYS; key += PAIR)
            kernel(room->query[0], SIDE * deep, room->query[1] - room->query[0], packed + key * deep, SIDE * deep, part,
                   room->scores + key * PAIR, deep / STEP, 0);
        for (ptrdiff_t row = 0; row < PAIR; row++) {
            const ptrdiff_t end = given->causal && token + row < given->tokens ? past + token + row + 1 : visible;
            const float factor = weigh_row(room, row, end - first);
            if (first > 0 && factor != 1.0f)
                for (ptrdiff_t sixteen = 0; sixteen < deep / LANES; sixteen++) {
                    float *own = room->result + place_of(row, sixteen);
                    _mm512_storeu_ps(own, _mm512_mul_ps(_mm512_loadu_ps(own), _mm512_set1_ps(factor)));
                }
        }
        for (ptrdiff_t column = 0; column < deep; column += PAIR)
            kernel(room->weight[0], SIDE * KEYS, room->weight[1] - room->weight[0], packed + 2 * part + column * KEYS,
                   SIDE * KEYS, part, room->result + column * PAIR, KEYS / STEP, first > 0);
    }
    for (ptrdiff_t row = 0; row < PAIR && token + row < given->tokens; row++) {
        float *target = given->target + ((token + row) * given->heads + head) * given->head_dim;
        for (ptrdiff_t place = 0; place < given->head_dim; place += LANES) {
            const ptrdiff_t left = given->head_dim - place;
            const __mmask16 there = left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
            const __m512 value = _mm512_loadu_ps(room->result + place_of(row, place / LANES));
            _mm512_mask_storeu_ps(target + place, there, _mm512_div_ps(value, _mm512_set1_ps(room->sum[row])));
        }
    }
}

void attend(const Attention *given, int64_t *next)
{
    Room room;
    const ptrdiff_t blocks = (given->tokens + PAIR - 1) / PAIR;
    if (given->unit == UNIT_MATRIX)
        open_matrices();
    for (;;) {
        const ptrdiff_t task = (ptrdiff_t)__atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (task >= blocks * given->heads)
            break;
        /* Late tokens first: they see the most keys, and what is left at the end is short. */
        attend_block(given, task % given->heads, (blocks - 1 - task / given->heads) * PAIR, &room);
    }
    if (given->unit == UNIT_MATRIX)
        close_matrices();
}
#endif
