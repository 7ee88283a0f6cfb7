#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define OSF_CRC_INSTRUCTION "sse4.2"
#define OSF_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define OSF_CRC_INSTRUCTION "armv8"
#ifdef __clang__
#define OSF_CRC_TARGET __attribute__((target("crc")))
#else
#define OSF_CRC_TARGET __attribute__((target("+crc")))
#endif
#endif

namespace osf {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected: bit 31 is the coefficient of x^0

// All below works on the register, which is the inverted checksum. A register is a polynomial, and a byte that enters
// multiplies it by x^8 modulo the polynomial.
uint32_t times_x(uint32_t a) {
    return (a >> 1) ^ (a & 1 ? kPolynomial : 0);
}

uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int power = 31; power >= 0; --power, b = times_x(b))
        if (a >> power & 1) product ^= b;
    return product;
}

// table[k][byte]: the register after `byte` and then k zero bytes have entered an empty one.
using ByteTables = std::array<std::array<uint32_t, 256>, 8>;

const ByteTables kByteTables = [] {
    ByteTables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (auto& table : tables) {
            for (int bit = 0; bit < 8; ++bit) value = times_x(value);
            table[byte] = value;
        }
    }
    return tables;
}();

uint64_t load64(const unsigned char* data) {
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

uint32_t update_software(uint32_t state, const unsigned char* data, size_t bytes) {
    const ByteTables& table = kByteTables;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; bytes >= 8; data += 8, bytes -= 8) {
        const uint64_t word = load64(data) ^ state;
        state = 0;
        for (int byte = 0; byte < 8; ++byte) state ^= table[7 - byte][word >> (8 * byte) & 0xff];
    }
#endif
    for (; bytes > 0; ++data, --bytes) state = (state >> 8) ^ table[0][(state ^ *data) & 0xff];
    return state;
}

#ifdef OSF_CRC_INSTRUCTION
// Moves a register past `kBytes` zero bytes with four look-ups: what joins the checksums of neighbouring blocks.
template <size_t kBytes>
struct Advance {
    std::array<std::array<uint32_t, 256>, 4> table{};

    Advance() {
        uint32_t factor = uint32_t{1} << 31;
        for (size_t bit = 0; bit < 8 * kBytes; ++bit) factor = times_x(factor);
        for (int byte = 0; byte < 4; ++byte)
            for (uint32_t value = 0; value < 256; ++value) table[byte][value] = multiply(value << (8 * byte), factor);
    }

    uint32_t operator()(uint32_t state) const {
        return table[0][state & 0xff] ^ table[1][state >> 8 & 0xff] ^ table[2][state >> 16 & 0xff] ^
               table[3][state >> 24];
    }
};

#if defined(__x86_64__)
OSF_CRC_TARGET inline uint64_t step(uint64_t state, uint64_t word) {
    return _mm_crc32_u64(state, word);
}
OSF_CRC_TARGET inline uint32_t step(uint32_t state, unsigned char byte) {
    return _mm_crc32_u8(state, byte);
}
bool has_instruction() {
    return __builtin_cpu_supports("sse4.2");
}
#else
OSF_CRC_TARGET inline uint64_t step(uint64_t state, uint64_t word) {
    return __crc32cd(static_cast<uint32_t>(state), word);
}
OSF_CRC_TARGET inline uint32_t step(uint32_t state, unsigned char byte) {
    return __crc32cb(state, byte);
}
bool has_instruction() {
    return getauxval(AT_HWCAP) & HWCAP_CRC32;
}
#endif

// The instruction takes three cycles and one can start in each: three blocks side by side keep it busy.
template <size_t kBlock>
OSF_CRC_TARGET uint32_t three_blocks(uint32_t state, const unsigned char*& data, size_t& bytes) {
    static const Advance<kBlock> advance;
    for (; bytes >= 3 * kBlock; data += 3 * kBlock, bytes -= 3 * kBlock) {
        uint64_t first = state, second = 0, third = 0;
        for (size_t i = 0; i < kBlock; i += 8) {
            first = step(first, load64(data + i));
            second = step(second, load64(data + kBlock + i));
            third = step(third, load64(data + 2 * kBlock + i));
        }
        state = advance(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
        state = advance(state) ^ static_cast<uint32_t>(third);
    }
    return state;
}

OSF_CRC_TARGET uint32_t update_instruction(uint32_t state, const unsigned char* data, size_t bytes) {
    state = three_blocks<4096>(state, data, bytes);
    state = three_blocks<256>(state, data, bytes);
    uint64_t wide = state;
    for (; bytes >= 8; data += 8, bytes -= 8) wide = step(wide, load64(data));
    state = static_cast<uint32_t>(wide);
    for (; bytes > 0; ++data, --bytes) state = step(state, *data);
    return state;
}
#endif

}  // namespace

const char* crc32c_implementation() {
#ifdef OSF_CRC_INSTRUCTION
    if (has_instruction()) return OSF_CRC_INSTRUCTION;
#endif
    return "tables";
}

uint32_t crc32c(const void* data, size_t bytes, uint32_t seed) {
#ifdef OSF_CRC_INSTRUCTION
    static const bool instruction = has_instruction();
    if (instruction) return ~update_instruction(~seed, static_cast<const unsigned char*>(data), bytes);
#endif
    return crc32c_software(data, bytes, seed);
}

uint32_t crc32c_software(const void* data, size_t bytes, uint32_t seed) {
    return ~update_software(~seed, static_cast<const unsigned char*>(data), bytes);
}

}  // namespace osf
