// The quantizer ops on a CPU, and what measures their inputs.
//
// Tensors come as dense memory: `rows` stretches of `cols` numbers, each with a table of its own (rows is 1 where a
// tensor has one table).

#include "tables.h"

// Calls body(row, first, count, block) for every block, on `threads` threads.
template <class Body> static void blocks(int64_t rows, int64_t cols, int threads, Body body) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < rows * each; ++b) {
        const int64_t row = b / each, first = (b % each) * BLOCK;
        body(row, row * cols + first, std::min(BLOCK, cols - first), b);
    }
}

// What a block reads: x itself or, where x has to go through a ReLU first, that of the block, written to `relu` (which may be x).
static inline const float *block_of(const float *x, float *relu, float top, int64_t first, int64_t n) {
    if (!relu) return x + first;
    over<1>(x + first, relu + first, n, false, [end = all(top)](const vec *v, vec *out) { *out = rectified(*v, end); });
    return relu + first;
}

// Calls body(part, first, last) for each of `threads` stretches of n entries, on as many threads.
template <class Body> static void stretches(int64_t n, int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) body(part, n * part / threads, n * (part + 1) / threads);
}

// Whether a tensor that is written to memory of its own is better written past the caches: one of more than 16 MB will not stay in them.
static bool past_caches(const float *to, const float *from, int64_t rows, int64_t cols) {
    return to != from && rows * cols > 1 << 22 && cols % LANES == 0 && (uintptr_t)to % BYTES == 0;
}

extern "C" {

void nulsq_quantize(const float *x, float *relu, float top, float *y, int64_t rows, int64_t cols, Rule rule, int threads) {
    const Levels levels(rule, rows);
    const bool past = !relu && past_caches(y, x, rows, cols);
    with_quantizer(rule, [&](auto *kind) {
        typedef std::remove_pointer_t<decltype(kind)> Quantizer;
        const Quantizer one(levels, 0);  // making one takes a while
        blocks(rows, cols, threads, [&](int64_t row, int64_t first, int64_t n, int64_t) {
            const float *in = block_of(x, relu, top, first, n);
            if (row) Quantizer(levels, row)(in, y + first, n, past);
            else one(in, y + first, n, past);
            if (past) written();
        });
    });
}

void nulsq_quantize_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, Rule rule, float *to_table, int behind_relu,
                             float top, const float *others, int threads) {
    const Levels levels(rule, rows);
    const Behind behind{behind_relu != 0, top, others, past_caches(dx, g, rows, cols)};
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
    with_gradient(rule, [&](auto *kind) {
        typedef std::remove_pointer_t<decltype(kind)> Gradient;
        std::vector<double> sums(rows * each * Gradient::SUMS);
        const Gradient one(levels, 0);
        blocks(rows, cols, threads, [&](int64_t row, int64_t first, int64_t n, int64_t b) {
            Gradient gradient = row ? Gradient(levels, row) : one;
            gradient(g + first, x + first, dx + first, n, behind.from(first));
            gradient.take(&sums[b * Gradient::SUMS]);
            if (behind.past) written();
        });
        for (int64_t row = 0; row < rows; ++row)
            total_of<Gradient>(&sums[row * each * Gradient::SUMS], each, levels, row, to_table);
    });
}

void nulsq_around(const float *gaps, float *levels, int rows, int count, int negative) { around(gaps, levels, rows, count, negative); }

void nulsq_around_backward(const float *g, float *to_gaps, int rows, int count, int negative) {
    around_backward(g, to_gaps, rows, count, negative);
}

void nulsq_keep_positive(float *steps, int rows, int count, float share, float smallest) {
    for (int row = 0; row < rows; ++row, steps += count) {
        double sum = 0;
        for (int k = 0; k < count; ++k) sum += steps[k] < 0 ? 0.f : steps[k];
        const float least = std::max((float)(sum / count) * share, smallest);  // not a number where one of them is none
        for (int k = 0; k < count; ++k) steps[k] = steps[k] >= least ? steps[k] : least;
    }
}

