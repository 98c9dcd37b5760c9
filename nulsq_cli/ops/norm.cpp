// BatchNorm, perhaps a shortcut that is added, a ReLU and a quantizer as one operation. What BatchNorm hands on is never written:
// forward it is made on the way to the quantizer, and backward again, from BatchNorm's own input, which is kept anyway.
//
// Tensors are walked through in the order of their memory, in strips that follow from the shape alone, so that the bits are the
// same for any number of threads.

#include "tables.h"

static const int STRIPS = 64, WAYS = 4;

static INLINE vec load(const float *p, int64_t m, vec filler = vec{}) {  // m numbers
    if (m == LANES) return load(p);
#ifdef __AVX512F__
    return (vec)_mm512_mask_loadu_ps((__m512)filler, (__mmask16)((1u << m) - 1), p);
#else
    std::memcpy(&filler, p, m * sizeof(float));
    return filler;
#endif
}
static INLINE void store(float *p, vec v, int64_t m) {
    if (m == LANES) return store(p, v);
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << m) - 1), (__m512)v);
#else
    std::memcpy(p, &v, m * sizeof(float));
#endif
}

struct Shape {
    int64_t images, channels, pixels;
    int last;  // whether channels are the last dimension; there are then a multiple of 16, at most BLOCK

    int64_t each() const { return images * pixels; }
    vec of(const float *channel, int64_t c) const { return last ? load(channel + c) : all(channel[c]); }

    // For every strip, calls what start(strip) returns with (first, n) of pieces of at most BLOCK numbers: whole pixels, or planes, or
    // parts of one plane.
    template <class Start> void pieces(int threads, Start start) const {
        const int64_t unit = last ? channels : pixels, units = last ? each() : images * channels;
        const int64_t most = std::max<int64_t>(BLOCK / unit, 1) * unit;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t strip = 0; strip < STRIPS; ++strip) {
            auto body = start(strip);
            const int64_t end = units * (strip + 1) / STRIPS * unit;
            for (int64_t first = units * strip / STRIPS * unit; first < end; first += most)
                for (int64_t at = first, stop = std::min(first + most, end); at < stop; at += BLOCK)
                    body(at, std::min(BLOCK, stop - at));
        }
    }
    // Calls body(c, plane, start, stop) for what a piece has of every channel, or of every vector of channels.
    template <class Body> INLINE void parts(int64_t first, int64_t n, Body body) const {
        if (last)
            for (int64_t c = 0; c < channels; c += LANES) body(c, 0, c, n);
        else
            for (int64_t start = 0, plane = first / pixels; start < n; ++plane) {
                const int64_t stop = std::min(n, (plane + 1) * pixels - first);
                body(plane % channels, plane, start, stop);
                start = stop;
            }
    }
    // Calls step(at, m, k) for every vector of m numbers of such a part. k, below WAYS, differs between neighbours: sums over each k do
    // not wait for one another.
    template <class Step> INLINE void vectors(int64_t start, int64_t stop, Step step) const {
        const int64_t apart = last ? channels : LANES, whole = last ? stop : stop - LANES + 1;
        int64_t at = start;
        for (; at + (WAYS - 1) * apart < whole; at += WAYS * apart) {
#pragma GCC unroll 4
            for (int k = 0; k < WAYS; ++k) step(at + k * apart, LANES, k);
        }
        for (; at < whole; at += apart) step(at, LANES, 0);
        if (!last && at < stop) step(at, stop - at, 0);
    }
};

// A sum over a channel, or over each channel of a vector, in float64.
struct Sum {
    wide at[WAYS][2] = {};
    INLINE void add(vec v, int k) { at[k][0] += doubles(v, 0), at[k][1] += doubles(v, 1); }
    INLINE void add(const vec *v) {
        for (int k = 0; k < WAYS; ++k) add(v[k], k);
    }
};

// Sums over every channel: first of each plane or, with channels last, of each strip.
struct Sums {
    const Shape &shape;
    std::vector<double> parts, total;
    explicit Sums(const Shape &s) : shape(s), parts((s.last ? STRIPS : s.images) * s.channels), total(s.channels) {}
    INLINE void add(Sum sum, int64_t strip, int64_t plane, int64_t c) {
        for (int k = 1; k < WAYS; ++k) sum.at[0][0] += sum.at[k][0], sum.at[0][1] += sum.at[k][1];
        if (!shape.last) {
            parts[plane] += lanes(sum.at[0][0] + sum.at[0][1]);
            return;
        }
        double *to = &parts[strip * shape.channels + c];
        for (int64_t j = 0; j < LANES; ++j) to[j] += sum.at[0][j / (LANES / 2)][j % (LANES / 2)];
    }
    void complete() {
        for (size_t at = 0; at < parts.size(); at += shape.channels)
            for (int64_t c = 0; c < shape.channels; ++c) total[c] += parts[at + c];
    }
};

