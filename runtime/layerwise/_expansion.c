/* The work of expansion.py, compiled: fields of block-quantized weights become 8-bit integers.

   In: a tile of channels as a bundle stores it. Out: int8 (K, n) and the channels' scales, bit for bit what
   tiles.py gives; the arithmetic is told in blocks.py. Knows nothing of layers and threads; the interpreter's
   lock is released while it works.

   16 x 16 bytes are transposed at a time, in registers where the compiler has vectors; what follows are plain
   loops over neighbouring channels, which compilers vectorize by themselves. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 256 /* channels whose bytes lie transposed in the first cache: with 128 weights a block, 32 kB */
#define SIDE 16
#define MOST_BYTES 128 /* of one block: 128 weights of 8 bits */
#define ONE 256        /* block scales are multiples of the channel's scale divided by this */

typedef struct {
    const uint8_t *data;        /* (channels, blocks, block_bytes) */
    const float *scales;        /* (channels, blocks) */
    const uint8_t *zero_points; /* (channels, zero_bytes), or NULL for symmetric formats */
    Py_ssize_t channels, blocks, block_bytes, zero_bytes;
    int bits; /* of a field, 4 or 8 */
} Blocks;

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

/* One binary for all processors of a kind, where the loader can choose: glibc on x86-64. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

/* target[column][row] = source[row][column] for 16 x 16 bytes. */
static inline void turn_square(const uint8_t *source, Py_ssize_t stride, uint8_t *target)
{
#ifdef HAS_SHUFFLE
    typedef uint8_t Bytes __attribute__((vector_size(SIDE)));
    Bytes rows[SIDE], woven[SIDE];
    for (int row = 0; row < SIDE; row++)
        memcpy(&rows[row], source + row * stride, SIDE);
    for (int round = 0; round < 4; round++) { /* each doubles the run of bytes that come from one column */
        for (int pair = 0; pair < SIDE / 2; pair++) {
            woven[2 * pair] = __builtin_shufflevector(rows[pair], rows[pair + SIDE / 2], 0, 16, 1, 17, 2, 18, 3,
                                                      19, 4, 20, 5, 21, 6, 22, 7, 23);
            woven[2 * pair + 1] = __builtin_shufflevector(rows[pair], rows[pair + SIDE / 2], 8, 24, 9, 25, 10, 26,
                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, woven, sizeof rows);
    }
    for (int column = 0; column < SIDE; column++)
        memcpy(target + column * TILE, &rows[column], SIDE);
#else
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++)
            target[column * TILE + row] = source[row * stride + column];
#endif
}

/* One block of up to TILE channels: target[column][row] = source[row][column]. */
static inline void turn_block(const uint8_t *source, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns,
                              uint8_t *target)
{
    const Py_ssize_t whole = rows / SIDE * SIDE; /* columns are a multiple of SIDE: 32 weights of 4 bits, at least */
    for (Py_ssize_t row = 0; row < whole; row += SIDE)
        for (Py_ssize_t column = 0; column < columns; column += SIDE)
            turn_square(source + row * stride + column, stride, target + column * TILE + row);
    for (Py_ssize_t row = whole; row < rows; row++)
        for (Py_ssize_t column = 0; column < columns; column++)
            target[column * TILE + row] = source[row * stride + column];
}

static inline int zero_point(const Blocks *in, Py_ssize_t channel, Py_ssize_t block)
{
    if (in->zero_points == NULL)
        return 1 << (in->bits - 1);
    const uint8_t *row = in->zero_points + channel * in->zero_bytes;
    return in->bits == 8 ? row[block] : row[block / 2] >> (block % 2 * 4) & 15;
}

static inline int reach_of(int zero, int bits) /* the largest |q - z| that can be */
{
    const int above = (1 << bits) - 1 - zero;
    return zero > above ? zero : above;
}

/* Returns the scale of a channel; its R and 128 - z R go to every TILE-th place of factors and offsets. */
static inline float find_terms(const Blocks *in, Py_ssize_t channel, uint16_t *factors, uint16_t *offsets)
{
    const float *scales = in->scales + channel * in->blocks;
    float largest = 0;
    for (Py_ssize_t block = 0; block < in->blocks; block++) {
        const float value = fabsf(scales[block]) * (float)reach_of(zero_point(in, channel, block), in->bits);
        if (largest == largest && !(value <= largest)) /* what is no number stays */
            largest = value;
    }
    const float scale = largest / 127.0f, safe = scale > 0 ? scale : 1.0f;
    for (Py_ssize_t block = 0; block < in->blocks; block++) {
        const int zero = zero_point(in, channel, block);
        const float limit = (float)((127 * ONE + ONE / 2 - 1) / reach_of(zero, in->bits)); /* stay within 8 bits */
        const float ratio = rintf(scales[block] / safe * (float)ONE);
        const int factor = ratio != ratio ? 0 : (int)(ratio > limit ? limit : ratio < -limit ? -limit : ratio);
        factors[block * TILE] = (uint16_t)factor;
        offsets[block * TILE] = (uint16_t)(ONE / 2 - zero * factor);
    }
    return scale;
}

/* A field times the block's factor, plus its offset, in 16 bits; the high byte is the weight. */
#define WEIGH(field, place)                                                                                           \
    for (Py_ssize_t channel = 0; channel < count; channel++)                                                          \
        (place)[channel] = (int8_t)((uint16_t)((field) * factor[channel] + offset[channel]) >> 8)

