// exp(x) for x <= 0, to a relative error of about 1e-7, and at least 1e-38; compilers can vectorise this form.

#include "processor.h"

typedef union {
  float number;
  unsigned bits;
} float_bits;

INLINE float exponential(float x) {
  const float least = x < -87 ? -87 : x;
  // x = n ln 2 + rest. Adding 1.5 * 2^23 rounds to a whole number n, which is then in the lowest bits.
  const float shift = 12582912, shifted = least * 1.44269504f + shift, n = shifted - shift;
  const float rest = (least - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; the first times n is exact
  // The minimax polynomial of the Cephes library, `expf`.
  float power = 1.9875691500e-4f;
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * (rest * rest) + rest + 1;
  float_bits result = {power}, exponent = {shifted};
  result.bits += exponent.bits << 23;  // times 2^n
  return result.number;
}
