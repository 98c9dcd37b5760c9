// The quantizer ops on a CPU: each loop is a copy of an eager function beside it, and is tested against that one.
//
// Tensors come as dense memory: `rows` stretches of `cols` numbers, each with a table of its own (rows is 1 where a
// tensor has one table). Work is cut into blocks of a fixed size, sums are kept per block and added in the order of
// the blocks: the result has the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#define BYTES 64
#else
#define BYTES 32
#endif
typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t mask __attribute__((vector_size(BYTES)));
typedef double wide __attribute__((vector_size(BYTES)));
typedef float half __attribute__((vector_size(BYTES / 2)));

static const int64_t LANES = BYTES / sizeof(float), BLOCK = 4096;
static const float INF = std::numeric_limits<float>::infinity();

static inline vec load(const float *p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec all(float s) { return s - vec{}; }
static inline vec where(mask m, vec v) { return (vec)((mask)v & m); }
static inline void add_above(vec &sum, vec v, vec a, vec b) {  // where a is above b
#ifdef __AVX512F__
    sum = (vec)_mm512_mask_add_ps((__m512)sum, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ), (__m512)sum, (__m512)v);
#else
    sum += where(a > b, v);
#endif
}
static inline double lanes(vec v) { double s = 0; for (int j = 0; j < LANES; ++j) s += v[j]; return s; }

// Calls body(row, first, count, block) for every block, on `threads` threads.
template <class Body> static void blocks(int64_t rows, int64_t cols, int threads, Body body) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < rows * each; ++b) {
        const int64_t row = b / each, first = (b % each) * BLOCK;
        body(row, row * cols + first, std::min(BLOCK, cols - first), b);
    }
}

// Runs step(x, y), which takes WIDE vectors, over a stretch; what is left goes through buffers.
template <int WIDE, class Step> static inline void over(const float *x, float *y, int64_t n, Step step) {
    vec in[WIDE], out[WIDE];
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        for (int w = 0; w < WIDE; ++w) in[w] = load(x + i + w * LANES);
        step(in, out);
        for (int w = 0; w < WIDE; ++w) store(y + i + w * LANES, out[w]);
    }
    if (i < n) {
        for (int w = 0; w < WIDE; ++w) in[w] = vec{};
        std::memcpy(in, x + i, (n - i) * sizeof(float));
        step(in, out);
        std::memcpy(y + i, out, (n - i) * sizeof(float));
    }
}

// What a block reads: x itself or, where x has to go through a ReLU first, that of the block, written to `relu` (which may be x).
static inline const float *block_of(const float *x, float *relu, int64_t first, int64_t n) {
    if (!relu) return x + first;
    over<1>(x + first, relu + first, n, [](const vec *v, vec *out) { *out = where(~(*v <= vec{}), *v); });
    return relu + first;
}

// What follows the gradient to x: nothing, or the ReLU that x came out of. Where x is 0 that passes nothing; elsewhere also what
// others that read x hand back.
struct Behind {
    bool relu;
    const float *others;
    Behind from(int64_t first) const { return {relu, others ? others + first : nullptr}; }
};

// The same for step(g, x, dx), which takes WIDE vectors of each at a time: its own tables are then read once for all of them.
template <int WIDE, class Step>
static inline void over(const float *g, const float *x, float *dx, int64_t n, Behind behind, float filler, Step step) {
    vec gs[WIDE], xs[WIDE], out[WIDE], rest[WIDE] = {};
    const auto finish = [&] {
        if (!behind.relu) return;
        for (int w = 0; w < WIDE; ++w) out[w] = where(~(xs[w] <= vec{}), behind.others ? out[w] + rest[w] : out[w]);
    };
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        for (int w = 0; w < WIDE; ++w) gs[w] = load(g + i + w * LANES), xs[w] = load(x + i + w * LANES);
        step(gs, xs, out);
        if (behind.others)
            for (int w = 0; w < WIDE; ++w) rest[w] = load(behind.others + i + w * LANES);
        finish();
        for (int w = 0; w < WIDE; ++w) store(dx + i + w * LANES, out[w]);
    }
    if (i < n) {
        for (int w = 0; w < WIDE; ++w) gs[w] = all(0.f), xs[w] = all(filler);
        std::memcpy(gs, g + i, (n - i) * sizeof(float));
        std::memcpy(xs, x + i, (n - i) * sizeof(float));
        step(gs, xs, out);
        if (behind.others) std::memcpy(rest, behind.others + i, (n - i) * sizeof(float));
        finish();
        std::memcpy(dx + i, out, (n - i) * sizeof(float));
    }
}

