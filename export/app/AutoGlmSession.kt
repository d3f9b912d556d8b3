/*
 * Runs a bundle of autoglm-edge on a phone: sessions, KV cache, prefill, greedy decoding.
 *
 * In: the folder that `autoglm export --android` laid out, in storage of the app's own; token ids and patches.
 * Out: token ids. Text and pixels are the app's affair: docs/android.md says what a tokenizer and an image
 * processor must do. Needs com.microsoft.onnxruntime:onnxruntime-android, the release named in app.json, and
 * nothing else. One answer at a time; call it from one thread that is not the main one.
 */
package dev.autoglm.edge

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxTensorLike
import ai.onnxruntime.OnnxValue
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import org.json.JSONObject

/**
 * A picture as the vision graph takes it.
 *
 * @param patches rows * columns rows of patch values, blocks of merge * merge patches after one another; direct.
 * @param rows patches from top to bottom, a multiple of the merge size.
 * @param columns patches from left to right, a multiple of the merge size.
 */
class Picture(val patches: FloatBuffer, val rows: Int, val columns: Int)

/** Positions of a prompt, (3, T) row by row: time, height, width; and the position of the next token. */
class Positions(val values: LongArray, val next: Long)

/**
 * Position of every token on three axes. Text counts up by one on all of them. A picture that begins at p has
 * time p, height p + row and width p + column; what follows goes on at p + the larger side.
 *
 * @param ids a placeholder per image token.
 * @param pictures rows and columns of each in patches, in the order of their placeholders.
 */
fun positionsOf(ids: LongArray, pictures: List<IntArray>, imageToken: Long, merge: Int): Positions {
    val length = ids.size
    val values = LongArray(3 * length)
    var position = 0L
    var index = 0
    var picture = 0
    while (index < length) {
        if (ids[index] != imageToken) {
            for (axis in 0 until 3) values[axis * length + index] = position
            position++
            index++
            continue
        }
        require(picture < pictures.size) { "more image placeholders than pictures" }
        val rows = pictures[picture][0] / merge
        val columns = pictures[picture][1] / merge
        require(index + rows * columns <= length) { "picture $picture has too few placeholders" }
        for (row in 0 until rows) {
            for (column in 0 until columns) {
                require(ids[index] == imageToken) { "the placeholders of picture $picture are interrupted" }
                values[index] = position
                values[length + index] = position + row
                values[2 * length + index] = position + column
                index++
            }
        }
        position += maxOf(rows, columns)
        picture++
    }
    require(picture == pictures.size) { "more pictures than image placeholders" }
    return Positions(values, position)
}

/**
 * The three graphs of a bundle, and keys and values of one conversation.
 *
 * @param folder holds app.json and model/.
 * @param capacity tokens that prompt and answer may have together. Their memory is set aside here:
 *     bytes_per_token of app.json times this.
 * @param threads the fast cores of the phone, not all of them.
 */
class AutoGlmSession(folder: File, private val capacity: Int, threads: Int) : AutoCloseable {
    private val app = JSONObject(File(folder, "app.json").readText())
    private val environment = OrtEnvironment.getEnvironment()
    private val layers: Int
    private val vocab: Int
    private val hidden: Int
    private val merge: Int
    private val imageToken: Long
    private val ends: Set<Int>
    private val activations: OnnxJavaType
    private val valueBytes: Int
    private val embedding: OrtSession
    private val decoder: OrtSession
    private val openVision: () -> OrtSession
    private var vision: OrtSession? = null
    private val cache = LinkedHashMap<String, OnnxTensor>()

    /** Tokens in the cache. */
    var length = 0
        private set

