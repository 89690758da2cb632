/* The Sadam and SAMSGrad step of one parameter group in one call: plain C, without Python's or torch's headers.

   Built by GCC or Clang; another compiler stops here, and the package does without. The update is written once, for
   float, bfloat16 and half storage with float arithmetic, and compiled for each instruction set by inlining it into a
   function with that target; the caller chooses the one that runs. The rule is update.py's, rearranged so that an
   element costs 22 multiplications, a root and a division: on a core with fast memory these are the limit. */

#if !defined(__GNUC__)
#error "the CPU kernel needs GCC or Clang"
#endif

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Subnormal floats cost some processors a hundred times an operation, and a moment that nothing is added to ends as one:
   rounding to nearest never takes the smallest times 0.9 to zero. So they count as zero where float32 tensors are
   computed, but not in half precision, where they may be the data; however the caller's thread is set. */
#if defined(__x86_64__)
#define FLUSH ((uint64_t)0x8040) /* flush-to-zero, denormals-are-zero */
static uint64_t mode(void) { return __builtin_ia32_stmxcsr(); }
static void set_mode(uint64_t to) { __builtin_ia32_ldmxcsr((unsigned)to); }
#elif defined(__aarch64__)
#define FLUSH ((uint64_t)1 << 24)
static uint64_t mode(void) {
    uint64_t now;
    __asm__ volatile("mrs %0, fpcr" : "=r"(now));
    return now;
}
static void set_mode(uint64_t to) { __asm__ volatile("msr fpcr, %0" : : "r"(to)); }
#else
#define FLUSH ((uint64_t)0)
static uint64_t mode(void) { return 0; }
static void set_mode(uint64_t to) { (void)to; }
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define AVX512(features) __attribute__((target(features), min_vector_width(512)))
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#define AVX512(features) __attribute__((target(features ",prefer-vector-width=512")))
#endif

typedef struct {
    double lr, beta1, beta2, weight_decay, gain;
    int32_t decoupled, maximize, amsgrad, correction, bare;
} Options;

enum { FLOAT32, BFLOAT16, FLOAT16, BARE }; /* BARE: float32 memory moved as in a step, without its arithmetic */
enum { INNER, OUTER, NONE };

/* The tensors of a group, a column each; n rows. */
typedef struct {
    int64_t n;
    const int64_t *numel, *first_block; /* first_block has n + 1 entries: the running sum of each tensor's blocks */
    void *const *param, *const *grad, *const *exp_avg, *const *exp_avg_sq, *const *max_exp_avg_sq;
    float *const *step;
    const double *beta;
    const uint8_t *dtype;
    struct Factors *factors; /* room for n rows */
} Table;

typedef struct Factors {
    float x, rate, log1p[9];
} Factors;
typedef struct {
    float coupled, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2;
} Constants;

#define BLOCK 64  /* elements handled between two rounds of prefetching */
#define AHEAD 512 /* elements that a prefetch looks ahead: of 128 to 2048 the fastest, by 5 % over none */

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float load(const void *from, int64_t i, int dtype) {
    if (dtype == FLOAT32 || dtype == BARE) return ((const float *)from)[i];
    uint32_t half = ((const uint16_t *)from)[i];
    if (dtype == BFLOAT16) return from_bits(half << 16);
    /* half: shift the exponent into place and move its bias, without subnormal floats, which may be flushed to zero */
    uint32_t body = (half & 0x7fff) << 13;
    uint32_t subnormal = to_bits(from_bits(body + (113 << 23)) - 0x1p-14f);
    uint32_t bits = body < 0x00800000 ? subnormal : body + (112 << 23);
    bits = body >= 0x0f800000 ? body | 0x7f800000 : bits;
    return from_bits(bits | (half & 0x8000) << 16);
}