// A table of up to K levels as vectors; what is missing at its end can never be reached. Each level, and each cut, fills a vector;
// 16 of them are one vector, too, where vectors are that long.
template <int K> struct Table {
    vec levels[K], cuts[K - 1];
#ifdef __AVX512F__
    vec row = {}, below = {};  // the levels, and the cut below each
#endif
    Table(const float *l, const float *t, int count) {
        for (int k = 0; k < K; ++k) levels[k] = all(k < count ? l[k] : INF);
        for (int k = 0; k + 1 < K; ++k) cuts[k] = all(k + 1 >= count ? INF : t ? t[k] : (l[k] + l[k + 1]) / 2);
#ifdef __AVX512F__
        for (int k = 0; k < K; ++k) row[k] = levels[k][0];
        for (int k = 0; k + 1 < K; ++k) below[k + 1] = cuts[k][0];
#endif
    }
    template <int WIDE> inline void nearest(const vec *x, vec *y) const {
#ifdef __AVX512F__
        if (K == 16) {  // a search of four steps, where comparing with every cut takes fifteen
            __m512i code[WIDE];
            for (int w = 0; w < WIDE; ++w) code[w] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int step = 8; step; step /= 2)
                for (int w = 0; w < WIDE; ++w) {
                    const __m512i higher = _mm512_or_si512(code[w], _mm512_set1_epi32(step));
                    const __m512 cut = _mm512_permutexvar_ps(higher, (__m512)below);
                    code[w] = _mm512_mask_mov_epi32(code[w], _mm512_cmp_ps_mask((__m512)x[w], cut, _CMP_GT_OQ), higher);
                }
            for (int w = 0; w < WIDE; ++w) y[w] = (vec)_mm512_permutexvar_ps(code[w], (__m512)row);
            return;
        }
#endif
        for (int w = 0; w < WIDE; ++w) y[w] = levels[0];
#pragma GCC unroll 16
        for (int k = 0; k + 1 < K; ++k)
            for (int w = 0; w < WIDE; ++w) y[w] = x[w] > cuts[k] ? levels[k + 1] : y[w];
    }
};

template <int K>
static void lookup_small(const float *x, float *relu, float *y, int64_t rows, int64_t cols, const float *l, const float *t, int count, int threads) {
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        const Table<K> table(l + row * count, t ? t + row * (count - 1) : nullptr, count);
        const int WIDE = 4;
        over<WIDE>(block_of(x, relu, first, n), y + first, n, [&](const vec *v, vec *out) {
            table.template nearest<WIDE>(v, out);
            for (int w = 0; w < WIDE; ++w) out[w] = v[w] == v[w] ? out[w] : v[w];
        });
    });
}

// Where cuts lie nearly even, as those of 8-bit images do: a code by arithmetic, which is off by one at most, then two
// comparisons. It never falls while x grows, so it is enough to look at it at the cuts themselves.
struct Guess {
    float start, scale, end;
    bool close;
    Guess(const float *cuts, int count) : start(cuts[0]), scale((count - 2) / (cuts[count - 2] - cuts[0])), end(count - 2), close(true) {
        for (int k = 0; k + 1 < count; ++k) {
            const int code = (*this)(cuts[k]);
            close = close && (code == k || code == k + 1);
        }
    }
    inline int operator()(float v) const {
        float place = (v - start) * scale;
        place = place > -1.f ? place : -1.f;
        place = place < end ? place : end;
        return (int)(place + 1.f);
    }
};

