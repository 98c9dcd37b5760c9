// How numbers are quantized, a stretch of them at a time, and what comes back: each struct here is a copy of an eager function
// of codebook.py or grid.py and is tested against that one. Sums are kept per stretch of about BLOCK numbers and added in a
// fixed order: the result has the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t mask __attribute__((vector_size(BYTES)));
typedef double wide __attribute__((vector_size(BYTES)));
typedef float half __attribute__((vector_size(BYTES / 2)));

#define ALWAYS __attribute__((always_inline))  // for lambdas; a call for every vector costs more than the vector
#define INLINE inline ALWAYS

static const int64_t LANES = BYTES / sizeof(float), BLOCK = 4096;
static const float INF = std::numeric_limits<float>::infinity();

static inline vec load(const float *p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
// Stores past the caches, if wanted: where a tensor is larger than they are, that spares reading its memory before it is written.
static INLINE void put(float *p, vec v, bool past) {
#if defined(__AVX512F__)
    if (past) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    if (past) return _mm256_stream_ps(p, (__m256)v);
#endif
    store(p, v);
}
static INLINE void written() {  // after stores past the caches: others may read now
#ifdef __AVX__
    _mm_sfence();
#endif
}
// Processors see by themselves that memory is read in order, but begin anew every 4096 bytes.
static const int64_t AHEAD = 1024;
static INLINE void fetch(const float *p) { __builtin_prefetch(p + AHEAD); }
static inline vec all(float s) { return s - vec{}; }
static inline vec where(mask m, vec v) { return (vec)((mask)v & m); }
// A ReLU, or one that ends at `top`, if that is a number. What is not a number stays.
static inline vec rectified(vec v, vec top) {
    v = where(~(v <= vec{}), v);
    return v > top ? top : v;
}
static inline void add_above(vec &sum, vec v, vec a, vec b) {  // where a is above b
#ifdef __AVX512F__
    sum = (vec)_mm512_mask_add_ps((__m512)sum, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ), (__m512)sum, (__m512)v);
#else
    sum += where(a > b, v);
#endif
}
static inline wide doubles(vec v, int part) {  // the first half of the lanes, or the second
    half in;
#ifdef __AVX512DQ__
    in = part ? (half)_mm512_extractf32x8_ps((__m512)v, 1) : (half)_mm512_castps512_ps256((__m512)v);
#else
    std::memcpy(&in, reinterpret_cast<const char *>(&v) + part * sizeof in, sizeof in);
#endif
    return __builtin_convertvector(in, wide);
}
static inline double lanes(wide v) {
    double each[LANES / 2];
    std::memcpy(each, &v, sizeof v);
    for (int64_t step = LANES / 4; step; step /= 2)
        for (int64_t j = 0; j < step; ++j) each[j] += each[j + step];
    return each[0];
}
static inline double lanes(vec v) { return lanes(doubles(v, 0) + doubles(v, 1)); }

// Runs step(x, y), which takes WIDE vectors, over a stretch; what is left goes through buffers.
template <int WIDE, class Step> static INLINE void over(const float *x, float *y, int64_t n, bool past, Step step) {
    vec in[WIDE], out[WIDE];
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        for (int w = 0; w < WIDE; ++w) in[w] = load(x + i + w * LANES), fetch(x + i + w * LANES);
        step(in, out);
        for (int w = 0; w < WIDE; ++w) put(y + i + w * LANES, out[w], past);
    }
    if (i < n) {
        for (int w = 0; w < WIDE; ++w) in[w] = vec{};
        std::memcpy(in, x + i, (n - i) * sizeof(float));
        step(in, out);
        std::memcpy(y + i, out, (n - i) * sizeof(float));
    }
}

// What follows the gradient to x: nothing, or the ReLU that x came out of. Where x is 0, or its top, that passes nothing; elsewhere
// also what others that read x hand back.
struct Behind {
    bool relu;
    float top;
    const float *others;
    bool past;  // the caches: as above
    Behind from(int64_t first) const { return {relu, top, others ? others + first : nullptr, past}; }
};

