// CRC-32C (Castagnoli), the checksum of every chunk of a checkpoint: polynomial 0x1edc6f41, reflected, both ends
// inverted. crc32c("123456789") is 0xe3069283.
#pragma once

#include <cstddef>
#include <cstdint>

namespace osf {

// The checksum of the bytes that `seed` is the checksum of, followed by [data, data + bytes). Uses the processor's CRC
// instruction where it has one, three blocks at a time.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

// The same from tables.
uint32_t crc32c_software(const void* data, size_t bytes, uint32_t seed = 0);

// What crc32c() runs on: "sse4.2", "armv8" or "tables".
const char* crc32c_implementation();

}  // namespace osf