// Sum, sum of sizes, sum of squares, least and largest, in float64: sums of blocks, added in the order of the blocks.
void nulsq_moments(const float *x, int64_t n, double *out, int threads) {
    const int64_t each = (n + BLOCK - 1) / BLOCK;
    std::vector<double> found(each * 5);
    blocks(1, n, threads, [=, &found](int64_t, int64_t first, int64_t count, int64_t b) {
        wide sum = {}, sizes = {}, squares = {};
        vec least = all(INF), largest = all(-INF);
        const auto see = [&](const float *at) {
            const vec v = load(at);
            least = v < least ? v : least, largest = v > largest ? v : largest;
            for (int part = 0; part < 2; ++part) {
                half in;
                std::memcpy(&in, at + part * LANES / 2, sizeof in);
                const wide w = __builtin_convertvector(in, wide);
                sum += w, sizes += w < 0 ? -w : w, squares += w * w;
            }
        };
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) see(x + first + i);
        if (i < count) {  // what is left, filled up with zeros, which no sum sees; the ends are asked entry by entry
            float rest[LANES] = {};
            std::memcpy(rest, x + first + i, (count - i) * sizeof(float));
            const vec low = least, high = largest;
            see(rest);
            least = low, largest = high;
            for (int64_t j = 0; j < count - i; ++j) least[j] = std::min(least[j], rest[j]), largest[j] = std::max(largest[j], rest[j]);
        }
        double *own = &found[b * 5];
        std::fill(own, own + 3, 0.0);
        for (int j = 0; j < LANES / 2; ++j) own[0] += sum[j], own[1] += sizes[j], own[2] += squares[j];
        own[3] = INF, own[4] = -INF;
        for (int j = 0; j < LANES; ++j) own[3] = std::min<double>(own[3], least[j]), own[4] = std::max<double>(own[4], largest[j]);
    });
    std::fill(out, out + 3, 0.0);
    out[3] = INF, out[4] = -INF;
    for (int64_t b = 0; b < each; ++b) {
        for (int k = 0; k < 3; ++k) out[k] += found[b * 5 + k];
        out[3] = std::min(out[3], found[b * 5 + 3]), out[4] = std::max(out[4], found[b * 5 + 4]);
    }
}

// Adds to counts[middle + floor(x * scale)], for finite x that fall into its 2 * middle bins.
void nulsq_histogram(const float *x, int64_t n, double scale, int64_t *counts, int middle, int threads) {
    const int COPIES = 4, bins = 2 * middle;  // neighbours often fall into one bin, and a counter is not ready again at once
    std::vector<uint32_t> tables((size_t)threads * COPIES * bins);
    stretches(n, threads, [=, &tables](int part, int64_t first, int64_t last) {
        uint32_t *own = &tables[(size_t)part * COPIES * bins] + middle;
        int32_t places[512];
        for (int64_t i = first; i < last; i += 512) {
            const int count = (int)std::min<int64_t>(512, last - i);
            int j = 0;
            if (scale >= 1)  // a power of two: nothing is rounded, unless tiny values become too small
                for (; j + LANES <= count; j += LANES) {
                    const vec v = load(x + i + j) * (float)scale;
                    const mask toward_zero = __builtin_convertvector(v, mask);
                    const mask place = toward_zero + (__builtin_convertvector(toward_zero, vec) > v);
                    std::memcpy(places + j, &place, sizeof place);
                }
            for (; j < count; ++j) places[j] = (int32_t)std::floor(x[i + j] * scale);
            for (j = 0; j + COPIES <= count; j += COPIES)
                for (int k = 0; k < COPIES; ++k) ++own[k * bins + places[j + k]];
            for (; j < count; ++j) ++own[places[j]];
        }
    });
    for (int table = 0; table < threads * COPIES; ++table)
        for (int k = 0; k < bins; ++k) counts[k] += tables[(size_t)table * bins + k];
}

}