// The same for step(g, x, dx), which takes WIDE vectors of each at a time: its own tables are then read once for all of them.
template <int WIDE, bool FETCH = true, class Step>
static INLINE void over(const float *g, const float *x, float *dx, int64_t n, Behind behind, float filler, Step step) {
    vec gs[WIDE], xs[WIDE], out[WIDE], rest[WIDE] = {};
    const vec top = all(behind.top);
    const auto finish = [&]() ALWAYS {
        if (!behind.relu) return;
        for (int w = 0; w < WIDE; ++w) out[w] = where(~((xs[w] <= vec{}) | (xs[w] >= top)), behind.others ? out[w] + rest[w] : out[w]);
    };
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        for (int w = 0; w < WIDE; ++w) {
            gs[w] = load(g + i + w * LANES), xs[w] = load(x + i + w * LANES);
            if (FETCH) fetch(g + i + w * LANES), fetch(x + i + w * LANES);
        }
        step(gs, xs, out);
        if (behind.others)
            for (int w = 0; w < WIDE; ++w) rest[w] = load(behind.others + i + w * LANES);
        finish();
        for (int w = 0; w < WIDE; ++w) put(dx + i + w * LANES, out[w], behind.past);
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

// How a tensor is quantized, as it comes from Python: by tables of `count` levels, or of the gaps between them if `negative` is not
// below 0, with `cuts` or cuts in the middle; or, if count is 0, by the steps of even grids from code `lowest` to `highest`.
struct Rule {
    const float *table, *cuts;
    int count, negative;
    float lowest, highest;
};

// The same for all rows, with levels in the place of gaps.
struct Levels {
    std::vector<float> made;
    const Rule rule;
    const float *levels;
    Levels(const Rule &r, int64_t rows) : made(r.count && r.negative >= 0 ? rows * r.count : 0), rule(r), levels(r.table) {
        if (made.empty()) return;
        around(r.table, made.data(), rows, r.count - 1, r.negative);
        levels = made.data();
    }
    const float *of(int64_t row) const { return levels + row * (rule.count ? rule.count : 1); }
    const float *cuts(int64_t row) const { return rule.cuts ? rule.cuts + row * (rule.count - 1) : nullptr; }
};

// A table of up to K levels as vectors; what is missing at its end can never be reached. Each level, and each cut, fills a vector;
// 16 of them are one vector, too, where vectors are that long.
template <int K> struct Table {
    vec levels[K], cuts[K - 1];
#ifdef __AVX512F__
    vec row = {}, above[3] = {};  // the levels; the cut above each, above the next and above the one after that
#endif
    Table(const float *l, const float *t, int count) {
        for (int k = 0; k < K; ++k) levels[k] = all(k < count ? l[k] : INF);
        for (int k = 0; k + 1 < K; ++k) cuts[k] = all(k + 1 >= count ? INF : t ? t[k] : (l[k] + l[k + 1]) / 2);
#ifdef __AVX512F__
        for (int k = 0; k < K; ++k) row[k] = levels[k][0];
        for (int k = 0; k < 3 * K; ++k) above[k / K][k % K] = k / K + k % K < K - 1 ? cuts[k / K + k % K][0] : INF;
#endif
    }
#ifdef __AVX512F__
    // In two steps, three comparisons each, where comparing with every cut takes fifteen, and four steps of one wait for each other.
    template <int WIDE> INLINE void search(const vec *x, __m512i *code) const {
        __m512i quarter[WIDE];
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) {
            quarter[w] = _mm512_setzero_si512();
#pragma GCC unroll 3
            for (int k = 1; k < 4; ++k)
                quarter[w] = _mm512_mask_mov_epi32(quarter[w], above_cut(x[w], (__m512)cuts[4 * k - 1]), _mm512_set1_epi32(4 * k));
        }
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) {
            code[w] = _mm512_setzero_si512();
#pragma GCC unroll 3
            for (int k = 1; k < 4; ++k) {
                const __m512 cut = _mm512_permutexvar_ps(quarter[w], (__m512)above[k - 1]);
                code[w] = _mm512_mask_mov_epi32(code[w], above_cut(x[w], cut), _mm512_set1_epi32(k));
            }
            code[w] = _mm512_or_si512(code[w], quarter[w]);
        }
    }
    static INLINE __mmask16 above_cut(vec x, __m512 cut) { return _mm512_cmp_ps_mask((__m512)x, cut, _CMP_GT_OQ); }
