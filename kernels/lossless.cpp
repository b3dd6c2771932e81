// The lossless delta on CPUs: the bits of kernels/lossless.py. docs/wire-format.md says what they are.

#include <cstdint>
#include <cstring>

namespace {

// What is read and written may begin at any byte, and is read as what it was not written as.
typedef uint16_t __attribute__((may_alias, aligned(1))) word16;
typedef uint32_t __attribute__((may_alias, aligned(1))) word32;

constexpr int64_t HEADER = 16;
constexpr int64_t STRETCH = 1024;  // values that are worked on at a time: buffers of them stay in the L1 cache
constexpr int64_t SHARE = 16;      // one value in so many may be an exception
constexpr int ESCAPE = -128;

inline int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
inline int64_t room(int64_t n) { return (n + SHARE - 1) / SHARE; }
inline int64_t record_bytes(int64_t n) { return HEADER + aligned(n) + aligned(2 * room(n)); }

// Bit patterns of bf16 in the order of their values, as a signed number; its own inverse.
inline int16_t ordered(uint16_t bits) { return int16_t(bits ^ uint16_t((int16_t(bits) >> 15) & 0x7fff)); }

inline uint16_t rounded(uint32_t bits) {
  const uint16_t number = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0) : number;
}

// Up to STRETCH values: their codes, the sum of the old bit patterns, whether there are exceptions among them.
__attribute__((noinline)) bool encode(const word32* __restrict master, const word16* __restrict old, int64_t n, uint16_t* __restrict bits,
                                      int8_t* __restrict codes, uint32_t& sum) {
  for (int64_t i = 0; i < n; ++i) bits[i] = rounded(master[i]);
  uint16_t far = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int16_t step = int16_t(uint16_t(ordered(bits[i])) - uint16_t(ordered(old[i])));
    const bool exception = uint16_t(step + 127) > 254;
    far |= uint16_t(exception);
    codes[i] = int8_t(exception ? ESCAPE : step);
  }
  uint32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += old[i];
  sum += total;
  return far;
}

// Up to STRETCH values: old ones become new ones. Exceptions are not brought here: whether there are any.
__attribute__((noinline)) bool decode(const int8_t* __restrict codes, word16* __restrict values, int64_t n, uint32_t& sum) {
  uint32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  sum += total;
  uint8_t far = 0;
  for (int64_t i = 0; i < n; ++i) {
    far |= uint8_t(codes[i] == ESCAPE);
    values[i] = uint16_t(ordered(uint16_t(ordered(values[i]) + codes[i])));
  }
  return far;
}

// f(i) for each exception among n codes, in order: eight codes at a time, as there are few.
template <class F>
inline void each_exception(const int8_t* codes, int64_t n, F f) {
  constexpr uint64_t ESCAPES = 0x8080808080808080u, ONES = 0x0101010101010101u;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, codes + i, 8);
    eight ^= ESCAPES;  // an escape is a zero byte now
    if (!((eight - ONES) & ~eight & ESCAPES)) continue;
    for (int64_t j = i; j < i + 8; ++j)
      if (codes[j] == ESCAPE) f(j);
  }
  for (; i < n; ++i)
    if (codes[i] == ESCAPE) f(i);
}

}  // namespace

extern "C" {

// One row: `count` parameters of n[i] values. `master` has them side by side; `old[i]` is what the others have of each.
// exceptions: that did not find room in their record, over all parameters; such a message is not to be sent.
void zcompile_lossless_encode(const uint32_t* master, const uint16_t* const* old, const int64_t* n, int64_t count, uint8_t* message,
                              int64_t* exceptions) {
  uint16_t bits[STRETCH];
  *exceptions = 0;
  for (int64_t p = 0; p < count; ++p) {
    int8_t* codes = reinterpret_cast<int8_t*>(message + HEADER);
    word16* to = reinterpret_cast<word16*>(message + HEADER + aligned(n[p]));
    int64_t found = 0;
    const int64_t most = room(n[p]);
    uint32_t sum = 0;
    for (int64_t at = 0; at < n[p]; at += STRETCH) {
      const int64_t some = n[p] - at < STRETCH ? n[p] - at : STRETCH;
      if (!encode(reinterpret_cast<const word32*>(master + at), reinterpret_cast<const word16*>(old[p] + at), some, bits, codes + at, sum))
        continue;
      each_exception(codes + at, some, [&](int64_t i) {
        if (found < most) to[found] = bits[i];
        ++found;
      });
    }
    const uint32_t header[4] = {uint32_t(found), sum, 0, 0};
    std::memcpy(message, header, sizeof(header));
    std::memset(codes + n[p], 0, size_t(aligned(n[p]) - n[p]));
    const int64_t used = found < most ? found : most;
    std::memset(to + used, 0, size_t(aligned(2 * most) - 2 * used));
    if (found > most) *exceptions += found - most;
    master += n[p];
    message += record_bytes(n[p]);
  }
}

// `rows` rows of the same parameters, each into values[i] + row * stride[i].
// wrong: a parameter whose old values are not those that the sender had, or whose record lacks exceptions; -1: none.
void zcompile_lossless_decode(const uint8_t* message, int64_t rows, uint16_t* const* values, const int64_t* n, const int64_t* stride,
                              int64_t count, int64_t* wrong) {
  *wrong = -1;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t p = 0; p < count; ++p) {
      uint32_t header[4];
      std::memcpy(header, message, sizeof(header));
      const int8_t* codes = reinterpret_cast<const int8_t*>(message + HEADER);
      const word16* from = reinterpret_cast<const word16*>(message + HEADER + aligned(n[p]));
      word16* to = reinterpret_cast<word16*>(values[p] + row * stride[p]);
      int64_t found = 0;
      const int64_t most = room(n[p]);
      uint32_t sum = 0;
      for (int64_t at = 0; at < n[p]; at += STRETCH) {
        const int64_t some = n[p] - at < STRETCH ? n[p] - at : STRETCH;
        if (!decode(codes + at, to + at, some, sum)) continue;
        each_exception(codes + at, some, [&](int64_t i) {
          if (found < most) to[at + i] = from[found];
          ++found;
        });
      }
      if ((sum != header[1] || uint32_t(found) != header[0] || found > most) && *wrong < 0) *wrong = p;
      message += record_bytes(n[p]);
    }
  }
}

}  // extern "C"
