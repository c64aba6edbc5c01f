// AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../elements.h"

namespace thinned {
namespace {

struct Words {
    static constexpr int lanes = 4;
    __m256i v;

    static Words load(const uint64_t* from) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
    }
    static Words all(uint64_t value) { return {_mm256_set1_epi64x(static_cast<long long>(value))}; }
    void store(uint64_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
    static void store_pairs(uint64_t* to, Words a, Words b) {
        const __m256i even = _mm256_unpacklo_epi64(a.v, b.v), odd = _mm256_unpackhi_epi64(a.v, b.v);
        Words{_mm256_permute2x128_si256(even, odd, 0x20)}.store(to);
        Words{_mm256_permute2x128_si256(even, odd, 0x31)}.store(to + lanes);
    }
    friend Words multiply_low(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
    friend Words high_half(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
    friend Words add(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
    friend Words xor2(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
    friend Words and2(Words a, Words b) { return {_mm256_and_si256(a.v, b.v)}; }
    friend Words xor3(Words a, Words b, Words c) { return xor2(xor2(a, b), c); }
    friend Words join_low(Words low, Words high) {
        return {_mm256_blend_epi32(low.v, _mm256_slli_epi64(high.v, 32), 0xAA)};
    }
    friend Words below_above(Words below, Words plane, Words bit) {
        const __m256i other = _mm256_andnot_si256(plane.v, _mm256_or_si256(below.v, bit.v));
        return {_mm256_or_si256(other, _mm256_and_si256(below.v, bit.v))};
    }
    friend Words equal_above(Words equal, Words plane, Words bit) {
        return {_mm256_andnot_si256(xor2(plane, bit).v, equal.v)};
    }
    friend unsigned nonzero(Words a, Words b) {
        const __m256i either = _mm256_or_si256(a.v, b.v);
        const __m256i zero = _mm256_cmpeq_epi64(either, _mm256_setzero_si256());
        return ~static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(zero))) & 15;
    }
    static void compress(uint64_t* to, unsigned chosen, Words words) {
        uint64_t lane[lanes];
        words.store(lane);
        compress_lanes(to, chosen, lane, lanes);
    }
};

struct Floats {
    static constexpr int lanes = 8;
    using Scalar = float;
    __m256 v;

    static Floats all(float value) { return {_mm256_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Floats load(const Half* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
    }
    static Floats load(const BFloat* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    void stream(void* to) const { _mm256_stream_ps(static_cast<float*>(to), v); }
    void store(Half* to) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    void store(BFloat* to) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
    friend Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    friend Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
    friend Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
    friend Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
    friend Floats if_less(Floats a, Floats b, Floats then, Floats otherwise) {
        return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
    }
    friend Floats to_exponent(Floats a) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
    }
    static __m256 expand(unsigned mask) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit);
        return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
    }
    friend Floats select(unsigned mask, Floats kept, Floats dropped) {
        return {_mm256_blendv_ps(dropped.v, kept.v, expand(mask))};
    }
    friend Floats keep(unsigned mask, Floats a) { return {_mm256_and_ps(a.v, expand(mask))}; }
};

struct Doubles {
    static constexpr int lanes = 4;
    using Scalar = double;
    __m256d v;

    static Doubles all(double value) { return {_mm256_set1_pd(value)}; }
    static Doubles load(const double* from) { return {_mm256_loadu_pd(from)}; }
    void store(double* to) const { _mm256_storeu_pd(to, v); }
    friend Doubles multiply(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
    void stream(void* to) const { _mm256_stream_pd(static_cast<double*>(to), v); }
    friend Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.v, b.v)}; }
    friend Doubles subtract(Doubles a, Doubles b) { return {_mm256_sub_pd(a.v, b.v)}; }
    friend Doubles divide(Doubles a, Doubles b) { return {_mm256_div_pd(a.v, b.v)}; }
    friend Doubles larger(Doubles a, Doubles b) { return {_mm256_max_pd(a.v, b.v)}; }
    friend Doubles if_less(Doubles a, Doubles b, Doubles then, Doubles otherwise) {
        return {_mm256_blendv_pd(otherwise.v, then.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
    }
    static __m256d expand(unsigned mask) {
        const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
        const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(mask)), bit);
        return _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, bit));
    }
    friend Doubles select(unsigned mask, Doubles kept, Doubles dropped) {
        return {_mm256_blendv_pd(dropped.v, kept.v, expand(mask))};
    }
    friend Doubles keep(unsigned mask, Doubles a) { return {_mm256_and_pd(a.v, expand(mask))}; }
};

inline void finish_streams() { _mm_sfence(); }

inline void store_bools(uint64_t mask, uint8_t* to) {
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    for (int half = 0; half < 2; ++half) {
        const __m256i bits = _mm256_set1_epi32(static_cast<int>(mask >> (32 * half)));
        const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(bits, byte), bit);
        const __m256i ones = _mm256_min_epu8(set, _mm256_set1_epi8(1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * half), ones);
    }
}

}  // namespace
}  // namespace thinned