    init {
        val geometry = app.getJSONObject("geometry")
        layers = geometry.getInt("layers")
        vocab = geometry.getInt("vocab")
        hidden = geometry.getInt("hidden")
        merge = app.getJSONObject("image").getInt("merge_size")
        val tokens = app.getJSONObject("tokens")
        imageToken = tokens.getLong("image")
        val list = tokens.getJSONArray("eos")
        ends = (0 until list.length()).map { list.getInt(it) }.toSet()
        activations = javaType(app.getString("activations"))
        valueBytes = activations.size
        require(capacity in 1..geometry.getInt("context_length")) { "the model has no positions for $capacity tokens" }

        fun open(part: String): OrtSession {
            val described = app.getJSONObject("parts").getJSONObject(part)
            val options = OrtSession.SessionOptions()
            options.setIntraOpNumThreads(threads)
            options.setInterOpNumThreads(1)
            // A waiting thread sleeps: spinning costs battery and heat, and time where cores are shared.
            options.addConfigEntry("session.intra_op.allow_spinning", "0")
            // A graph with prepared weights was saved optimized; to optimize it again would lose them.
            if (described.getBoolean("optimized")) options.setOptimizationLevel(OrtSession.SessionOptions.OptLevel.NO_OPT)
            val entries = described.getJSONObject("session_entries")
            for (name in entries.keys()) options.addConfigEntry(name, entries.getString(name))
            // By path, so that the weights beside the graph are mapped. A byte array would be copied twice.
            return environment.createSession(File(folder, described.getString("graph")).path, options)
        }
        embedding = open("embedding")
        decoder = open("decoder")
        openVision = { open("vision") }

        val kv = app.getJSONObject("kv")
        val kind = javaType(kv.getString("dtype"))
        val shape = longArrayOf(1, kv.getLong("heads"), capacity.toLong(), kv.getLong("head_dim"))
        val bytes = shape[1] * shape[2] * shape[3] * kind.size
        require(bytes <= Int.MAX_VALUE) { "a buffer of $bytes bytes is too large for Java, take fewer tokens" }
        for (layer in 0 until layers) {
            for (name in arrayOf("key", "value")) {
                cache["$layer.$name"] = OnnxTensor.createTensor(environment, direct(bytes.toInt()), shape, kind)
            }
        }
    }

    /** Forget the conversation; the memory stays. */
    fun clear() {
        length = 0
    }

    /**
     * Answer a prompt, greedily.
     *
     * @param ids of the whole prompt, a placeholder per image token.
     * @param onToken told of each token of the answer but the one that ends it; false stops.
     * @return how many tokens were given.
     */
    fun answer(ids: LongArray, pictures: List<Picture>, maxTokens: Int, onToken: (Int) -> Boolean): Int {
        require(ids.isNotEmpty() && ids.size + maxTokens <= capacity) { "prompt and answer do not fit $capacity tokens" }
        clear()
        val positions = positionsOf(ids, pictures.map { intArrayOf(it.rows, it.columns) }, imageToken, merge)
        val features = features(pictures)
        val embedded = features.use { embed(ids, it) }
        var logits = embedded.use { prefill(it, ids.size, positions) }
        var position = positions.next
        for (count in 0 until maxTokens) {
            val token = best(logits)
            if (token in ends || !onToken(token)) return count
            val next = longArrayOf(token.toLong())
            val state = noFeatures().use { embed(next, it) }
            logits = state.use { step(it, 1, longArrayOf(position, position, position)) }
            position++
        }
        return maxTokens
    }

    override fun close() {
        cache.values.forEach { it.close() }
        vision?.close()
        decoder.close()
        embedding.close()
    }

    /** (N, C) of all pictures, one run of the vision graph each. */
    private fun features(pictures: List<Picture>): OnnxTensor {
        if (pictures.isEmpty()) return noFeatures()
        val session = vision ?: openVision().also { vision = it }
        val parts = pictures.map { picture ->
            val count = picture.rows.toLong() * picture.columns
            val width = picture.patches.remaining() / count
            val grid = LongBuffer.wrap(longArrayOf(1, picture.rows.toLong(), picture.columns.toLong()))
            OnnxTensor.createTensor(environment, picture.patches, longArrayOf(count, width)).use { pixels ->
                OnnxTensor.createTensor(environment, grid, longArrayOf(1, 3)).use { thw ->
                    val inputs: Map<String, OnnxTensorLike> = mapOf("pixel_values" to pixels, "image_grid_thw" to thw)
                    session.run(inputs).use { (it.get(0) as OnnxTensor).byteBuffer }
                }
            }
        }
        val all = direct(parts.map { it.remaining() }.sum())
        parts.forEach { all.put(it) }
        all.rewind()
        val tokens = all.remaining().toLong() / (hidden * valueBytes)
        return OnnxTensor.createTensor(environment, all, longArrayOf(tokens, hidden.toLong()), activations)
    }