// A BatchNorm's parameters, its running statistics and how much of a batch they take; and what follows from them or from a batch,
// (C,) each: means, 1 / deviations, gains and shifts.
struct Norm {
    const float *weight, *bias;
    float *running_mean, *running_var;
    float *facts;
    double share, eps;
    float top;  // of the ReLU behind it
};

// What is used is rounded where torch's kernels for channels that lie apart round it, so that forward all bits are theirs.
struct Facts {
    float *mean, *inverse, *gain, *shift;
    Facts(float *facts, int64_t channels) : mean(facts), inverse(mean + channels), gain(inverse + channels), shift(gain + channels) {}
    void settle(const Norm &norm, int64_t c, float middle, float inverse_) {
        mean[c] = middle, inverse[c] = inverse_;
        gain[c] = inverse_ * norm.weight[c];
        shift[c] = std::fma(-middle, gain[c], norm.bias[c]);
    }
    void stand(const Norm &norm, int64_t c) { settle(norm, c, norm.running_mean[c], 1 / std::sqrt(norm.running_var[c] + (float)norm.eps)); }
    void follow(const Norm &norm, int64_t c, int64_t count, double sum_of_squares) {
        settle(norm, c, mean[c], (float)(1 / std::sqrt((float)sum_of_squares / (float)count + norm.eps)));
        norm.running_mean[c] = (float)(norm.share * mean[c] + (1 - norm.share) * norm.running_mean[c]);
        norm.running_var[c] = (float)(norm.share * (sum_of_squares / (count - 1)) + (1 - norm.share) * norm.running_var[c]);
    }
};

// relu(x * gain + shift + shortcut) of a piece, without a shortcut if it is null.
static void normalize(const Shape &shape, const Norm &norm, const float *x, const float *shortcut, float *y, int64_t first, int64_t n) {
    const Facts facts(norm.facts, shape.channels);
    const vec top = all(norm.top);
    x += first, shortcut += shortcut ? first : 0;
    shape.parts(first, n, [&](int64_t c, int64_t, int64_t start, int64_t stop) ALWAYS {
        const vec gain = shape.of(facts.gain, c), shift = shape.of(facts.shift, c);
        if (shortcut)
            shape.vectors(start, stop, [=](int64_t at, int64_t m, int) ALWAYS {
                const vec own = load(x + at, m) * gain + shift;
                store(y + at, rectified(own + load(shortcut + at, m), top), m);
            });
        else
            shape.vectors(start, stop, [=](int64_t at, int64_t m, int) ALWAYS { store(y + at, rectified(load(x + at, m) * gain + shift, top), m); });
    });
}

