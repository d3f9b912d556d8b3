/* The kernels as a Python module, `_kernels`: buffers are checked for their sizes, the interpreter's lock is let go. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

#ifdef HAS_KERNELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ASK_FOR_STATE 0x1023 /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
#define TILE_STATE 18

int find_unit(void)
{
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vnni") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1))
        return UNIT_NONE;
    const int tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
    return tiles && syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_STATE) == 0 ? UNIT_MATRIX : UNIT_VECTOR;
}

/* Buffers of one call, released together. */
typedef struct {
    Py_buffer views[12];
    int count;
} Held;

static void release(Held *held)
{
    while (held->count > 0)
        PyBuffer_Release(&held->views[--held->count]);
}

/* The memory of a contiguous buffer of at least `items` of `item_bytes`; NULL with an error set. */
static void *take(Held *held, PyObject *object, const char *name, Py_ssize_t item_bytes, Py_ssize_t items, int written)
{
    Py_buffer *view = &held->views[held->count];
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | (written ? PyBUF_WRITABLE : 0)) != 0)
        return NULL;
    held->count++;
    if (view->itemsize == item_bytes && items >= 0 && view->len / item_bytes >= items)
        return view->buf;
    PyErr_Format(PyExc_ValueError, "%s has %zd values of %zd bytes, must have %zd of %zd", name,
                 view->len / view->itemsize, view->itemsize, items, item_bytes);
    return NULL;
}

static int are_sizes(int good)
{
    if (!good)
        PyErr_SetString(PyExc_ValueError, "sizes are out of range");
    return good;
}

/* (data, scales, zero points or None, channels, columns, bits) */
static int take_blocks(Held *held, PyObject *matrix, Blocks *found)
{
    PyObject *data, *scales, *zeros;
    Py_ssize_t channels, columns;
    if (!PyArg_ParseTuple(matrix, "OOOnni", &data, &scales, &zeros, &channels, &columns, &found->bits))
        return 0;
    if (!are_sizes(channels > 0 && columns > 0 && (found->bits == 4 || found->bits == 8)))
        return 0;
    found->channels = channels;
    found->columns = columns;
    found->data = take(held, data, "data", 1, 1, 0);
    if (found->data == NULL)
        return 0;
    const Py_buffer *view = &held->views[held->count - 1];
    found->scales = take(held, scales, "scales", 4, channels, 0);
    if (found->scales == NULL)
        return 0;
    found->blocks = held->views[held->count - 1].len / 4 / channels;
    found->block_bytes = view->len / channels / found->blocks;
    const Py_ssize_t size = found->block_bytes * 8 / found->bits;
    if (!are_sizes((size == 32 || size == 64 || size == 128) && found->blocks * size >= columns &&
                   (found->blocks - 1) * size < columns &&
                   view->len == channels * found->blocks * found->block_bytes))
        return 0;
    found->zero_points = NULL;
    found->zero_bytes = (found->blocks * found->bits + 7) / 8;
    if (zeros == Py_None)
        return 1;
    found->zero_points = take(held, zeros, "zero points", 1, channels * found->zero_bytes, 0);
    return found->zero_points != NULL;
}

static Py_ssize_t up_to(Py_ssize_t value, Py_ssize_t step) { return (value + step - 1) / step * step; }

