// The quantisers on CPUs: the bits of kernels/reference.py, vectorised by the compiler. docs/wire-format.md says what they are.
//
// Built by kernels/cpu.py with -ffp-contract=off and without -ffast-math: each operation rounds once, as in the reference. An
// entry point is called once per bucket with a table of runs, one per row and parameter. It allocates nothing, keeps no state,
// and may run on several threads at once.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire format is little-endian, and pairs of values are read as one word");

namespace {

// What is read and written may begin at any byte, and is read as what it was not written as.
typedef uint16_t __attribute__((may_alias, aligned(1))) bf16;
typedef uint16_t __attribute__((may_alias, aligned(1))) word16;
typedef uint32_t __attribute__((may_alias, aligned(1))) word32;

enum Kind { INT8 = 0, INT4 = 1 };
enum Type { FP32 = 0, BF16 = 1 };

constexpr int64_t SMALLEST_BLOCK = 32;
constexpr int64_t STRETCH = 2048;  // values that are worked on at a time: the largest block; a buffer of them stays in the L1 cache
constexpr int64_t ALIGN = 16;
constexpr uint32_t INFINITE = 0x7f800000u;
constexpr uint32_t SMALLEST = 0x17800000u;  // 2^-80: a block whose amax is below is zeros
constexpr float MAGIC = 12582912.0f;        // 1.5 * 2^23: added to |v| < 2^21, it rounds v to nearest even and leaves it in the low bits

}  // namespace

// One record of a message: n values of one parameter in one row. Mirrored by _Run in cpu.py.
struct Run {
  int64_t piece;   // which parameter
  int64_t n;       // values of the record, whole blocks
  int64_t valid;   // of them lie in the plain tensor; the rest are zeros on the wire, and written nowhere by the receiver
  int64_t record;  // byte offset of the record in the message
  int64_t own;     // first value in the parameter's own tensor
  int64_t joint;   // first value in one buffer that holds all parameters
};

// A geometry and a code. Mirrored by _Table in cpu.py.
struct Table {
  const Run* runs;
  int64_t count;
  int64_t bytes;  // of a message
  int64_t block;
  int32_t kind;
  int32_t scale;
  int32_t stochastic;
  int32_t unused;
};

// What loops over a block or more is compiled once and called: inlined everywhere, it would take three times as long to build.
#define LOOP __attribute__((noinline)) void

namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x) << 16); }

// To nearest even; right for everything but NaN, some of which would overflow into the sign.
inline bf16 round_number(float x) {
  const uint32_t bits = bits_of(x);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline bf16 round_any(float x) { return (bits_of(x) & 0x7fffffffu) > INFINITE ? bf16(0x7fc0) : round_number(x); }

inline void store_any(float& to, float x) { to = x; }
inline void store_any(bf16& to, float x) { to = round_any(x); }

// 1 / part of a block. That blocks are whole multiples of 32 is said to the compiler, which then leaves out the tails of loops.
template <class N>
inline N whole(N block, N part = 1) {
  if (block % 32 || block <= 0) __builtin_unreachable();
  return block / part;
}

// f(i, n) for i in [0, n). Compilers take as many codes at a time as a register holds, 64 bytes with AVX-512, and one at a time where n is
// smaller, unless they are told how many there are: seven times as slow for int4 in blocks of 64.
template <int full, class N, class F>
inline void repeat(N n, F f) {
  if (n == full / 4) {
    for (N i = 0; i < full / 4; ++i) f(i, N(full / 4));
  } else if (n == full / 2) {
    for (N i = 0; i < full / 2; ++i) f(i, N(full / 2));
  } else {
    for (N i = 0; i < n; ++i) f(i, n);
  }
}

// Bit pattern of the largest magnitude as fp32: compared as integers, NaN is the largest of all.
inline uint32_t largest(const float* __restrict x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < whole(n); ++i) {
    const int32_t bits = int32_t(bits_of(x[i]) & 0x7fffffffu);
    most = bits > most ? bits : most;
  }
  return uint32_t(most);
}

inline uint32_t largest(const bf16* __restrict x, int64_t n) {
  int16_t most = 0;
  for (int64_t i = 0; i < whole(n); ++i) {
    const int16_t bits = int16_t(x[i] & 0x7fff);
    most = bits > most ? bits : most;
  }
  return uint32_t(uint16_t(most)) << 16;
}