#endif
    template <int WIDE> INLINE void nearest(const vec *x, vec *y) const {
#ifdef __AVX512F__
        if constexpr (K == 16) {
            __m512i code[WIDE];
            search<WIDE>(x, code);
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

// Quantizers of one row: (x, y, n, past) reads a stretch and writes it, past the caches if wanted.
template <int K> struct SmallTable {
    const Table<K> table_;
    SmallTable(const Levels &l, int64_t row) : table_(l.of(row), l.cuts(row), l.rule.count) {}
    void operator()(const float *x, float *y, int64_t n, bool past) const {
        const Table<K> table = table_;  // a member would be read again after every store
        const int WIDE = 4;
        over<WIDE>(x, y, n, past, [&](const vec *v, vec *out) ALWAYS {
            table.template nearest<WIDE>(v, out);
            for (int w = 0; w < WIDE; ++w) out[w] = v[w] == v[w] ? out[w] : v[w];
        });
    }
};

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
struct LargeTable {
    float levels[256], below[257];  // below: the cut below each code
    Guess guess;
    static const float *filled(const Levels &l, int64_t row, float *below) {
        const float *own = l.of(row), *cuts = l.cuts(row);
        below[0] = -INF;
        for (int k = 0; k < 256; ++k) below[k + 1] = k + 1 >= l.rule.count ? INF : cuts ? cuts[k] : (own[k] + own[k + 1]) / 2;
        return below + 1;
    }
    LargeTable(const Levels &l, int64_t row) : guess(filled(l, row, below), l.rule.count) {
        for (int k = 0; k < 256; ++k) levels[k] = l.of(row)[std::min(k, l.rule.count - 1)];
    }
    void operator()(const float *x, float *y, int64_t n, bool) const {
        if (guess.close) {
            const Guess own = guess;
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) {
                const float v = x[i];
                int at = own(v);
                at += v > below[at + 1] ? 1 : 0;
                at -= at > 0 && v <= below[at] ? 1 : 0;
                y[i] = v == v ? levels[at] : v;
            }
            return;
        }
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
            int at = 0;
            const float v = x[i];
            for (int step = 128; step; step >>= 1) at += v > below[at + step] ? step : 0;
            y[i] = v == v ? levels[at] : v;
        }
    }
};

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, a tie to the even one; clamped places are far smaller.
static inline vec rounded(vec v) { const vec magic = all(12582912.f); return (v + magic) - magic; }
static inline vec held(vec v, vec low, vec high) { v = v < low ? low : v; return v > high ? high : v; }

struct Grid {
    vec step, low, high;
    Grid(const Levels &l, int64_t row) : step(all(*l.of(row))), low(all(l.rule.lowest)), high(all(l.rule.highest)) {}
    void operator()(const float *x, float *y, int64_t n, bool past) const {
        const vec step = this->step, low = this->low, high = this->high;
        over<1>(x, y, n, past, [&](const vec *v, vec *out) ALWAYS { *out = rounded(held(*v / step, low, high)) * step; });
    }
};

