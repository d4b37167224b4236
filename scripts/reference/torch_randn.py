"""torch.randn for float32 on the CPU generator, in numpy, bit for bit: the description that the Rust code follows.

There are two x86 forms, which differ in the last bits: torch's AVX2 kernel (Cephes polynomials with fused
multiply-adds), and the one of every other dispatch (libm). This is the AVX2 form; ATEN_CPU_CAPABILITY=avx2 makes torch
use it on any newer CPU.
"""
import math

import numpy as np

F = np.float32
U = np.uint32


class MersenneTwister:
    """mt19937 seeded by `init_genrand(seed & 0xffffffff)`: the high half of a torch seed is ignored."""

    def __init__(self, seed):
        state = [seed & 0xFFFFFFFF]
        for j in range(1, 624):
            state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + j) & 0xFFFFFFFF)
        self.state, self.used = np.array(state, U), 624

    def _twist(self):
        s = self.state

        def twisted(a, b):
            y = (a & U(0x80000000)) | (b & U(0x7FFFFFFF))
            return (y >> U(1)) ^ np.where(b & U(1), U(0x9908B0DF), U(0))

        # three runs and the wrap-around: each reads what the one before has written
        s[0:227] = s[397:624] ^ twisted(s[0:227], s[1:228])
        s[227:454] = s[0:227] ^ twisted(s[227:454], s[228:455])
        s[454:623] = s[227:396] ^ twisted(s[454:623], s[455:624])
        s[623:624] = s[396:397] ^ twisted(s[623:624], s[0:1])
        self.used = 0

    def integers(self, count):
        out = np.empty(count, U)
        done = 0
        while done < count:
            if self.used == 624:
                self._twist()
            n = min(624 - self.used, count - done)
            y = self.state[self.used : self.used + n].copy()
            y ^= y >> U(11)
            y ^= (y << U(7)) & U(0x9D2C5680)
            y ^= (y << U(15)) & U(0xEFC60000)
            out[done : done + n] = y ^ (y >> U(18))
            done += n
            self.used += n
        return out

    def uniforms(self, count):
        """The 24 low bits, in [0, 1)."""
        return (self.integers(count) & U(0xFFFFFF)).astype(F) * F(2.0**-24)


def fma(a, b, c):
    """f32 a*b+c with one rounding: the product is exact in f64, and the f64 sum is rounded to odd before the rounding to f32."""
    a, b, c = np.broadcast_arrays(*(np.asarray(v, F).astype(np.float64) for v in (a, b, c)))
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64).copy()
    inexact = (error != 0) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    bits[inexact & away] += 1
    bits[inexact & ~away] -= 1
    return bits.view(np.float64).astype(F)


def polynomial(x, coefficients):
    y = np.full_like(x, F(coefficients[0]))
    for c in coefficients[1:]:
        y = fma(y, x, F(c))
    return y


def log(x):
    x = np.maximum(x, np.array(0x00800000, U).view(F))
    bits = x.view(U)
    exponent = ((bits >> U(23)).astype(np.int32) - 126).astype(F)
    x = ((bits & U(0x807FFFFF)) | U(0x3F000000)).view(F)  # in [0.5, 1)
    low = x < F(0.707106781186547524)
    exponent = exponent - np.where(low, F(1), F(0))
    x = (x - F(1)) + np.where(low, x, F(0))
    square = x * x
    y = polynomial(x, [
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    ])  # fmt: skip
    y = fma(y * x, square, exponent * F(-2.12194440e-4))
    y = fma(-square, F(0.5), y)
    return fma(exponent, F(0.693359375), x + y)


def sin_cos(x):
    """For x >= 0."""
    octant = ((x * F(1.27323954473516)).astype(np.int32) + 1) & ~1
    y = octant.astype(F)
    for part in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8):  # pi/4 in three parts
        x = fma(y, F(part), x)
    z = x * x
    cos = polynomial(z, [2.443315711809948e-005, -1.388731625493765e-003, 4.166664568298827e-002])
    cos = fma(cos * z, z, -(z * F(0.5))) + F(1)
    sin = polynomial(z, [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1])
    sin = fma(sin * z, x, x)
    swap = (octant & 2) != 0
    sin, cos = np.where(swap, cos, sin), np.where(swap, sin, cos)
    return np.where(octant & 4, -sin, sin), np.where(~(octant - 2) & 4, -cos, cos)


def normals(uniforms):
    """Box-Muller on groups of 16 uniforms [k, 16] -> [k, 16]."""
    radius = np.sqrt(F(-2) * log(F(1) - uniforms[:, :8]))
    sin, cos = sin_cos(F(2 * math.pi) * uniforms[:, 8:])
    return np.concatenate([radius * cos, radius * sin], axis=1) + F(0)  # + 0: torch gives no negative zero


def randn(count, seed):
    """The values of torch.randn(count, generator=torch.Generator().manual_seed(seed)); count >= 16 (less is drawn another way)."""
    assert count >= 16
    twister = MersenneTwister(seed)
    uniforms = twister.uniforms(count)
    whole = count // 16 * 16
    out = np.empty(count, F)
    out[:whole] = normals(uniforms[:whole].reshape(-1, 16)).reshape(-1)
    if count % 16:  # 16 new draws, after all the others, overwrite the last 16 values
        out[-16:] = normals(twister.uniforms(16).reshape(1, 16))
    return out