// The hash of stochastic rounding, in [0, 1).
inline float noise(float x, uint32_t place) {
  uint32_t h = bits_of(x) ^ (place * 0x9e3779b1u);
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  h = h ^ (h >> 16);
  return float(int32_t(h >> 8)) * 0x1p-24f;
}

// One value -> its code plus `zero`, in the low bits of a word; if that is not negative, the eight bits above it are zeros.
//
// To nearest, no clamp is needed: the scale's dtype has at least 8 significant bits, so |x| / scale <= top (1 + 2^-8) (1 + 2^-22),
// which for 127 and for 7 is below top + 1/2.
template <bool stochastic>
inline uint32_t code_of(float x, float inverse, float top, float zero, uint32_t place) {
  float scaled = x * inverse;
  if (stochastic) {
    scaled = std::floor(scaled + noise(x, place));
    scaled = scaled > top ? top : scaled;
    scaled = scaled < -top ? -top : scaled;
  }
  return bits_of(scaled + (MAGIC + zero));
}

// Two neighbours of a bf16 tensor, read as one word: widening and narrowing then move nothing across lanes.
inline float first(uint32_t pair) { return float_of(pair << 16); }
inline float second(uint32_t pair) { return float_of(pair & 0xffff0000u); }

template <Kind kind, bool stochastic>
LOOP write_codes(const float* __restrict x, float inverse, uint8_t* __restrict out, uint32_t block) {
  if (kind == INT8) {
    for (uint32_t i = 0; i < whole(block); ++i) out[i] = uint8_t(code_of<stochastic>(x[i], inverse, 127.0f, 0.0f, i));
  } else {
    repeat<64>(whole<uint32_t>(block, 2), [&](uint32_t i, uint32_t half) {
      const uint32_t low = code_of<stochastic>(x[i], inverse, 7.0f, 8.0f, i);
      const uint32_t high = code_of<stochastic>(x[i + half], inverse, 7.0f, 8.0f, i + half);
      out[i] = uint8_t(low | high << 4);
    });
  }
}

template <Kind kind, bool stochastic>
LOOP write_codes(const bf16* __restrict x, float inverse, uint8_t* __restrict out, uint32_t block) {
  if (stochastic) {  // the hash is most of the work; compilers give up on it in pairs
    float wide[STRETCH];
    for (uint32_t i = 0; i < whole(block); ++i) wide[i] = widen(x[i]);
    return write_codes<kind, true>(wide, inverse, out, block);
  }
  const auto code = [=](float value, float zero) { return code_of<false>(value, inverse, 0.0f, zero, 0); };
  const word32* __restrict pairs = reinterpret_cast<const word32*>(x);
  word16* __restrict to = reinterpret_cast<word16*>(out);
  if (kind == INT8) {
    for (uint32_t i = 0; i < whole<uint32_t>(block, 2); ++i) {  // offset by 128, so that no sign runs into the neighbour's bits
      const uint32_t low = code(first(pairs[i]), 128.0f), high = code(second(pairs[i]), 128.0f);
      to[i] = uint16_t((low | high << 8) ^ 0x8080u);
    }
  } else {
    repeat<32>(whole<uint32_t>(block, 4), [&](uint32_t i, uint32_t quarter) {
      const uint32_t a = code(first(pairs[i]), 8.0f), b = code(second(pairs[i]), 8.0f);
      const uint32_t c = code(first(pairs[i + quarter]), 8.0f), d = code(second(pairs[i + quarter]), 8.0f);
      to[i] = uint16_t(a | b << 8 | c << 4 | d << 12);
    });
  }
}

inline float read_scale(const uint8_t* at, int32_t type) {
  if (type == BF16) {
    bf16 narrow;
    std::memcpy(&narrow, at, 2);
    return widen(narrow);
  }
  float scale;
  std::memcpy(&scale, at, 4);
  return scale;
}

template <Kind kind>
constexpr int64_t code_bytes(int64_t n) { return kind == INT8 ? n : n / 2; }

// Bytes of the scales of n values. Blocks are powers of two, and divisions slow.
inline int64_t scale_bytes(int64_t n, int32_t type, int64_t block) {
  return (n >> __builtin_ctzll(uint64_t(block))) * (type == BF16 ? 2 : 4);
}