// Their gradients: (g, x, dx, n, behind) reads a stretch, writes the gradient to x and adds up what the row's table gets. Such sums
// are floats, and have to be taken out now and then: `to` gets SUMS numbers more, of which `finish` makes the table's gradient.
//
// What lies in a gap is what lies above its lower level less what lies above the upper one: one comparison and one addition per level.
// Where 16 levels fit into a vector it is found out first in which gap each number lies. Sums are then a matrix of 4 x 4: a number is
// spread over four columns, all but one of them 0, which are added in its row, in one half by looked up factors and in the other by
// masks, for these are the work of different parts of a processor.
#ifdef __AVX512F__
#define SEARCHED(K) (K == 16)
struct GapSums {
    __m512 row[2], column[4];  // for each of 16 gaps, 1 if it is in that row, or column, else 0
    GapSums() {
        float in[16];
        for (int k = 0; k < 4; ++k) {
            for (int gap = 0; gap < 16; ++gap) in[gap] = gap % 4 == k;
            column[k] = _mm512_loadu_ps(in);
            for (int gap = 0; gap < 16; ++gap) in[gap] = gap / 4 == k;
            if (k < 2) row[k] = _mm512_loadu_ps(in);
        }
    }
    // Meanwhile x and g are fetched, which are read next.
    void add(vec *sums_, const __m512i *gaps, const vec *pulls, int64_t count, const float *x, const float *g) const {
        const GapSums own = *this;
        __m512 sums[16];
        for (int k = 0; k < 16; ++k) sums[k] = (__m512)sums_[k];
        for (int64_t i = 0; i < count; ++i) {
            __builtin_prefetch(x + i * LANES), __builtin_prefetch(g + i * LANES);
            const __m512 first = _mm512_permutexvar_ps(gaps[i], own.row[0]), second = _mm512_permutexvar_ps(gaps[i], own.row[1]);
            const __mmask16 fourth = _mm512_cmpge_epi32_mask(gaps[i], _mm512_set1_epi32(12));
            const __mmask16 third = _kandn_mask16(fourth, _mm512_cmpge_epi32_mask(gaps[i], _mm512_set1_epi32(8)));
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const __m512 here = _mm512_mul_ps((__m512)pulls[i], _mm512_permutexvar_ps(gaps[i], own.column[c]));
                sums[c] = _mm512_fmadd_ps(first, here, sums[c]);
                sums[4 + c] = _mm512_fmadd_ps(second, here, sums[4 + c]);
                sums[8 + c] = _mm512_mask_add_ps(sums[8 + c], third, sums[8 + c], here);
                sums[12 + c] = _mm512_mask_add_ps(sums[12 + c], fourth, sums[12 + c], here);
            }
        }
        for (int k = 0; k < 16; ++k) sums_[k] = (vec)sums[k];
    }
};
#else
#define SEARCHED(K) false
#endif

template <int K> struct LevelsGradient {
    static const int SUMS = K + 1;
    const Table<K> table_;
    const vec top_;
    vec beyond_[K] = {}, low_ = {}, high_ = {};
    LevelsGradient(const Levels &l, int64_t row) : table_(l.of(row), nullptr, l.rule.count), top_(all(l.of(row)[l.rule.count - 1])) {}
    void operator()(const float *g, const float *x, float *dx, int64_t n, Behind behind) {
        // beyond[k]: of what lies above level k, so that a level costs one comparison; a gap's sum is a difference of two.
        vec beyond[K], low = low_, high = high_;
        std::copy(beyond_, beyond_ + K, beyond);
        const Table<K> table = table_;
        const vec bottom = table.levels[0], top = top_;
        const int WIDE = 4;
        const auto ends = [&](vec gv, vec v, vec &out) ALWAYS {
            const mask under = v < bottom, over_ = v > top, inside = ~(under | over_);
            low += where(under, gv);
            high += where(over_, gv);
            out = where(inside, gv);
            return inside;
        };
#ifdef __AVX512F__
        if constexpr (SEARCHED(K)) {  // in two loops, for one would need more registers than there are
            const int64_t CHUNK = 64;
            __m512i gaps[CHUNK];
            vec pulls[CHUNK];
            for (int64_t i = 0; i < n; i += CHUNK * LANES) {
                int64_t count = 0;
                const auto find = [&](const vec *gv, const vec *v, vec *out) ALWAYS {
                    __m512i code[WIDE];
                    table.template search<WIDE>(v, code);
                    for (int w = 0; w < WIDE; ++w, ++count) {
                        const vec away = v[w] - (vec)_mm512_permutexvar_ps(code[w], (__m512)table.row);
                        gaps[count] = _mm512_add_epi32(code[w], _mm512_srai_epi32((__m512i)away, 31));  // one less below its level
                        pulls[count] = where(ends(gv[w], v[w], out[w]), gv[w] * away);
                    }
                };
                over<WIDE, false>(g + i, x + i, dx + i, std::min(CHUNK * LANES, n - i), behind.from(i), bottom[0], find);
                GapSums().add(beyond, gaps, pulls, count, x + i + CHUNK * LANES, g + i + CHUNK * LANES);
            }
        } else
#endif
            over<WIDE>(g, x, dx, n, behind, bottom[0], [&](const vec *gv, const vec *v, vec *out) ALWAYS {
                vec pull[WIDE];
                table.template nearest<WIDE>(v, pull);
                for (int w = 0; w < WIDE; ++w) pull[w] = where(ends(gv[w], v[w], out[w]), gv[w] * (pull[w] - v[w]));
#pragma GCC unroll 16
                for (int k = 0; k + 1 < K; ++k)
                    for (int w = 0; w < WIDE; ++w) add_above(beyond[k], pull[w], v[w], table.levels[k]);
            });
        std::copy(beyond, beyond + K, beyond_), low_ = low, high_ = high;
    }
    void take(double *to) {
        for (int k = 0; k + 1 < K; ++k) to[k] += SEARCHED(K) ? -lanes(beyond_[k]) : lanes(beyond_[k]) - lanes(beyond_[k + 1]);
        to[K - 1] += lanes(low_);
        to[K] += lanes(high_);
        std::fill(beyond_, beyond_ + K, vec{}), low_ = high_ = vec{};
    }
    static void finish(const double *total, const Levels &l, int64_t row, float *to_table) {
        const float *own = l.of(row);
        const int count = l.rule.count, negative = l.rule.negative;
        double out[K] = {};
        for (int k = 0; k + 1 < count; ++k) {
            const double share = total[k] / std::max(own[k + 1] - own[k], 1e-30f);
            out[k + 1] += share;
            out[k] -= share;
        }
        out[0] += total[K - 1];
        out[count - 1] += total[K];
        float to_levels[K];
        for (int k = 0; k < count; ++k) to_levels[k] = (float)out[k];
        if (negative < 0) std::copy(to_levels, to_levels + count, to_table + row * count);
        else around_backward(to_levels, to_table + row * (count - 1), 1, count - 1, negative);
    }
};

