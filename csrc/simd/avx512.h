// AVX-512 F, DQ, BW and VL.
#pragma once

#include <immintrin.h>

#include "../elements.h"

namespace thinned {
namespace {

struct Words {
    static constexpr int lanes = 8;
    __m512i v;

    static Words load(const uint64_t* from) { return {_mm512_loadu_si512(from)}; }
    static Words all(uint64_t value) { return {_mm512_set1_epi64(static_cast<long long>(value))}; }
    static void store_pairs(uint64_t* to, Words a, Words b) {
        const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
        const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a.v, first, b.v));
        _mm512_storeu_si512(to + lanes, _mm512_permutex2var_epi64(a.v, second, b.v));
    }
    friend Words multiply_low(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
    friend Words high_half(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
    friend Words add(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
    friend Words xor2(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
    friend Words and2(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
    friend Words xor3(Words a, Words b, Words c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
    friend Words join_low(Words low, Words high) {
        return {_mm512_mask_shuffle_epi32(low.v, 0xAAAA, high.v, _MM_PERM_CCAA)};
    }
    // 0xB2 is c ? a | ~b : a & ~b, and 0x90 is a & ~(b ^ c).
    friend Words below_above(Words below, Words plane, Words bit) {
        return {_mm512_ternarylogic_epi64(below.v, plane.v, bit.v, 0xB2)};
    }
    friend Words equal_above(Words equal, Words plane, Words bit) {
        return {_mm512_ternarylogic_epi64(equal.v, plane.v, bit.v, 0x90)};
    }
    // Lanes in which either is not zero.
    friend unsigned nonzero(Words a, Words b) {
        const __m512i either = _mm512_or_si512(a.v, b.v);
        return _mm512_test_epi64_mask(either, either);
    }
    static void compress(uint64_t* to, unsigned chosen, Words words) {
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(static_cast<__mmask8>(chosen), words.v));
    }
};

struct Floats {
    static constexpr int lanes = 16;
    using Scalar = float;
    __m512 v;

    static Floats all(float value) { return {_mm512_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Floats load(const Half* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    static Floats load(const BFloat* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void stream(void* to) const { _mm512_stream_ps(static_cast<float*>(to), v); }
    void store(Half* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    void store(BFloat* to) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i all = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
    }
    friend Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    friend Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Floats divide(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
    friend Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
    friend Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
    friend Floats if_less(Floats a, Floats b, Floats then, Floats otherwise) {
        return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), then.v)};
    }
    friend Floats to_exponent(Floats a) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
    }
    friend Floats select(unsigned mask, Floats kept, Floats dropped) {
        return {_mm512_mask_mov_ps(dropped.v, static_cast<__mmask16>(mask), kept.v)};
    }
    friend Floats keep(unsigned mask, Floats a) {
        return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), a.v)};
    }
};

struct Doubles {
    static constexpr int lanes = 8;
    using Scalar = double;
    __m512d v;

    static Doubles all(double value) { return {_mm512_set1_pd(value)}; }
    static Doubles load(const double* from) { return {_mm512_loadu_pd(from)}; }
    void store(double* to) const { _mm512_storeu_pd(to, v); }
    friend Doubles multiply(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
    void stream(void* to) const { _mm512_stream_pd(static_cast<double*>(to), v); }
    friend Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.v, b.v)}; }
    friend Doubles subtract(Doubles a, Doubles b) { return {_mm512_sub_pd(a.v, b.v)}; }
    friend Doubles divide(Doubles a, Doubles b) { return {_mm512_div_pd(a.v, b.v)}; }
    friend Doubles larger(Doubles a, Doubles b) { return {_mm512_max_pd(a.v, b.v)}; }
    friend Doubles if_less(Doubles a, Doubles b, Doubles then, Doubles otherwise) {
        return {_mm512_mask_mov_pd(otherwise.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), then.v)};
    }
    friend Doubles select(unsigned mask, Doubles kept, Doubles dropped) {
        return {_mm512_mask_mov_pd(dropped.v, static_cast<__mmask8>(mask), kept.v)};
    }
    friend Doubles keep(unsigned mask, Doubles a) {
        return {_mm512_maskz_mov_pd(static_cast<__mmask8>(mask), a.v)};
    }
};

inline void finish_streams() { _mm_sfence(); }

inline void store_bools(uint64_t mask, uint8_t* to) { _mm512_storeu_si512(to, _mm512_maskz_set1_epi8(mask, 1)); }

}  // namespace
}  // namespace thinned