template <Kind kind>
inline void write_zeros(uint8_t* codes, int64_t block) {  // codes of zero, without looking at the values
  std::memset(codes, kind == INT8 ? 0 : 0x88, size_t(code_bytes<kind>(whole(block))));
}

// The scales of up to STRETCH values at once: the latency of two divisions is then paid once, not once per block.
//
// inverse: what to multiply by, or 0 where all codes are 0: such a block's values are never turned into integers.
template <Kind kind>
inline void write_scales(const uint32_t* most, int64_t count, uint8_t* at, int32_t type, float* inverse) {
  constexpr float top = kind == INT8 ? 127.0f : 7.0f;
  float scales[STRETCH / SMALLEST_BLOCK];
  for (int64_t b = 0; b < count; ++b) {
    const float scale = float_of(most[b]) / top;
    scales[b] = most[b] < SMALLEST ? 0.0f : most[b] >= INFINITE ? float_of(0x7fc00000u) : scale;
  }
  if (type == BF16) {
    bf16 narrow[STRETCH / SMALLEST_BLOCK];
    for (int64_t b = 0; b < count; ++b) narrow[b] = round_any(scales[b]);
    for (int64_t b = 0; b < count; ++b) scales[b] = widen(narrow[b]);
    std::memcpy(at, narrow, size_t(count) * 2);
  } else {
    std::memcpy(at, scales, size_t(count) * 4);
  }
  for (int64_t b = 0; b < count; ++b) inverse[b] = scales[b] > 0.0f ? 1.0f / scales[b] : 0.0f;
}

// n values, whole blocks -> codes and scales.
template <Kind kind, bool stochastic, class T>
LOOP encode(const T* x, int64_t n, uint8_t* codes, uint8_t* scales, int32_t scale_type, int64_t block) {
  uint32_t most[STRETCH / SMALLEST_BLOCK];
  float inverse[STRETCH / SMALLEST_BLOCK];
  for (int64_t at = 0; at < n; at += STRETCH) {
    const int64_t count = (n - at < STRETCH ? n - at : STRETCH) / block;
    for (int64_t b = 0; b < count; ++b) most[b] = largest(x + at + b * block, block);
    write_scales<kind>(most, count, scales + scale_bytes(at, scale_type, block), scale_type, inverse);
    for (int64_t b = 0; b < count; ++b) {
      uint8_t* to = codes + code_bytes<kind>(at + b * block);
      if (inverse[b] > 0.0f) write_codes<kind, stochastic>(x + at + b * block, inverse[b], to, uint32_t(block));
      else write_zeros<kind>(to, block);
    }
  }
}

// The value of a code as the receiver sees it.
template <Kind kind>
inline float value_of(const uint8_t* codes, int64_t i, float scale, bool high) {
  if (kind == INT8) return float(int8_t(codes[i])) * scale;
  return float(int32_t(high ? codes[i] >> 4 : codes[i] & 15) - 8) * scale;
}

// f(i, at, high): value i of a block is in code byte `at`, for int4 in its low or high half.
template <Kind kind, class F>
inline void each(int64_t block, F f) {
  if (kind == INT8) {
    for (int64_t i = 0; i < whole(block); ++i) f(i, i, false);
  } else {
    repeat<64>(whole<int64_t>(block, 2), [&](int64_t i, int64_t half) {
      f(i, i, false);
      f(i + half, i, true);
    });
  }
}

// Codes and a scale that is a number -> a block of values.
template <Kind kind>
inline void decode_numbers(const uint8_t* __restrict codes, float scale, float* __restrict out, int64_t block) {
  each<kind>(block, [&](int64_t i, int64_t at, bool high) { out[i] = value_of<kind>(codes, at, scale, high); });
}

// f(i, a, b): values 2 i and 2 i + 1 of a block.
template <Kind kind, class F>
inline void each_pair(const uint8_t* codes, float scale, int64_t block, F f) {
  const word16* pairs = reinterpret_cast<const word16*>(codes);
  if (kind == INT8) {
    for (int64_t i = 0; i < whole<int64_t>(block, 2); ++i) {
      const int32_t pair = int16_t(pairs[i]);
      f(i, float(int32_t(uint32_t(pair) << 24) >> 24) * scale, float(pair >> 8) * scale);
    }
  } else {
    repeat<32>(whole<int64_t>(block, 4), [&](int64_t i, int64_t quarter) {
      const int32_t pair = pairs[i];
      f(i, float((pair & 15) - 8) * scale, float((pair >> 8 & 15) - 8) * scale);
      f(i + quarter, float((pair >> 4 & 15) - 8) * scale, float((pair >> 12) - 8) * scale);
    });
  }
}