struct GridGradient {
    static const int SUMS = 1;
    const Grid grid_;
    vec total_ = {};
    GridGradient(const Levels &l, int64_t row) : grid_(l, row) {}
    void operator()(const float *g, const float *x, float *dx, int64_t n, Behind behind) {
        const Grid grid = grid_;
        vec total = total_;
        over<1>(g, x, dx, n, behind, 0.f, [&](const vec *gv, const vec *v, vec *out) ALWAYS {
            const vec place = *v / grid.step;
            const mask inside = (place >= grid.low) & (place <= grid.high);
            total += *gv * (rounded(held(place, grid.low, grid.high)) - where(inside, place));
            *out = where(inside, *gv);
        });
        total_ = total;
    }
    void take(double *to) { to[0] += lanes(total_), total_ = vec{}; }
    static void finish(const double *total, const Levels &, int64_t row, float *to_table) { to_table[row] = (float)*total; }
};

// The table's gradient from the sums of all stretches, in their order.
template <class Gradient> static void total_of(const double *sums, int64_t stretches, const Levels &levels, int64_t row, float *to_table) {
    double total[Gradient::SUMS] = {};
    for (int64_t i = 0; i < stretches * Gradient::SUMS; ++i) total[i % Gradient::SUMS] += sums[i];
    Gradient::finish(total, levels, row, to_table);
}

// Calls run(pointer to the type) with the quantizer, or the gradient, that takes the rule.
template <class Run> static void with_quantizer(const Rule &rule, Run run) {
    if (!rule.count) run(static_cast<Grid *>(nullptr));
    else if (rule.count <= 4) run(static_cast<SmallTable<4> *>(nullptr));
    else if (rule.count <= 8) run(static_cast<SmallTable<8> *>(nullptr));
    else if (rule.count <= 16) run(static_cast<SmallTable<16> *>(nullptr));
    else run(static_cast<LargeTable *>(nullptr));
}
template <class Run> static void with_gradient(const Rule &rule, Run run) {
    if (!rule.count) run(static_cast<GridGradient *>(nullptr));
    else if (rule.count <= 4) run(static_cast<LevelsGradient<4> *>(nullptr));
    else if (rule.count <= 8) run(static_cast<LevelsGradient<8> *>(nullptr));
    else run(static_cast<LevelsGradient<16> *>(nullptr));
}