    private fun noFeatures(): OnnxTensor {
        val nothing = direct(valueBytes).also { it.limit(0) }
        return OnnxTensor.createTensor(environment, nothing, longArrayOf(0, hidden.toLong()), activations)
    }

    /** (1, T, C) of T ids; features take the places of placeholders, in reading order. */
    private fun embed(ids: LongArray, features: OnnxTensor): OnnxTensor {
        val shape = longArrayOf(1, ids.size.toLong())
        OnnxTensor.createTensor(environment, LongBuffer.wrap(ids), shape).use { tokens ->
            val inputs: Map<String, OnnxTensorLike> = mapOf("input_ids" to tokens, "image_features" to features)
            embedding.run(inputs).use { result ->
                val bytes = (result.get(0) as OnnxTensor).byteBuffer
                val own = direct(bytes.remaining()).also { it.put(bytes); it.rewind() }
                return OnnxTensor.createTensor(environment, own, longArrayOf(1, ids.size.toLong(), hidden.toLong()), activations)
            }
        }
    }

    /** A prompt in pieces, which bounds the memory of activations; the logits after its last token. */
    private fun prefill(embedded: OnnxTensor, count: Int, positions: Positions): FloatArray {
        val bytes = embedded.byteBuffer
        val width = hidden * valueBytes
        var logits = FloatArray(0)
        var start = 0
        while (start < count) {
            val stop = minOf(start + PREFILL_CHUNK, count)
            val piece = direct((stop - start) * width)
            val source = bytes.duplicate()
            source.limit(stop * width)
            source.position(start * width)
            piece.put(source)
            piece.rewind()
            val places = LongArray(3 * (stop - start))
            for (axis in 0 until 3) {
                positions.values.copyInto(places, axis * (stop - start), axis * count + start, axis * count + stop)
            }
            val shape = longArrayOf(1, (stop - start).toLong(), hidden.toLong())
            OnnxTensor.createTensor(environment, piece, shape, activations).use { logits = step(it, stop - start, places) }
            start = stop
        }
        return logits
    }

    /**
     * Append T tokens to the cache and score the last one.
     *
     * Past and present are the same buffers, as long as the capacity: the graph writes behind the tokens in use.
     * How many are in use is said by the length of the mask alone.
     */
    private fun step(states: OnnxTensor, count: Int, positions: LongArray): FloatArray {
        val total = length + count
        val mask = LongArray(total) { 1L }
        OnnxTensor.createTensor(environment, LongBuffer.wrap(mask), longArrayOf(1, total.toLong())).use { used ->
            OnnxTensor.createTensor(environment, LongBuffer.wrap(positions), longArrayOf(3, 1, count.toLong())).use { places ->
                val inputs = LinkedHashMap<String, OnnxTensorLike>()
                inputs["inputs_embeds"] = states
                inputs["attention_mask"] = used
                inputs["position_ids"] = places
                // num_logits_to_keep is left out: it has the value 1, and the Java API knows no optional inputs.
                val outputs = LinkedHashMap<String, OnnxValue>()
                for ((name, buffer) in cache) {
                    inputs["past_key_values.$name"] = buffer
                    outputs["present.$name"] = buffer
                }
                decoder.run(inputs, setOf("logits"), outputs, null).use { result ->
                    val scores = FloatArray(vocab)
                    (result.get("logits").get() as OnnxTensor).floatBuffer.get(scores)
                    length = total
                    return scores
                }
            }
        }
    }

    private fun best(logits: FloatArray): Int {
        var found = 0
        for (token in logits.indices) if (logits[token] > logits[found]) found = token
        return found
    }

    private fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

    private fun javaType(name: String): OnnxJavaType = when (name) {
        "float32" -> OnnxJavaType.FLOAT
        "float16" -> OnnxJavaType.FLOAT16
        "int8" -> OnnxJavaType.INT8
        else -> throw IllegalArgumentException("app.json names the type $name")
    }

    private companion object {
        /** Tokens of a prompt that are run at once. */
        const val PREFILL_CHUNK = 512
    }
}