/* terms: room for 2 * blocks * TILE numbers. */
FOR_EACH_CPU
static void expand_channels(const Blocks *in, int8_t *target, Py_ssize_t weights, Py_ssize_t stride, float *scales,
                            uint16_t *terms)
{
    uint8_t turned[MOST_BYTES * TILE];
    const Py_ssize_t row_bytes = in->blocks * in->block_bytes, fields = 8 / in->bits;
    for (Py_ssize_t first = 0; first < in->channels; first += TILE) {
        const Py_ssize_t count = in->channels - first < TILE ? in->channels - first : TILE;
        for (Py_ssize_t channel = 0; channel < count; channel++)
            scales[first + channel] =
                find_terms(in, first + channel, terms + channel, terms + in->blocks * TILE + channel);
        for (Py_ssize_t block = 0; block < in->blocks; block++) {
            const uint16_t *factor = terms + block * TILE, *offset = factor + in->blocks * TILE;
            turn_block(in->data + first * row_bytes + block * in->block_bytes, row_bytes, count, in->block_bytes,
                       turned);
            for (Py_ssize_t column = 0; column < in->block_bytes; column++) {
                const uint8_t *packed = turned + column * TILE;
                const Py_ssize_t weight = (block * in->block_bytes + column) * fields;
                int8_t *place = target + weight * stride + first;
                if (weight >= weights) /* the padding of the last block */
                    break;
                if (in->bits == 8) {
                    WEIGH(packed[channel], place);
                    continue;
                }
                WEIGH(packed[channel] & 15, place); /* the earlier weight is in the low half */
                if (weight + 1 < weights)
                    WEIGH(packed[channel] >> 4, place + stride);
            }
        }
    }
}

static int is_array(const Py_buffer *view, int dimensions, Py_ssize_t item_bytes, Py_ssize_t first)
{
    return view->ndim == dimensions && view->itemsize == item_bytes && view->shape[0] == first;
}

/* Whether the five buffers are what expand_tile says it takes. */
static int fit_together(const Py_buffer *views, int zeros, int bits)
{
    const Py_buffer *data = &views[0], *blocks = &views[1], *weights = &views[2], *scales = &views[3];
    if ((bits != 4 && bits != 8) || data->ndim != 3 || data->itemsize != 1)
        return 0;
    const Py_ssize_t channels = data->shape[0], count = data->shape[1], size = data->shape[2];
    if (size % SIDE != 0 || size < SIDE || size > MOST_BYTES)
        return 0;
    if (!is_array(blocks, 2, sizeof(float), channels) || blocks->shape[1] != count)
        return 0;
    if (weights->ndim != 2 || weights->itemsize != 1 || weights->shape[1] != channels ||
        weights->shape[0] > count * size * (8 / bits) || (channels > 1 && weights->strides[1] != 1) ||
        (weights->shape[0] > 1 && weights->strides[0] < channels))
        return 0;
    if (!is_array(scales, 1, sizeof(float), channels))
        return 0;
    return !zeros || (is_array(&views[4], 2, 1, channels) && views[4].shape[1] * 8 >= count * bits);
}

/* expand_tile(data, scales, zero_points or None, weights, channel_scales, bits): see tiles.py. */
static PyObject *expand_tile(PyObject *module, PyObject *arguments)
{
    PyObject *objects[5]; /* the zero points, which may not be there, come last */
    Py_buffer views[5];
    int bits, held = 0;
    uint16_t *terms = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOOi:expand_tile", &objects[0], &objects[1], &objects[4], &objects[2],
                          &objects[3], &bits))
        return NULL;
    const int zeros = objects[4] != Py_None;
    for (; held < 4 + zeros; held++) {
        const int flags = held == 2   ? PyBUF_STRIDES | PyBUF_WRITABLE
                          : held == 3 ? PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE
                                      : PyBUF_C_CONTIGUOUS;
        if (PyObject_GetBuffer(objects[held], &views[held], flags) != 0)
            goto end;
    }
    if (!fit_together(views, zeros, bits)) {
        PyErr_SetString(PyExc_ValueError, "expand_tile takes bytes (n, blocks, bytes), float32 (n, blocks), None or "
                                          "bytes (n, bytes), int8 (K, n) of neighbouring channels, float32 (n)");
        goto end;
    }
    terms = PyMem_Malloc((size_t)views[0].shape[1] * 2 * TILE * sizeof *terms);
    if (terms == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    const Blocks in = {
        .data = views[0].buf,
        .scales = views[1].buf,
        .zero_points = zeros ? views[4].buf : NULL,
        .channels = views[0].shape[0],
        .blocks = views[0].shape[1],
        .block_bytes = views[0].shape[2],
        .zero_bytes = zeros ? views[4].shape[1] : 0,
        .bits = bits,
    };
    Py_BEGIN_ALLOW_THREADS
    expand_channels(&in, views[2].buf, views[2].shape[0], views[2].strides[0], views[3].buf, terms);
    Py_END_ALLOW_THREADS
end:
    PyMem_Free(terms);
    for (int view = 0; view < held; view++)
        PyBuffer_Release(&views[view]);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}
static PyMethodDef methods[] = {
    {"expand_tile", expand_tile, METH_VARARGS, "Expand a tile of channels; see tiles.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_expansion", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__expansion(void)
{
    return PyModuleDef_Init(&definition);
}