template <Kind kind>
inline void decode_numbers(const uint8_t* __restrict codes, float scale, bf16* __restrict out, int64_t block) {
  each_pair<kind>(codes, scale, block, [&](int64_t i, float a, float b) {
    reinterpret_cast<word32*>(out)[i] = uint32_t(round_number(a)) | uint32_t(round_number(b)) << 16;
  });
}

template <Kind kind, class T>
LOOP decode(const uint8_t* codes, float scale, T* out, int64_t block) {
  if (scale == scale) return decode_numbers<kind>(codes, scale, out, block);
  for (int64_t i = 0; i < whole(block); ++i) store_any(out[i], float_of(0x7fc00000u));
}

// image + what codes and scale say, in place.
template <Kind kind>
LOOP add(const uint8_t* __restrict codes, float scale, float* __restrict image, int64_t block) {
  each<kind>(block, [&](int64_t i, int64_t at, bool high) { image[i] = image[i] + value_of<kind>(codes, at, scale, high); });
}

template <Kind kind>
LOOP add(const uint8_t* __restrict codes, float scale, bf16* __restrict image, int64_t block) {
  each_pair<kind>(codes, scale, block, [&](int64_t i, float a, float b) {
    word32* pair = reinterpret_cast<word32*>(image) + i;
    *pair = uint32_t(round_any(first(*pair) + a)) | uint32_t(round_any(second(*pair) + b)) << 16;
  });
}

// out = [out +] y_0 + ... + y_(terms - 1), in this order.
template <Kind kind, int terms, bool more>
LOOP add_terms(const uint8_t* const* codes, const float* scales, float* __restrict out, int64_t block) {
  const uint8_t* __restrict a = codes[0];
  const uint8_t* __restrict b = codes[terms > 1 ? 1 : 0];
  const uint8_t* __restrict c = codes[terms > 2 ? 2 : 0];
  const uint8_t* __restrict d = codes[terms > 3 ? 3 : 0];
  const float sa = scales[0], sb = scales[terms > 1 ? 1 : 0], sc = scales[terms > 2 ? 2 : 0], sd = scales[terms > 3 ? 3 : 0];
  each<kind>(block, [&](int64_t i, int64_t at, bool high) {
    float sum = value_of<kind>(a, at, sa, high);
    if (more) sum = out[i] + sum;
    if (terms > 1) sum = sum + value_of<kind>(b, at, sb, high);
    if (terms > 2) sum = sum + value_of<kind>(c, at, sc, high);
    if (terms > 3) sum = sum + value_of<kind>(d, at, sd, high);
    out[i] = sum;
  });
}

template <Kind kind, bool more>
inline void add_some(int64_t terms, const uint8_t* const* codes, const float* scales, float* out, int64_t block) {
  if (terms == 1) add_terms<kind, 1, more>(codes, scales, out, block);
  if (terms == 2) add_terms<kind, 2, more>(codes, scales, out, block);
  if (terms == 3) add_terms<kind, 3, more>(codes, scales, out, block);
  if (terms == 4) add_terms<kind, 4, more>(codes, scales, out, block);
}

// The block of a record of n values that begins at value `at`, summed over `parts` messages that lie `stride` bytes apart.
template <Kind kind>
LOOP sum_parts(const uint8_t* record, int64_t n, int64_t at, int64_t parts, int64_t stride, int32_t scale_type, float* out,
               int64_t block) {
  const int64_t code_at = code_bytes<kind>(at), scale_at = code_bytes<kind>(n) + scale_bytes(at, scale_type, block);
  for (int64_t part = 0; part < parts; part += 4) {
    const int64_t terms = parts - part < 4 ? parts - part : 4;
    const uint8_t* codes[4];
    float scales[4];
    for (int64_t term = 0; term < terms; ++term) {
      const uint8_t* from = record + (part + term) * stride;
      codes[term] = from + code_at;
      scales[term] = read_scale(from + scale_at, scale_type);
    }
    if (part) add_some<kind, true>(terms, codes, scales, out, block);
    else add_some<kind, false>(terms, codes, scales, out, block);
  }
}

