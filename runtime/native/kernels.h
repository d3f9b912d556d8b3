/* What the kernels of this folder share: the layout of tiles, and what each of them takes.

   A tile is 16 rows of 64 bytes, the size of an AMX register. The left side of a product of bytes lies as
   [rows / 16][depth / 64][16 rows][64 of the depth]; its right side as
   [columns / 16][depth / 64][16 groups of the depth][16 columns][4 of the depth]. Depths are padded to 64
   with zeros on the right side, rows to 32 with whatever is there. bfloat16 lies the same way with 32 of the
   depth in 64 bytes, and 2 instead of 4 side by side.

   There are two kinds of everything that multiplies tiles: by AMX, and by AVX-512 with VNNI and BF16. The sums
   of bytes are exact and so the same; those of bfloat16 differ in their order. */

#ifndef AUTOGLM_KERNELS_H
#define AUTOGLM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 13) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define HAS_KERNELS 1
#include <immintrin.h>
#define VECTOR                                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,bmi2")))
#endif

#define SIDE 16         /* rows of a tile */
#define TILE_BYTES 1024 /* of a tile */
#define DEPTH 64        /* bytes of the depth in a tile */
#define PAIR 32         /* rows and columns that a kernel computes at once: two tiles each */

enum { UNIT_NONE = 0, UNIT_VECTOR = 1, UNIT_MATRIX = 2 };

/* The best unit that processor, system and compiler have; AMX is asked for from the system on the way. */
int find_unit(void);

/* A matrix of n channels and `columns` inputs in block format; see blocks.py. */
typedef struct {
    const uint8_t *data;        /* (n, blocks, block_bytes) */
    const float *scales;        /* (n, blocks) */
    const uint8_t *zero_points; /* (n, zero_bytes), or NULL for symmetric formats */
    ptrdiff_t channels, columns, blocks, block_bytes, zero_bytes;
    int bits; /* of a field, 4 or 8 */
} Blocks;

/* For one panel of up to 128 channels: what turns their fields into bytes. */
typedef struct {
    uint16_t *factors, *offsets; /* (channels of the panel, blocks) */
    float *scales;               /* (channels of the panel) */
} Terms;

typedef struct {
    int unit;
    const int8_t *left; /* tiles */
    const float *row_scales;
    ptrdiff_t rows, depth; /* depth is padded to 64 */
    const float *bias;     /* (columns), or NULL */
    float *target;         /* (rows, stride) */
    ptrdiff_t stride;
} Product;

/* Bytes of scratch memory that a product takes. */
size_t room_bytes(ptrdiff_t rows, ptrdiff_t blocks);

/* target[:, column + c] = left times channel c of `one`; with `two`, silu(left times one) times (left times two).
   Threads that share `next`, which begins at 0, share the work. */
void multiply(const Product *product, const Blocks *one, const Blocks *two, ptrdiff_t column, int64_t *next,
              uint8_t *scratch);

/* Expansion of `count` channels, from `start` of the depth on, into a panel that holds `depth` of it. */
void find_terms(const Blocks *in, ptrdiff_t first, ptrdiff_t count, const Terms *terms);
void expand_panel(const Blocks *in, ptrdiff_t first, ptrdiff_t count, const Terms *terms, ptrdiff_t start,
                  ptrdiff_t depth, int8_t *panel);

/* Rows of hidden states: `width` values each, `count` of them from row `first` on. */
typedef struct {
    int8_t *tiles; /* written, or NULL */
    float *scales; /* written, per row */
    ptrdiff_t depth;
} Bytes;

void round_rows(const float *x, ptrdiff_t width, ptrdiff_t first, ptrdiff_t count, const Bytes *bytes);
void norm_rows(const float *x, const float *weight, float eps, ptrdiff_t width, ptrdiff_t first, ptrdiff_t count,
               const Bytes *bytes);
void join_rows(float *stream, const float *branch, const float *branch_weight, const float *weight, float eps,
               ptrdiff_t width, ptrdiff_t first, ptrdiff_t count, const Bytes *bytes);
void rotate_rows(float *x, ptrdiff_t stride, ptrdiff_t heads, ptrdiff_t head_dim, ptrdiff_t rotary, const float *cos,
                 const float *sin, ptrdiff_t first, ptrdiff_t count);

/* Attention of `tokens` queries to all keys, in float accuracy: every factor is the sum of two bfloat16. */
typedef struct {
    int unit, causal;
    const float *queries; /* (tokens, stride), heads side by side */
    ptrdiff_t stride, tokens, heads, kv_heads, head_dim, keys;
    const uint16_t *packed; /* of all kv_heads, one after another */
    float scale;
    float *target; /* (tokens, heads * head_dim) */
} Attention;

/* uint16 that pack_keys writes for one head of keys and values. */
ptrdiff_t packed_size(ptrdiff_t keys, ptrdiff_t head_dim);

/* Keys and values (count, head_dim) of one head, `stride` values apart, into tiles; the rest of the last block is zero. */
void pack_keys(const float *keys, const float *values, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t head_dim,
               uint16_t *packed);

/* All queries of all heads; threads that share `next`, which begins at 0, share the work. */
void attend(const Attention *attention, int64_t *next);

#ifdef HAS_KERNELS
/* c (32 x 32 int32, four tiles) = or += a (two tiles of rows) times b (two tiles of columns), `steps` tiles deep. */
typedef void BytesKernel(const int8_t *a, ptrdiff_t a_next, const int8_t *b, ptrdiff_t b_next, int32_t *c,
                         ptrdiff_t steps, int add);
BytesKernel bytes_by_vectors, bytes_by_matrices;

/* The same of floats that are sums of two bfloat16, high + low: three products, low times low is left out. */
typedef void SplitKernel(const uint16_t *a, ptrdiff_t a_next, ptrdiff_t a_low, const uint16_t *b, ptrdiff_t b_next,
                         ptrdiff_t b_low, float *c, ptrdiff_t steps, int add);
SplitKernel split_by_vectors, split_by_matrices;

/* AMX registers are shaped once per call of a kernel from outside, and given back at its end. */
void open_matrices(void);
void close_matrices(void);

VECTOR static inline __m512 exp_of(__m512 x)
{
    /* 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. */
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}
#endif
#endif