INLINE void store(void *to, int64_t i, float x, int dtype) {
    if (dtype == FLOAT32 || dtype == BARE) {
        ((float *)to)[i] = x;
        return;
    }
    uint32_t bits = to_bits(x), body = bits & 0x7fffffff, sign = (bits ^ body) >> 16, half;
    if (dtype == BFLOAT16) {
        half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        half = body > 0x7f800000 ? 0x7fc0 : half;
    } else {
        uint32_t normal = (body + 0xfff + (body >> 13 & 1) - (112 << 23)) >> 13;
        uint32_t subnormal = to_bits(from_bits(body) + 0.5f) - 0x3f000000; /* adding 0.5 rounds to a multiple of 2^-24 */
        half = body < 0x38800000 ? subnormal : normal;
        half = body >= 0x477ff000 ? 0x7c00 : half;
        half = body > 0x7f800000 ? 0x7e00 : half;
        half |= sign;
    }
    ((uint16_t *)to)[i] = (uint16_t)half;
}

/* 2^-t for t >= 0, to 1.2e-7. */
INLINE float exp2_minus(float t) {
    uint32_t bits = to_bits(t);
    t = from_bits(bits < 0x42fa0000 ? bits : 0x42fa0000); /* at most 125, NaN too */
    float shifted = t + 0x1.8p23f; /* rounds t to an integer, in the low bits */
    float f = t - (shifted - 0x1.8p23f);
    float e = -1.327647719e-3f; /* 2^-f on [-0.5, 0.5] */
    e = e * f + 9.675541333e-3f;
    e = e * f + -5.550713274e-2f;
    e = e * f + 2.402211972e-1f;
    e = e * f + -6.931469671e-1f;
    e = e * f + 1.0f;
    return from_bits(to_bits(e) - (to_bits(shifted) << 23));
}

/* log(1 + e) / e on [0, 1], to 3e-8 */
static const float LOG1P[9] = {9.999999699e-1f, -4.999949314e-1f, 3.331909678e-1f, -2.484298303e-1f, 1.910600602e-1f,
                               -1.366324423e-1f, 7.822593343e-2f, -2.950522745e-2f, 5.232691437e-3f};

INLINE void block(void *p, const void *g, void *m, void *v, void *v_max, Constants c, Factors f, int dtype,
                  int amsgrad, int coupled) {
INDEPENDENT
    for (int64_t i = 0; i < BLOCK; i++) {
        float param = load(p, i, dtype), grad = load(g, i, dtype);
        if (dtype == BARE) {
            store(p, i, param + grad, dtype);
            store(m, i, load(m, i, dtype) + grad, dtype);
            store(v, i, load(v, i, dtype) + grad, dtype);
            if (amsgrad) store(v_max, i, load(v_max, i, dtype) + grad, dtype);
            continue;
        }
        if (coupled) grad = param * c.coupled + grad;
        float mean = load(m, i, dtype) * c.beta1 + c.one_minus_beta1 * grad;
        float square = load(v, i, dtype) * c.beta2 + c.one_minus_beta2 * grad * grad;
        store(m, i, mean, dtype);
        store(v, i, square, dtype);
        if (amsgrad) { /* as integers, so that NaN is the largest */
            uint32_t largest = to_bits(load(v_max, i, dtype)), now = to_bits(square);
            square = from_bits(largest > now ? largest : now);
            store(v_max, i, square, dtype);
        }
        float root = sqrtf(square), e = exp2_minus(root * f.x), log1p_over_e = f.log1p[8];
        for (int k = 7; k >= 0; k--) log1p_over_e = log1p_over_e * e + f.log1p[k];
        float denominator = log1p_over_e * e + root;
        store(p, i, param * c.shrink - f.rate * (mean / denominator), dtype);
    }
}

/* A last block that is not full goes through a copy: each element is computed by the same instructions, however many
   threads or processes share a tensor. */