// Zeros from the end of the scales to a multiple of ALIGN.
template <Kind kind>
inline void write_padding(uint8_t* record, int64_t n, int32_t scale_type, int64_t block) {
  const int64_t used = code_bytes<kind>(n) + scale_bytes(n, scale_type, block);
  std::memset(record + used, 0, size_t((used + ALIGN - 1) / ALIGN * ALIGN - used));
}

template <Kind kind, bool stochastic, class T>
void quantize(const Table& table, const void* const* sources, bool joint, uint8_t* message) {
  const int64_t block = whole(table.block);
  T last[STRETCH];
  for (const Run* run = table.runs; run != table.runs + table.count; ++run) {
    const T* x = static_cast<const T*>(sources[joint ? 0 : run->piece]) + (joint ? run->joint : run->own);
    uint8_t* codes = message + run->record;
    uint8_t* scales = codes + code_bytes<kind>(run->n);
    int64_t at = run->valid / block * block;
    encode<kind, stochastic>(x, at, codes, scales, table.scale, block);
    if (at < run->valid) {  // a block that is partly padding
      const int64_t left = run->valid - at;
      std::memcpy(last, x + at, size_t(left) * sizeof(T));
      std::memset(last + left, 0, size_t(block - left) * sizeof(T));
      uint8_t* scale = scales + scale_bytes(at, table.scale, block);
      encode<kind, stochastic>(last, block, codes + code_bytes<kind>(at), scale, table.scale, block);
      at += block;
    }
    for (; at < run->n; at += block) {
      write_zeros<kind>(codes + code_bytes<kind>(at), block);
      std::memset(scales + scale_bytes(at, table.scale, block), 0, size_t(scale_bytes(block, table.scale, block)));
    }
    write_padding<kind>(codes, run->n, table.scale, block);
  }
}

template <Kind kind, bool stochastic, class T>
void quantize_delta(const Table& table, const float* x, const T* image, uint8_t* message) {
  const int64_t block = whole(table.block);
  float difference[STRETCH];
  for (const Run* run = table.runs; run != table.runs + table.count; ++run) {
    uint8_t* codes = message + run->record;
    uint8_t* scales = codes + code_bytes<kind>(run->n);
    for (int64_t at = 0; at < run->n; at += STRETCH) {
      const int64_t n = run->n - at < STRETCH ? run->n - at : STRETCH;
      const float* __restrict a = x + run->joint + at;
      const T* __restrict b = image + run->joint + at;
      for (int64_t i = 0; i < whole(n); ++i) difference[i] = a[i] - widen(b[i]);
      uint8_t* scale = scales + scale_bytes(at, table.scale, block);
      encode<kind, stochastic>(difference, n, codes + code_bytes<kind>(at), scale, table.scale, block);
    }
    write_padding<kind>(codes, run->n, table.scale, block);
  }
}

template <Kind kind, class T>
void dequantize(const Table& table, const uint8_t* message, T* out) {
  const int64_t block = whole(table.block);
  T some[STRETCH];
  for (const Run* run = table.runs; run != table.runs + table.count; ++run) {
    const uint8_t* record = message + run->record;
    const uint8_t* scales = record + code_bytes<kind>(run->n);
    T* to = out + run->joint;
    for (int64_t at = 0; at < run->valid; at += block) {
      const float scale = read_scale(scales + scale_bytes(at, table.scale, block), table.scale);
      const int64_t left = run->valid - at;
      decode<kind>(record + code_bytes<kind>(at), scale, left >= block ? to + at : some, block);
      if (left < block) std::memcpy(to + at, some, size_t(left) * sizeof(T));
    }
  }
}

template <Kind kind, class T>
void apply_delta(const Table& table, const uint8_t* message, T* image) {
  const int64_t block = whole(table.block);
  for (const Run* run = table.runs; run != table.runs + table.count; ++run) {
    const uint8_t* record = message + run->record;
    const uint8_t* scales = record + code_bytes<kind>(run->n);
    for (int64_t at = 0; at < run->n; at += block) {
      const float scale = read_scale(scales + scale_bytes(at, table.scale, block), table.scale);
      add<kind>(record + code_bytes<kind>(at), scale, image + run->joint + at, block);
    }
  }
}