static PyObject *end(Held *held)
{
    release(held);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_multiply(PyObject *module, PyObject *arguments)
{
    PyObject *left, *row_scales, *bias, *target, *one, *two, *next, *scratch;
    Py_ssize_t rows, stride, column;
    Held held = {.count = 0};
    Product product;
    Blocks matrices[2];
    (void)module;
    if (!PyArg_ParseTuple(arguments, "iOOnOOnnOOOO:multiply", &product.unit, &left, &row_scales, &rows, &bias, &target,
                          &stride, &column, &one, &two, &next, &scratch))
        return NULL;
    if (!take_blocks(&held, one, &matrices[0]) || (two != Py_None && !take_blocks(&held, two, &matrices[1])))
        return end(&held);
    const Blocks *first = &matrices[0], *second = two == Py_None ? NULL : &matrices[1];
    if (!are_sizes(rows > 0 && column >= 0 && column + first->channels <= stride &&
                   (second == NULL || (second->channels == first->channels && second->columns == first->columns &&
                                       second->blocks == first->blocks && bias == Py_None)) &&
                   (product.unit == UNIT_VECTOR || product.unit == UNIT_MATRIX)))
        return end(&held);
    product.rows = rows;
    product.depth = up_to(first->columns, DEPTH);
    product.stride = stride;
    product.bias = NULL;
    product.left = take(&held, left, "left", 1, up_to(rows, PAIR) * product.depth, 0);
    if (product.left == NULL)
        return end(&held);
    product.row_scales = take(&held, row_scales, "row scales", 4, rows, 0);
    if (product.row_scales == NULL)
        return end(&held);
    if (bias != Py_None && (product.bias = take(&held, bias, "bias", 4, first->channels, 0)) == NULL)
        return end(&held);
    product.target = take(&held, target, "target", 4, rows * stride, 1);
    if (product.target == NULL)
        return end(&held);
    int64_t *counter = take(&held, next, "next", 8, 1, 1);
    if (counter == NULL)
        return end(&held);
    uint8_t *room = take(&held, scratch, "scratch", 1, (Py_ssize_t)room_bytes(rows, first->blocks), 1);
    if (room == NULL)
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    multiply(&product, first, second, column, counter, room);
    Py_END_ALLOW_THREADS
    return end(&held);
}

/* Tiles and scales of `rows` rows; fills `bytes`. */
static int take_bytes(Held *held, PyObject *tiles, PyObject *scales, Py_ssize_t rows, Py_ssize_t width, Bytes *bytes)
{
    bytes->depth = up_to(width, DEPTH);
    bytes->tiles = take(held, tiles, "tiles", 1, up_to(rows, PAIR) * bytes->depth, 1);
    if (bytes->tiles == NULL)
        return 0;
    bytes->scales = take(held, scales, "row scales", 4, rows, 1);
    return bytes->scales != NULL;
}

static int are_rows(Py_ssize_t width, Py_ssize_t first, Py_ssize_t count)
{
    return are_sizes(width > 0 && first >= 0 && count >= 0);
}

static PyObject *py_round(PyObject *module, PyObject *arguments)
{
    PyObject *x, *weight, *tiles, *scales;
    Py_ssize_t width, first, count;
    float eps;
    Held held = {.count = 0};
    Bytes bytes;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOfnnnOO:round_rows", &x, &weight, &eps, &width, &first, &count, &tiles, &scales))
        return NULL;
    if (!are_rows(width, first, count))
        return NULL;
    const float *rows = take(&held, x, "x", 4, (first + count) * width, 0), *by = NULL;
    if (rows == NULL || (weight != Py_None && (by = take(&held, weight, "weight", 4, width, 0)) == NULL) ||
        !take_bytes(&held, tiles, scales, first + count, width, &bytes))
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    if (by == NULL)
        round_rows(rows, width, first, count, &bytes);
    else
        norm_rows(rows, by, eps, width, first, count, &bytes);
    Py_END_ALLOW_THREADS
    return end(&held);
}

static PyObject *py_join(PyObject *module, PyObject *arguments)
{
    PyObject *stream, *branch, *branch_weight, *weight, *tiles, *scales;
    Py_ssize_t width, first, count;
    float eps;
    Held held = {.count = 0};
    Bytes bytes = {.tiles = NULL};
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOfnnnOO:join_rows", &stream, &branch, &branch_weight, &weight, &eps, &width,
                          &first, &count, &tiles, &scales))
        return NULL;
    if (!are_rows(width, first, count))
        return NULL;
    float *own = take(&held, stream, "stream", 4, (first + count) * width, 1);
    const float *added = own == NULL ? NULL : take(&held, branch, "branch", 4, (first + count) * width, 0);
    const float *by = added == NULL ? NULL : take(&held, branch_weight, "branch weight", 4, width, 0), *then = NULL;
    if (by == NULL || (weight != Py_None && ((then = take(&held, weight, "weight", 4, width, 0)) == NULL ||
                                             !take_bytes(&held, tiles, scales, first + count, width, &bytes))))
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    join_rows(own, added, by, then, eps, width, first, count, &bytes);
    Py_END_ALLOW_THREADS
    return end(&held);
}

static PyObject *py_rotate(PyObject *module, PyObject *arguments)
{
    PyObject *x, *cos, *sin;
    Py_ssize_t stride, heads, head_dim, rotary, first, count;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OnnnnOOnn:rotate_rows", &x, &stride, &heads, &head_dim, &rotary, &cos, &sin,
                          &first, &count))
        return NULL;
    if (!are_rows(stride, first, count) ||
        !are_sizes(heads > 0 && rotary >= 0 && rotary % 2 == 0 && rotary <= head_dim && heads * head_dim <= stride))
        return NULL;
    float *rows = take(&held, x, "x", 4, (first + count) * stride, 1);
    const float *by_cos = rows == NULL ? NULL : take(&held, cos, "cos", 4, (first + count) * rotary / 2, 0);
    const float *by_sin = by_cos == NULL ? NULL : take(&held, sin, "sin", 4, (first + count) * rotary / 2, 0);
    if (by_sin == NULL)
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    rotate_rows(rows, stride, heads, head_dim, rotary, by_cos, by_sin, first, count);
    Py_END_ALLOW_THREADS
    return end(&held);
}