INLINE void blocks(char *p, const char *g, char *m, char *v, char *v_max, int64_t start, int64_t stop, Constants c,
                   Factors f, int dtype, int amsgrad, int coupled) {
    const int64_t size = dtype == FLOAT32 || dtype == BARE ? 4 : 2;
    int64_t at = start * size;
    for (const int64_t last = (stop - BLOCK) * size; at <= last; at += BLOCK * size) {
        for (int64_t line = at + AHEAD * size; line < at + (AHEAD + BLOCK) * size; line += 64) {
            __builtin_prefetch(p + line, 1);
            __builtin_prefetch(g + line, 0);
            __builtin_prefetch(m + line, 1);
            __builtin_prefetch(v + line, 1);
            if (amsgrad) __builtin_prefetch(v_max + line, 1);
        }
        block(p + at, g + at, m + at, v + at, amsgrad ? v_max + at : 0, c, f, dtype, amsgrad, coupled);
    }
    if (at < stop * size) {
        char *const whole[] = {p + at, m + at, v + at, amsgrad ? v_max + at : 0};
        const size_t left = stop * size - at;
        _Alignas(64) char copy[5][BLOCK * 4] = {0};
        for (int k = 0; k < 3 + amsgrad; k++) memcpy(copy[k], whole[k], left);
        memcpy(copy[4], g + at, left);
        block(copy[0], copy[4], copy[1], copy[2], copy[3], c, f, dtype, amsgrad, coupled);
        for (int k = 0; k < 3 + amsgrad; k++) memcpy(whole[k], copy[k], left);
    }
}

#define VARIANTS(dtype)                                                                    \
    if (amsgrad && coupled) blocks(p, g, m, v, x, start, stop, c, f, dtype, 1, 1);         \
    else if (amsgrad) blocks(p, g, m, v, x, start, stop, c, f, dtype, 1, 0);               \
    else if (coupled) blocks(p, g, m, v, x, start, stop, c, f, dtype, 0, 1);               \
    else blocks(p, g, m, v, x, start, stop, c, f, dtype, 0, 0);

#define KERNEL(name, target)                                                                                   \
    target static void name(char *p, const char *g, char *m, char *v, char *x, int64_t start, int64_t stop,    \
                            Constants c, Factors f, int dtype, int amsgrad, int coupled) {                     \
        if (dtype == FLOAT32) { VARIANTS(FLOAT32) }                                                            \
        else if (dtype == BFLOAT16) { VARIANTS(BFLOAT16) }                                                     \
        else if (dtype == FLOAT16) { VARIANTS(FLOAT16) }                                                       \
        else { VARIANTS(BARE) }                                                                                \
    }

typedef void Kernel(char *, const char *, char *, char *, char *, int64_t, int64_t, Constants, Factors, int, int, int);

/* One tensor's second moment after the coming step, of which each element is counted by its exponent and first bits. */
typedef struct {
    const void *param, *grad, *exp_avg_sq, *max_exp_avg_sq;
    int64_t numel;
    int64_t *counts; /* BINS of them, added to */
    double beta2, weight_decay, correction;
    int32_t decoupled, maximize, amsgrad, dtype;
} Counting;

/* What cpu.py compares with its own. */
EXPORT const int64_t sadam_sizes[] = {sizeof(Options), sizeof(Table), sizeof(Counting), sizeof(Factors)};

#define BINS 2048
#define SHIFT 20 /* keeps the exponent and three bits of the mantissa */