// Up to 256 levels by binary search, eight at a time, or by a guess.
static void lookup_large(const float *x, float *relu, float *y, int64_t rows, int64_t cols, const float *l, const float *t, int count, int threads) {
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        float levels[256], cuts[256];
        const float *own = l + row * count;
        for (int k = 0; k < 256; ++k) levels[k] = own[std::min(k, count - 1)];
        for (int k = 0; k < 256; ++k)
            cuts[k] = k + 1 >= count ? INF : t ? t[row * (count - 1) + k] : (own[k] + own[k + 1]) / 2;
        const float *in = block_of(x, relu, first, n);
        float *out = y + first;
        const Guess guess(cuts, count);
        if (guess.close) {
            float below[257];  // the cut below each code
            below[0] = -INF;
            std::copy(cuts, cuts + 256, below + 1);
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) {
                const float v = in[i];
                int at = guess(v);
                at += v > below[at + 1] ? 1 : 0;
                at -= at > 0 && v <= below[at] ? 1 : 0;
                out[i] = v == v ? levels[at] : v;
            }
            return;
        }
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
            int at = 0;
            const float v = in[i];
            for (int step = 128; step; step >>= 1) at += v > cuts[at + step - 1] ? step : 0;
            out[i] = v == v ? levels[at] : v;
        }
    });
}

template <int K>
static void levels_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *l, float *dl, int count,
                            Behind behind, int threads) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
    std::vector<double> sums(rows * each * (K + 1));
    blocks(rows, cols, threads, [=, &sums](int64_t row, int64_t first, int64_t n, int64_t b) {
        const Table<K> table(l + row * count, nullptr, count);
        const vec bottom = table.levels[0], top = all(l[row * count + count - 1]);
        // beyond[k]: of what lies above level k, so that a level costs one comparison; a gap's sum is a difference of two.
        vec beyond[K] = {}, low = {}, high = {};
        const int WIDE = 4;
        over<WIDE>(g + first, x + first, dx + first, n, behind.from(first), l[row * count], [&](const vec *gv, const vec *v, vec *out) {
            vec pull[WIDE];
            table.template nearest<WIDE>(v, pull);
            for (int w = 0; w < WIDE; ++w) {
                const mask under = v[w] < bottom, over_ = v[w] > top, inside = ~(under | over_);
                low += where(under, gv[w]);
                high += where(over_, gv[w]);
                out[w] = where(inside, gv[w]);
                pull[w] = where(inside, gv[w] * (pull[w] - v[w]));
            }
#pragma GCC unroll 16
            for (int k = 0; k + 1 < K; ++k)
                for (int w = 0; w < WIDE; ++w) add_above(beyond[k], pull[w], v[w], table.levels[k]);
        });
        double *own = &sums[b * (K + 1)];
        for (int k = 0; k + 1 < K; ++k) own[k] = lanes(beyond[k]) - lanes(beyond[k + 1]);
        own[K - 1] = lanes(low);
        own[K] = lanes(high);
    });
    for (int64_t row = 0; row < rows; ++row) {
        const float *own = l + row * count;
        double total[K + 1] = {}, out[K] = {};
        for (int64_t b = 0; b < each; ++b)
            for (int k = 0; k <= K; ++k) total[k] += sums[(row * each + b) * (K + 1) + k];
        for (int k = 0; k + 1 < count; ++k) {
            const double share = total[k] / std::max(own[k + 1] - own[k], 1e-30f);
            out[k + 1] += share;
            out[k] -= share;
        }
        out[0] += total[K - 1];
        out[count - 1] += total[K];
        for (int k = 0; k < count; ++k) dl[row * count + k] = (float)out[k];
    }
}

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, a tie to the even one; clamped places are far smaller.
static inline vec rounded(vec v) { const vec magic = all(12582912.f); return (v + magic) - magic; }
static inline vec held(vec v, vec low, vec high) { v = v < low ? low : v; return v > high ? high : v; }

// Levels from the gaps between them, around one that is 0: `negative` gaps lie below it. Sums are exact to a rounding.
static void around(const float *gaps, float *levels, int64_t rows, int count, int negative) {
    for (int64_t row = 0; row < rows; ++row, gaps += count, levels += count + 1) {
        levels[negative] = 0;
        double sum = 0;
        for (int k = negative; k < count; ++k) levels[k + 1] = (float)(sum += gaps[k]);
        sum = 0;
        for (int k = negative; k-- > 0;) levels[k] = (float)-(sum += gaps[k]);
    }
}

