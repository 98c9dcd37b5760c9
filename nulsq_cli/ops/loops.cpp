// The quantizer ops on a CPU: each loop is a copy of an eager function beside it, and is tested against that one.
//
// Tensors come as dense memory: `rows` stretches of `cols` numbers, each with a table of its own (rows is 1 where a
// tensor has one table). Work is cut into blocks of a fixed size, sums are kept per block and added in the order of
// the blocks: the result has the same bits for any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t mask __attribute__((vector_size(BYTES)));

static const int64_t LANES = BYTES / sizeof(float), BLOCK = 4096;
static const float INF = std::numeric_limits<float>::infinity();

static inline vec load(const float *p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec all(float s) { return s - vec{}; }
static inline vec where(mask m, vec v) { return (vec)((mask)v & m); }
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

// Runs step(x, y) over whole vectors; the rest goes through buffers that are filled up with `filler`.
template <class Step> static inline void over(const float *x, float *y, int64_t n, Step step) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, step(load(x + i)));
    if (i < n) {
        float in[LANES] = {}, out[LANES];
        std::memcpy(in, x + i, (n - i) * sizeof(float));
        store(out, step(load(in)));
        std::memcpy(y + i, out, (n - i) * sizeof(float));
    }
}

// The same for step(g, x, dx), which takes WIDE vectors of each at a time: its own tables are then read once for all of them.
template <int WIDE, class Step> static inline void over(const float *g, const float *x, float *dx, int64_t n, float filler, Step step) {
    vec gs[WIDE], xs[WIDE], out[WIDE];
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        for (int w = 0; w < WIDE; ++w) gs[w] = load(g + i + w * LANES), xs[w] = load(x + i + w * LANES);
        step(gs, xs, out);
        for (int w = 0; w < WIDE; ++w) store(dx + i + w * LANES, out[w]);
    }
    if (i < n) {
        for (int w = 0; w < WIDE; ++w) gs[w] = all(0.f), xs[w] = all(filler);
        std::memcpy(gs, g + i, (n - i) * sizeof(float));
        std::memcpy(xs, x + i, (n - i) * sizeof(float));
        step(gs, xs, out);
        std::memcpy(dx + i, out, (n - i) * sizeof(float));
    }
}

// A table of up to K levels as vectors; what is missing at its end can never be reached.
template <int K> struct Table {
    vec levels[K], cuts[K - 1];
    Table(const float *l, const float *t, int count) {
        for (int k = 0; k < K; ++k) levels[k] = all(k < count ? l[k] : INF);
        for (int k = 0; k + 1 < K; ++k) cuts[k] = all(k + 1 >= count ? INF : t ? t[k] : (l[k] + l[k + 1]) / 2);
    }
    template <int WIDE> inline void nearest(const vec *x, vec *y) const {
        for (int w = 0; w < WIDE; ++w) y[w] = levels[0];
#pragma GCC unroll 16
        for (int k = 0; k + 1 < K; ++k)
            for (int w = 0; w < WIDE; ++w) y[w] = x[w] > cuts[k] ? levels[k + 1] : y[w];
    }
};