INLINE void count(const Counting *w, int64_t start, int64_t stop, uint32_t bins[4][BINS], int dtype) {
    const float beta2 = (float)w->beta2, rest = (float)(1 - w->beta2), correction = (float)w->correction;
    const float coupled = w->decoupled ? 0 : (float)(w->maximize ? -w->weight_decay : w->weight_decay);
    const float underflow = dtype == BFLOAT16 ? 0x1p-134f : 0x1p-25f; /* up to here the state holds a zero */
    for (int64_t at = start; at < stop; at += BLOCK) {
        const int64_t here = stop - at < BLOCK ? stop - at : BLOCK;
        uint32_t found[BLOCK];
        INDEPENDENT
        for (int64_t i = 0; i < here; i++) {
            float grad = load(w->grad, at + i, dtype);
            if (coupled != 0) grad = load(w->param, at + i, dtype) * coupled + grad;
            float square = load(w->exp_avg_sq, at + i, dtype) * beta2 + rest * grad * grad;
            if (dtype != FLOAT32) square = square <= underflow ? correction * (grad * grad) : square;
            uint32_t bits = to_bits(square);
            if (w->amsgrad) {
                const uint32_t largest = to_bits(load(w->max_exp_avg_sq, at + i, dtype));
                bits = largest > bits ? largest : bits;
            }
            found[i] = (bits & 0x7fffffff) >> SHIFT;
        }
        for (int64_t i = 0; i < here; i++) bins[i & 3][found[i]]++; /* four, as one bin may be hit again and again */
    }
}

#define COUNTER(name, target)                                                                             \
    target static void name(const Counting *w, int64_t start, int64_t stop, uint32_t bins[4][BINS]) {     \
        if (w->dtype == FLOAT32) count(w, start, stop, bins, FLOAT32);                                    \
        else if (w->dtype == BFLOAT16) count(w, start, stop, bins, BFLOAT16);                             \
        else count(w, start, stop, bins, FLOAT16);                                                        \
    }

typedef void Counter(const Counting *, int64_t, int64_t, uint32_t[4][BINS]);

KERNEL(baseline, )
COUNTER(count_baseline, )
#if defined(__x86_64__)
KERNEL(avx2, __attribute__((target("avx2,fma"))))
COUNTER(count_avx2, __attribute__((target("avx2,fma"))))
KERNEL(avx512, AVX512("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))
#endif

/* The instruction sets, the best last. */
EXPORT const char *sadam_instruction_set(int index) {
#if defined(__x86_64__)
    static const char *const names[] = {"baseline", "avx2", "avx512"};
    return index >= 0 && index < 3 ? names[index] : 0;
#elif defined(__aarch64__)
    return index == 0 ? "neon" : 0;
#else
    return index == 0 ? "baseline" : 0;
#endif
}

/* Whether this CPU and its system have an instruction set. */
EXPORT int sadam_supports(int index) {
#if defined(__x86_64__)
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    unsigned eax, ebx, ecx, edx, saved, high;
    if (index == 0) return 1;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE) || !(ecx & bit_FMA)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* the registers that the system saves */
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2) || (saved & 0x06) != 0x06) return 0;
    return index == 1 || (index == 2 && (ebx & avx512) == avx512 && (saved & 0xe6) == 0xe6);
#else
    return index == 0;
#endif
}

typedef struct {
    const Table *table;
    Kernel *kernel;
    Constants constants;
    int amsgrad, coupled, bare;
} Work;

static void run(int64_t begin, int64_t end, void *context) {
    const Work *w = context;
    const Table *t = w->table;
    const uint64_t callers = mode();
    int64_t low = 0, high = t->n; /* the tensor that holds block `begin` */
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (t->first_block[middle] <= begin) low = middle;
        else high = middle;
    }
    for (int64_t k = low; k < t->n && t->first_block[k] < end; k++) {
        int64_t start = (begin - t->first_block[k]) * BLOCK, stop = (end - t->first_block[k]) * BLOCK;
        if (start < 0) start = 0;
        if (stop > t->numel[k]) stop = t->numel[k];
        if (start >= stop) continue;
        const int flush = t->dtype[k] == FLOAT32 && t->factors[k].log1p[8] >= FLT_MIN; /* which a huge beta is not */
        set_mode(flush ? callers | FLUSH : callers & ~FLUSH);
        w->kernel(t->param[k], t->grad[k], t->exp_avg[k], t->exp_avg_sq[k],
                  w->amsgrad ? t->max_exp_avg_sq[k] : 0, start, stop, w->constants, t->factors[k],
                  w->bare && t->dtype[k] == FLOAT32 ? BARE : t->dtype[k], w->amsgrad, w->coupled);
    }
    set_mode(callers);
}