static void around_backward(const float *g, float *to_gaps, int64_t rows, int count, int negative) {
    for (int64_t row = 0; row < rows; ++row, g += count + 1, to_gaps += count) {
        double sum = 0;
        for (int k = count; k-- > negative;) to_gaps[k] = (float)(sum += g[k + 1]);
        sum = 0;
        for (int k = 0; k < negative; ++k) to_gaps[k] = (float)-(sum += g[k]);
    }
}

// A table as it comes: `count` levels per row or, where `negative` is not below 0, the gaps between them.
struct Levels {
    std::vector<float> made;
    const float *levels;
    Levels(const float *table, int64_t rows, int count, int negative) : made(negative < 0 ? 0 : rows * count), levels(table) {
        if (negative < 0) return;
        around(table, made.data(), rows, count - 1, negative);
        levels = made.data();
    }
};

// Calls body(part, first, last) for each of `threads` stretches of n entries, on as many threads.
template <class Body> static void stretches(int64_t n, int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) body(part, n * part / threads, n * (part + 1) / threads);
}

extern "C" {

void nulsq_lookup(const float *x, float *relu, float *y, int64_t rows, int64_t cols, const float *table, const float *cuts, int count, int negative,
                  int threads) {
    const Levels made(table, rows, count, negative);
    const float *l = made.levels;
    if (count <= 4) lookup_small<4>(x, relu, y, rows, cols, l, cuts, count, threads);
    else if (count <= 8) lookup_small<8>(x, relu, y, rows, cols, l, cuts, count, threads);
    else if (count <= 16) lookup_small<16>(x, relu, y, rows, cols, l, cuts, count, threads);
    else lookup_large(x, relu, y, rows, cols, l, cuts, count, threads);
}

void nulsq_levels_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *table, float *to_table, int count,
                           int negative, int behind_relu, const float *others, int threads) {
    const Levels made(table, rows, count, negative);
    const float *l = made.levels;
    const Behind behind{behind_relu != 0, others};
    std::vector<float> to_levels(negative < 0 ? 0 : rows * count);
    float *dl = negative < 0 ? to_table : to_levels.data();
    if (count <= 4) levels_backward<4>(g, x, dx, rows, cols, l, dl, count, behind, threads);
    else if (count <= 8) levels_backward<8>(g, x, dx, rows, cols, l, dl, count, behind, threads);
    else levels_backward<16>(g, x, dx, rows, cols, l, dl, count, behind, threads);
    if (negative >= 0) around_backward(dl, to_table, rows, count - 1, negative);
}

void nulsq_grid(const float *x, float *relu, float *y, int64_t rows, int64_t cols, const float *steps, float lowest, float highest, int threads) {
    const vec low = all(lowest), high = all(highest);
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        const vec step = all(steps[row]);
        over<1>(block_of(x, relu, first, n), y + first, n, [&](const vec *v, vec *out) { *out = rounded(held(*v / step, low, high)) * step; });
    });
}

void nulsq_grid_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *steps, float *to_steps, float lowest,
                         float highest, int behind_relu, const float *others, int threads) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
    const vec low = all(lowest), high = all(highest);
    const Behind behind{behind_relu != 0, others};
    std::vector<double> sums(rows * each);
    blocks(rows, cols, threads, [=, &sums](int64_t row, int64_t first, int64_t n, int64_t b) {
        const vec step = all(steps[row]);
        vec total = {};
        over<1>(g + first, x + first, dx + first, n, behind.from(first), 0.f, [&](const vec *gv, const vec *v, vec *out) {
            const vec place = *v / step;
            const mask inside = (place >= low) & (place <= high);
            total += *gv * (rounded(held(place, low, high)) - where(inside, place));
            *out = where(inside, *gv);
        });
        sums[b] = lanes(total);
    });
    for (int64_t row = 0; row < rows; ++row) {
        double total = 0;
        for (int64_t b = 0; b < each; ++b) total += sums[row * each + b];
        to_steps[row] = (float)total;
    }
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