template <int K>
static void lookup_small(const float *x, float *y, int64_t rows, int64_t cols, const float *l, const float *t, int count, int threads) {
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        const Table<K> table(l + row * count, t ? t + row * (count - 1) : nullptr, count);
        over(x + first, y + first, n, [&](vec v) {
            vec near[1];
            table.template nearest<1>(&v, near);
            return v == v ? near[0] : v;
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
static void lookup_large(const float *x, float *y, int64_t rows, int64_t cols, const float *l, const float *t, int count, int threads) {
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        float levels[256], cuts[256];
        const float *own = l + row * count;
        for (int k = 0; k < 256; ++k) levels[k] = own[std::min(k, count - 1)];
        for (int k = 0; k < 256; ++k)
            cuts[k] = k + 1 >= count ? INF : t ? t[row * (count - 1) + k] : (own[k] + own[k + 1]) / 2;
        const float *in = x + first;
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
static void levels_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *l, float *dl, int count, int threads) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
    std::vector<double> sums(rows * each * (K + 1));
    blocks(rows, cols, threads, [=, &sums](int64_t row, int64_t first, int64_t n, int64_t b) {
        const Table<K> table(l + row * count, nullptr, count);
        const vec bottom = table.levels[0], top = all(l[row * count + count - 1]);
        // beyond[k]: of what lies above level k, so that a level costs one comparison; a gap's sum is a difference of two.
        vec beyond[K] = {}, low = {}, high = {};
        const int WIDE = 4;
        over<WIDE>(g + first, x + first, dx + first, n, l[row * count], [&](const vec *gv, const vec *v, vec *out) {
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
                for (int w = 0; w < WIDE; ++w) beyond[k] += where(v[w] > table.levels[k], pull[w]);
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

extern "C" {

void nulsq_lookup(const float *x, float *y, int64_t rows, int64_t cols, const float *levels, const float *cuts, int count, int threads) {
    if (count <= 4) lookup_small<4>(x, y, rows, cols, levels, cuts, count, threads);
    else if (count <= 8) lookup_small<8>(x, y, rows, cols, levels, cuts, count, threads);
    else if (count <= 16) lookup_small<16>(x, y, rows, cols, levels, cuts, count, threads);
    else lookup_large(x, y, rows, cols, levels, cuts, count, threads);
}

void nulsq_levels_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *levels, float *to_levels, int count, int threads) {
    if (count <= 4) levels_backward<4>(g, x, dx, rows, cols, levels, to_levels, count, threads);
    else if (count <= 8) levels_backward<8>(g, x, dx, rows, cols, levels, to_levels, count, threads);
    else levels_backward<16>(g, x, dx, rows, cols, levels, to_levels, count, threads);
}

void nulsq_grid(const float *x, float *y, int64_t rows, int64_t cols, const float *steps, float lowest, float highest, int threads) {
    const vec low = all(lowest), high = all(highest);
    blocks(rows, cols, threads, [=](int64_t row, int64_t first, int64_t n, int64_t) {
        const vec step = all(steps[row]);
        over(x + first, y + first, n, [&](vec v) { return rounded(held(v / step, low, high)) * step; });
    });
}

void nulsq_grid_backward(const float *g, const float *x, float *dx, int64_t rows, int64_t cols, const float *steps, float *to_steps, float lowest, float highest, int threads) {
    const int64_t each = (cols + BLOCK - 1) / BLOCK;
    const vec low = all(lowest), high = all(highest);
    std::vector<double> sums(rows * each);
    blocks(rows, cols, threads, [=, &sums](int64_t row, int64_t first, int64_t n, int64_t b) {
        const vec step = all(steps[row]);
        vec total = {};
        over<1>(g + first, x + first, dx + first, n, 0.f, [&](const vec *gv, const vec *v, vec *out) {
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

void nulsq_around(const float *gaps, float *levels, int rows, int count, int negative) {
    for (int row = 0; row < rows; ++row, gaps += count, levels += count + 1) {
        levels[negative] = 0;
        double sum = 0;
        for (int k = negative; k < count; ++k) levels[k + 1] = (float)(sum += gaps[k]);
        sum = 0;
        for (int k = negative; k-- > 0;) levels[k] = (float)-(sum += gaps[k]);
    }
}

void nulsq_keep_positive(float *steps, int rows, int count, float share, float smallest) {
    for (int row = 0; row < rows; ++row, steps += count) {
        double sum = 0;
        for (int k = 0; k < count; ++k) sum += steps[k] < 0 ? 0.f : steps[k];
        const float least = std::max((float)(sum / count) * share, smallest);  // not a number where one of them is none
        for (int k = 0; k < count; ++k) steps[k] = steps[k] >= least ? steps[k] : least;
    }
}

void nulsq_around_backward(const float *g, float *to_gaps, int rows, int count, int negative) {
    for (int row = 0; row < rows; ++row, g += count + 1, to_gaps += count) {
        double sum = 0;
        for (int k = count; k-- > negative;) to_gaps[k] = (float)(sum += g[k + 1]);
        sum = 0;
        for (int k = 0; k < negative; ++k) to_gaps[k] = (float)-(sum += g[k]);
    }
}

}