typedef int32_t ParallelFor(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);

/* Counts the steps and updates the tensors; parallel_for is torch's, or null for the calling thread alone. */
EXPORT int sadam_step(const Table *t, const Options *o, int instruction_set, ParallelFor *parallel_for) {
    Work work = {t, baseline, {
        .coupled = (float)(o->maximize ? -o->weight_decay : o->weight_decay),
        .shrink = o->decoupled ? (float)(1 - o->lr * o->weight_decay) : 1.0f,
        .beta1 = (float)o->beta1, .one_minus_beta1 = (float)(o->maximize ? o->beta1 - 1 : 1 - o->beta1),
        .beta2 = (float)o->beta2, .one_minus_beta2 = (float)(1 - o->beta2),
    }, o->amsgrad, !o->decoupled && o->weight_decay != 0, o->bare};
#if defined(__x86_64__)
    if (instruction_set == 1) work.kernel = avx2;
    if (instruction_set == 2) work.kernel = avx512;
#else
    (void)instruction_set;
#endif
    const uint64_t callers = mode();
    double counted = -1, for_lr = 1, for_root = 1;
    set_mode(callers & ~FLUSH);
    for (int64_t k = 0; k < t->n; k++) {
        double step = *t->step[k] += 1.0f;
        if (step != counted && o->correction != NONE) {
            double c1 = 1 - pow(o->beta1, step), root_c2 = sqrt(1 - pow(o->beta2, step));
            for_lr = o->correction == OUTER ? root_c2 / c1 : 1 / c1;
            for_root = o->correction == OUTER ? 1 : 1 / root_c2;
            counted = step;
        }
        double x = t->beta[k] * for_root * 1.4426950408889634, scale = t->beta[k] ? 1 / (t->beta[k] * for_root) : 1;
        Factors *f = t->factors + k;
        f->x = x < 3e38 ? (float)x : 3e38f;
        f->rate = t->beta[k] ? (float)(o->gain * o->lr * for_lr / for_root) : 0.0f;
        for (int i = 0; i < 9; i++) f->log1p[i] = (float)(LOG1P[i] * scale);
    }
    set_mode(callers);
    int64_t all = t->first_block[t->n];
    if (parallel_for) return parallel_for(0, all, 32768 / BLOCK, run, &work);
    run(0, all, &work);
    return 0;
}

typedef struct {
    const Counting *counting;
    Counter *counter;
} Counted;

static void run_count(int64_t begin, int64_t end, void *context) {
    const Counted *w = context;
    uint32_t bins[4][BINS] = {{0}};
    const uint64_t callers = mode();
    set_mode(w->counting->dtype == FLOAT32 ? callers | FLUSH : callers & ~FLUSH);
    w->counter(w->counting, begin, end, bins);
    set_mode(callers);
    for (int i = 0; i < BINS; i++) {
        const int64_t sum = (int64_t)bins[0][i] + bins[1][i] + bins[2][i] + bins[3][i];
        if (sum) __atomic_fetch_add(w->counting->counts + i, sum, __ATOMIC_RELAXED);
    }
}

/* Adds the histogram of a tensor's second moment, as it will be after the coming step, to its counts. */
EXPORT int sadam_count(const Counting *counting, int instruction_set, ParallelFor *parallel_for) {
    Counted work = {counting, count_baseline};
#if defined(__x86_64__)
    if (instruction_set >= 1) work.counter = count_avx2; /* counting gains nothing from wider vectors */
#else
    (void)instruction_set;
#endif
    if (parallel_for) return parallel_for(0, counting->numel, 1 << 17, run_count, &work);
    run_count(0, counting->numel, &work);
    return 0;
}
