// Floating-point storage and its conversions, sixteen bytes at a time: the same roundings on the GPU and on the host.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SFT_DEVICE __host__ __device__ __forceinline__
#else
#define SFT_DEVICE inline
#endif

namespace sft {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

SFT_DEVICE float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

SFT_DEVICE uint32_t float_to_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}

SFT_DEVICE float to_float(float x) { return x; }
SFT_DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
SFT_DEVICE float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#elif !defined(__CUDACC__)
  return float(std::bit_cast<_Float16>(x.bits));
#else
  return 0.0f;  // nvcc's host side, which has no half and never asks
#endif
}

// To the nearest, ties to even; NaN is 0x7fff, as the GPU makes it.
template <class T>
SFT_DEVICE T from_float(float x);

template <>
SFT_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
SFT_DEVICE bf16 from_float<bf16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
SFT_DEVICE fp16 from_float<fp16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#elif !defined(__CUDACC__)
  if (x != x) return {0x7fff};
  return {std::bit_cast<uint16_t>(_Float16(x))};
#else
  return {};
#endif
}

// What one memory access of a thread moves.
struct alignas(16) Vector {
  uint32_t word[4];
};

// As one access: the compiler makes four of a plain copy.
SFT_DEVICE Vector read(const Vector* at) {
#ifdef __CUDA_ARCH__
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
#else
  return *at;
#endif
}

SFT_DEVICE void write(Vector* at, const Vector& v) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<uint4*>(at) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
#else
  *at = v;
#endif
}

template <class T>
inline constexpr int VEC = 16 / sizeof(T);  // elements of a vector

template <class T>
SFT_DEVICE void unpack(const Vector& v, float (&x)[VEC<T>]) {
#pragma unroll
  for (int k = 0; k < VEC<T>; ++k) {
    if constexpr (sizeof(T) == 4) {
      x[k] = bits_to_float(v.word[k]);
    } else {
      x[k] = to_float(T{uint16_t(v.word[k / 2] >> 16 * (k % 2))});
    }
  }
}

template <class T>
SFT_DEVICE uint32_t pack_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  // One instruction for both.
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
SFT_DEVICE Vector pack(const float (&x)[VEC<T>]) {
  Vector v;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      v.word[k] = float_to_bits(x[k]);
    } else {
      v.word[k] = pack_pair<T>(x[2 * k], x[2 * k + 1]);
    }
  }
  return v;
}

}  // namespace sft