// out = [main +] sum. Without out the sum goes to the mains.
template <Kind kind>
void reduce(const Table& table, const uint8_t* message, int64_t parts, float* const* mains, float* out) {
  const int64_t block = whole(table.block);
  float sum[STRETCH];
  for (const Run* run = table.runs; run != table.runs + table.count; ++run) {
    for (int64_t at = 0; at < run->n; at += block) {
      float* to = out ? out + run->joint + at : nullptr;
      sum_parts<kind>(message + run->record, run->n, at, parts, table.bytes, table.scale, mains ? sum : to, block);
      if (!mains) continue;
      const float* main = mains[run->piece] + run->own + at;
      if (!to) to = mains[run->piece] + run->own + at;
      for (int64_t i = 0; i < whole(block); ++i) to[i] = main[i] + sum[i];
    }
  }
}

template <Kind kind, Kind other, bool stochastic>
void requantize(const Table& table, const Table& into, const uint8_t* message, int64_t parts, uint8_t* out) {
  const int64_t from = whole(table.block), block = whole(into.block);
  float sum[STRETCH];  // blocks are powers of two up to STRETCH: it holds whole ones of either size
  for (int64_t r = 0; r < table.count; ++r) {
    const Run &source = table.runs[r], &target = into.runs[r];
    uint8_t* codes = out + target.record;
    uint8_t* scales = codes + code_bytes<other>(target.n);
    for (int64_t at = 0; at < source.n; at += STRETCH) {
      const int64_t n = source.n - at < STRETCH ? source.n - at : STRETCH;
      for (int64_t i = 0; i < n; i += from)
        sum_parts<kind>(message + source.record, source.n, at + i, parts, table.bytes, table.scale, sum + i, from);
      uint8_t* scale = scales + scale_bytes(at, into.scale, block);
      encode<other, stochastic>(sum, n, codes + code_bytes<other>(at), scale, into.scale, block);
    }
    write_padding<other>(codes, target.n, into.scale, block);
  }
}

// A run-time choice as a type: f(std::integral_constant<...>).
template <class F>
void with_kind(const Table& table, F f) {
  if (table.kind == INT8) f(std::integral_constant<Kind, INT8>());
  else f(std::integral_constant<Kind, INT4>());
}

template <class F>
void with_rounding(const Table& table, F f) {
  if (table.stochastic) f(std::true_type());
  else f(std::false_type());
}

}  // namespace

extern "C" {

void zcompile_quantize(const Table* table, const void* const* sources, int64_t type, int64_t joint, uint8_t* message) {
  with_kind(*table, [&](auto kind) {
    with_rounding(*table, [&](auto stochastic) {
      if (type == BF16) quantize<kind(), stochastic(), bf16>(*table, sources, joint, message);
      else quantize<kind(), stochastic(), float>(*table, sources, joint, message);
    });
  });
}

void zcompile_quantize_delta(const Table* table, const float* x, const void* image, int64_t type, uint8_t* message) {
  with_kind(*table, [&](auto kind) {
    with_rounding(*table, [&](auto stochastic) {
      if (type == BF16) quantize_delta<kind(), stochastic()>(*table, x, static_cast<const bf16*>(image), message);
      else quantize_delta<kind(), stochastic()>(*table, x, static_cast<const float*>(image), message);
    });
  });
}

void zcompile_dequantize(const Table* table, const uint8_t* message, int64_t type, void* out) {
  with_kind(*table, [&](auto kind) {
    if (type == BF16) dequantize<kind()>(*table, message, static_cast<bf16*>(out));
    else dequantize<kind()>(*table, message, static_cast<float*>(out));
  });
}

void zcompile_apply_delta(const Table* table, const uint8_t* message, int64_t type, void* image) {
  with_kind(*table, [&](auto kind) {
    if (type == BF16) apply_delta<kind()>(*table, message, static_cast<bf16*>(image));
    else apply_delta<kind()>(*table, message, static_cast<float*>(image));
  });
}

void zcompile_reduce(const Table* table, const uint8_t* message, int64_t parts, float* const* mains, float* out) {
  with_kind(*table, [&](auto kind) { reduce<kind()>(*table, message, parts, mains, out); });
}

void zcompile_requantize(const Table* table, const Table* into, const uint8_t* message, int64_t parts, uint8_t* out) {
  with_kind(*table, [&](auto kind) {
    with_kind(*into, [&](auto other) {
      with_rounding(*into, [&](auto stochastic) {
        requantize<kind(), other(), stochastic()>(*table, *into, message, parts, out);
      });
    });
  });
}

}  // extern "C"
