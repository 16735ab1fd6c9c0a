// What a core's multipliers can do at best: independent multiply-adds on registers alone.
//
//     g++ -O3 -march=native bench/cpu_peak.cpp -o cpu_peak && ./cpu_peak        (one thread; AVX2 or newer)

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

constexpr long ROUNDS = 20000000;
constexpr int SUMS = 12;

// Billions of operations a second of step(sum, operand), which does `each` of them; the best of five.
template <class T, class U, class Step>
void measure(const char* name, int each, T zero, U operand, Step step) {
    double best = 1e9;
    for (int run = 0; run < 5; run++) {
        T sums[SUMS];
        for (T& sum : sums) {
            sum = zero;
            asm volatile("" : "+v"(sum));  // or the compiler sees that all are the same, and computes one
        }
        const auto start = std::chrono::steady_clock::now();
        for (long i = 0; i < ROUNDS; i++) {
            for (T& sum : sums) sum = step(sum, operand);
            asm volatile("" : "+v"(operand));  // so that no round can be left out
        }
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        for (T& sum : sums) asm volatile("" : : "v"(sum));  // somebody wants them
    }
    printf("%-20s %6.0f\n", name, ROUNDS * SUMS * double(each) / best / 1e9);
}

int main() {
    puts("billions of operations a second, a core");
    const __m256 eight = _mm256_set1_ps(0.5f);
    measure("fp32, 8 numbers", 16, eight, eight, [](__m256 s, __m256 x) { return _mm256_fmadd_ps(s, x, x); });
#ifdef __AVX512F__
    const __m512 sixteen = _mm512_set1_ps(0.5f);
    measure("fp32, 16 numbers", 32, sixteen, sixteen, [](__m512 s, __m512 x) { return _mm512_fmadd_ps(s, x, x); });
#endif
#ifdef __AVX512BF16__
    const __m512i halves = _mm512_set1_epi16(0x3f00);
    measure("bf16, dot products", 64, sixteen, halves,
            [](__m512 s, __m512i x) { return _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)x); });
#endif
#ifdef __AVX512VNNI__
    const __m512i ones = _mm512_set1_epi8(1);
    measure("int8, dot products", 128, ones, ones, [](__m512i s, __m512i x) { return _mm512_dpbusd_epi32(s, x, x); });
#endif
}