extern "C" {

enum { GIVEN, STANDING, MEASURED };  // where the facts come from: they are there, running statistics, or this batch

// y: the quantized result. relu: where to write the ReLU's (or null). Both may be x.
void nulsq_norm(const float *x, const float *shortcut, float *relu, float *y, Shape shape, Norm norm, int source, Rule rule, int threads) {
    const Levels levels(rule, 1);
    Facts facts(norm.facts, shape.channels);
    const int64_t count = shape.each();
    // Of value(vector, mean) of all numbers of a channel; what fills a vector up gives 0.
    const auto sum_up = [&](auto value) {
        Sums sums(shape);
        shape.pieces(threads, [&](int64_t strip) {
            return [&, strip](int64_t first, int64_t n) {
                const float *in = x + first;
                shape.parts(first, n, [&](int64_t c, int64_t plane, int64_t start, int64_t stop) ALWAYS {
                    const vec mean = shape.of(facts.mean, c);
                    Sum sum;
                    shape.vectors(start, stop, [&](int64_t at, int64_t m, int k) ALWAYS { sum.add(value(load(in + at, m, mean), mean), k); });
                    sums.add(sum, strip, plane, c);
                });
            };
        });
        sums.complete();
        return sums.total;
    };
    if (source == STANDING)
        for (int64_t c = 0; c < shape.channels; ++c) facts.stand(norm, c);
    if (source == MEASURED) {
        std::fill(facts.mean, facts.mean + shape.channels, 0.f);
        const std::vector<double> sums = sum_up([](vec v, vec) ALWAYS { return v; });
        for (int64_t c = 0; c < shape.channels; ++c) facts.mean[c] = (float)(sums[c] / count);
        const std::vector<double> squares = sum_up([](vec v, vec mean) ALWAYS { return (v - mean) * (v - mean); });
        for (int64_t c = 0; c < shape.channels; ++c) facts.follow(norm, c, count, squares[c]);
    }
    with_quantizer(rule, [&](auto *kind) {
        const std::remove_pointer_t<decltype(kind)> quantize(levels, 0);
        shape.pieces(threads, [&](int64_t) {
            return [&](int64_t first, int64_t n) {
                float *place = (relu ? relu : y) + first;
                normalize(shape, norm, x, shortcut, place, first, n);
                quantize(place, y + first, n, false);
            };
        });
    });
}

// y: the ReLU's result, which is made again if it is null. to_sum: the gradient to what went into the ReLU, which may be in the memory
// of g; dx may be in that of to_sum. still: running statistics were taken, through which no gradient goes.
void nulsq_norm_backward(const float *g, const float *others, const float *x, const float *y, float *to_sum, float *dx, Shape shape, Norm norm,
                         int still, Rule rule, float *to_table, float *to_weight, float *to_bias, int threads) {
    const Levels levels(rule, 1);
    const Facts facts(norm.facts, shape.channels);
    const Behind behind{true, norm.top, others, false};
    Sums sums(shape), products(shape);
    with_gradient(rule, [&](auto *kind) {
        typedef std::remove_pointer_t<decltype(kind)> Gradient;
        std::vector<double> to_rule(STRIPS * Gradient::SUMS);
        shape.pieces(threads, [&](int64_t strip) {
            return [&, strip, gradient = Gradient(levels, 0)](int64_t first, int64_t n) mutable {
                float made[BLOCK];
                if (!y) normalize(shape, norm, x, nullptr, made, first, n);
                gradient(g + first, y ? y + first : made, to_sum + first, n, behind.from(first));
                gradient.take(&to_rule[strip * Gradient::SUMS]);
                const float *in = x + first, *out = to_sum + first;
                shape.parts(first, n, [&](int64_t c, int64_t plane, int64_t start, int64_t stop) ALWAYS {
                    const vec mean = shape.of(facts.mean, c);
                    vec sum[WAYS] = {}, product[WAYS] = {};  // of few numbers each, so that floats do
                    shape.vectors(start, stop, [&](int64_t at, int64_t m, int k) ALWAYS {
                        const vec d = load(out + at, m);
                        sum[k] += d, product[k] += d * (load(in + at, m) - mean);
                    });
                    Sum total, total_products;
                    total.add(sum), total_products.add(product);
                    sums.add(total, strip, plane, c), products.add(total_products, strip, plane, c);
                });
            };
        });
        total_of<Gradient>(to_rule.data(), STRIPS, levels, 0, to_table);
    });
    sums.complete(), products.complete();
    std::vector<float> level(shape.channels), fall(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) {
        to_weight[c] = (float)(products.total[c] * facts.inverse[c]);
        to_bias[c] = (float)sums.total[c];
        if (still) continue;
        level[c] = (float)(sums.total[c] / shape.each());
        fall[c] = (float)(products.total[c] / shape.each()) * facts.inverse[c] * facts.inverse[c];
    }
    shape.pieces(threads, [&](int64_t) {
        return [&](int64_t first, int64_t n) {
            const float *in = x + first, *from = to_sum + first;
            float *out = dx + first;
            shape.parts(first, n, [&](int64_t c, int64_t, int64_t start, int64_t stop) ALWAYS {
                const vec mean = shape.of(facts.mean, c), gain = shape.of(facts.gain, c);
                const vec slope = shape.of(fall.data(), c), middle = shape.of(level.data(), c);
                shape.vectors(start, stop, [=](int64_t at, int64_t m, int) ALWAYS {
                    store(out + at, (load(from + at, m) - middle - (load(in + at, m) - mean) * slope) * gain, m);
                });
            });
        };
    });
}

}