static PyObject *py_pack(PyObject *module, PyObject *arguments)
{
    PyObject *keys, *values, *packed;
    Py_ssize_t stride, count, head_dim;
    Held held = {.count = 0};
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOnnnO:pack_keys", &keys, &values, &stride, &count, &head_dim, &packed))
        return NULL;
    if (!are_sizes(count > 0 && head_dim > 0 && head_dim <= 256 && stride >= head_dim))
        return NULL;
    const Py_ssize_t size = (count - 1) * stride + head_dim;
    const float *own = take(&held, keys, "keys", 4, size, 0);
    const float *held_values = own == NULL ? NULL : take(&held, values, "values", 4, size, 0);
    uint16_t *target =
        held_values == NULL ? NULL : take(&held, packed, "packed", 2, packed_size(count, head_dim), 1);
    if (target == NULL)
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    pack_keys(own, held_values, stride, count, head_dim, target);
    Py_END_ALLOW_THREADS
    return end(&held);
}

static PyObject *py_attend(PyObject *module, PyObject *arguments)
{
    PyObject *queries, *packed, *target, *next;
    Py_ssize_t stride, tokens, heads, kv_heads, head_dim, keys;
    Held held = {.count = 0};
    Attention given;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "iiOnnnnnnfOOO:attend", &given.unit, &given.causal, &queries, &stride, &tokens,
                          &heads, &kv_heads, &head_dim, &keys, &given.scale, &packed, &target, &next))
        return NULL;
    if (!are_sizes(tokens > 0 && keys >= (given.causal ? tokens : 1) && head_dim > 0 && head_dim <= 256 &&
                   kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads * head_dim <= stride &&
                   (given.unit == UNIT_VECTOR || given.unit == UNIT_MATRIX)))
        return NULL;
    given.stride = stride, given.tokens = tokens, given.heads = heads, given.kv_heads = kv_heads;
    given.head_dim = head_dim, given.keys = keys;
    given.queries = take(&held, queries, "queries", 4, tokens * stride, 0);
    if (given.queries == NULL)
        return end(&held);
    given.packed = take(&held, packed, "packed", 2, kv_heads * packed_size(keys, head_dim), 0);
    if (given.packed == NULL)
        return end(&held);
    given.target = take(&held, target, "target", 4, tokens * heads * head_dim, 1);
    if (given.target == NULL)
        return end(&held);
    int64_t *counter = take(&held, next, "next", 8, 1, 1);
    if (counter == NULL)
        return end(&held);
    Py_BEGIN_ALLOW_THREADS
    attend(&given, counter);
    Py_END_ALLOW_THREADS
    return end(&held);
}

static PyObject *py_room_bytes(PyObject *module, PyObject *arguments)
{
    Py_ssize_t rows, blocks;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nn:room_bytes", &rows, &blocks) || !are_sizes(rows > 0 && blocks > 0))
        return NULL;
    return PyLong_FromSize_t(room_bytes(rows, blocks));
}

static PyObject *py_packed_size(PyObject *module, PyObject *arguments)
{
    Py_ssize_t keys, head_dim;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "nn:packed_size", &keys, &head_dim) || !are_sizes(keys > 0 && head_dim > 0))
        return NULL;
    return PyLong_FromSsize_t(packed_size(keys, head_dim));
}
#endif

static PyObject *py_find_unit(PyObject *module, PyObject *arguments)
{
    (void)module;
    (void)arguments;
#ifdef HAS_KERNELS
    return PyLong_FromLong(find_unit());
#else
    return PyLong_FromLong(UNIT_NONE);
#endif
}

static PyMethodDef methods[] = {
    {"find_unit", py_find_unit, METH_NOARGS, "2 with AMX, 1 with AVX-512 VNNI and BF16, 0 where nothing else works."},
#ifdef HAS_KERNELS
    {"room_bytes", py_room_bytes, METH_VARARGS, "Scratch memory of a product."},
    {"packed_size", py_packed_size, METH_VARARGS, "uint16 of one head's packed keys and values."},
    {"multiply", py_multiply, METH_VARARGS, "Bytes times block-quantized weights; see product.c."},
    {"round_rows", py_round, METH_VARARGS, "Rows, normed if a weight is given, as bytes; see rows.c."},
    {"join_rows", py_join, METH_VARARGS, "Adds a normed branch to the stream; see rows.c."},
    {"rotate_rows", py_rotate, METH_VARARGS, "Rotary embedding, in place; see rows.c."},
    {"pack_keys", py_pack, METH_VARARGS, "Keys and values of a head as tiles; see attention.c."},
    {"attend", py_attend, METH_VARARGS, "Attention; see attention.c."},
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
