// Element types, their conversions to float, and argument checks. Included by host and device code; knows nothing of
// torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define OSF_HD __host__ __device__ __forceinline__
#else
#define OSF_HD inline
#endif

// One wheel serves every x86-64: the marked function and all that it calls are compiled three times, and the loader
// picks, which is before a sanitizer is ready for it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define OSF_SIMD_CLONES __attribute__((flatten, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define OSF_SIMD_CLONES
#endif

namespace osf {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

OSF_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

OSF_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

OSF_HD float to_float(float value) {
    return value;
}

OSF_HD float to_float(BFloat16 value) {
    return float_of(uint32_t{value.bits} << 16);
}

// Both branches of each choice are computed, so that the loop around it turns into vector instructions.
OSF_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t magnitude = value.bits & 0x7fffu;
    const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
    const uint32_t rebias =
        magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // infinity and NaN go to the top exponent
    const uint32_t normal = (magnitude << 13) + rebias;
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return float_of((magnitude < 0x0400u ? subnormal : normal) | sign);
#endif
}

// Conversions from float round to nearest, ties to even.
template <class T>
OSF_HD T from_float(float value);

template <>
OSF_HD float from_float<float>(float value) {
    return value;
}

template <>
OSF_HD BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t quiet_nan = bits >> 16 | 0x0040u;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
#endif
}

template <>
OSF_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
    // Adding 0.5 leaves the 24th binary place last: the addition itself rounds a subnormal.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return {static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | sign)};
#endif
}

// Calls body(T{}) for the element type that torch names so.
template <class Body>
void with_element_type(const std::string& dtype, Body&& body) {
    if (dtype == "float32") return body(float{});
    if (dtype == "bfloat16") return body(BFloat16{});
    if (dtype == "float16") return body(Float16{});
    throw std::invalid_argument("dtype is " + dtype + "; it must be float32, bfloat16 or float16");
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace osf
