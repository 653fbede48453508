// Gaussian theory in closed form: pairs x1 = x0 + shift turned by phi in every plane, x0 ~ N(0, I), x_t with constant
// noise sigma. A plane is a complex number: B(t) = 1 + t (e^(i phi) - 1), w = |B|^2 = c^2 + 4 s^2 (t - 1/2)^2,
// c = cos(phi / 2), s = sin(phi / 2), q = |e^(i phi) - 1|^2 = 4 s^2. Derivations: docs/theory.md, sections 4 and 5.
"use strict";
window.fvjaxPanel = (() => {
    // cos(phi / 2) as the sine of the distance to 180 degrees: exactly 0 there.
    function half(degrees) {
        return { c: Math.sin(((180 - Math.abs(degrees)) * Math.PI) / 360), s: Math.sin((degrees * Math.PI) / 360) };
    }

    // The rotation that the flow of the population minimiser applies, in degrees; NaN where the flow meets a pole.
    function selectedAngle(degrees, sigma) {
        const { c, s } = half(degrees);
        const g = Math.hypot(c, sigma);
        return ((2 * c) / g) * Math.atan2(s, g) * (180 / Math.PI);
    }

    // Integrals of w^-2 and w^-3 over [0, 1]. With tau = 2 s (t - 1/2) they are those of (c^2 + tau^2)^-k over [0, s],
    // divided by s, which follow from the arctangent by J_(k+1) = (s + (2 k - 1) J_k) / (2 k c^2), since c^2 + s^2 = 1.
    function inversePowers(degrees) {
        const { c, s } = half(Math.abs(degrees));
        if (s === 0) return [1, 1];
        const first = (Math.abs(degrees) * Math.PI) / 360 / c;
        const second = (s + first) / (2 * c * c);
        return [second / s, (s + 3 * second) / (4 * c * c) / s];
    }

    // The gradient is 2 a and 2 a b^T. In one plane, with complex factors of x0 and z and Theta = e^(i phi) - 1 =: p,
    //   OT field:           a = -p x0,               b = B x0 + sigma z;
    //   pair-optimal field: a = (p sigma / w) z,     b = x0 + (sigma / B) z.
    // So tr S_aa = d s_a, tr S_bb = d s_b, |S_ab|^2 = d |s_ab|^2 and, by Isserlis, the variance is
    //   4 d { integral of [s_a + d s_a s_b + 2 |s_ab|^2] - |integral of s_ab|^2 },
    //   OT field:           s_a = q,               s_b = w + sigma^2,      |s_ab|^2 = q w,
    //                       |integral of s_ab|^2 = q c^2;
    //   pair-optimal field: s_a = q sigma^2 / w^2, s_b = 1 + sigma^2 / w,  |s_ab|^2 = q sigma^4 / w^3,
    //                       |integral of s_ab|^2 = q sigma^4 c^2 (integral of w^-2)^2, that of B being c e^(i phi / 2).
    // Both are 4 q d times a factor: so their ratio has a limit at 0 degrees, too. Nothing cancels, by Cauchy-Schwarz.
    function factorOt(degrees, sigma, dimension) {
        const { c } = half(degrees);
        const mean = (1 + 2 * c * c) / 3; // of w over t: 1 - q / 6
        return 1 + dimension * (mean + sigma * sigma) + 2 * mean - c * c;
    }

    function factorPairOptimal(degrees, sigma, dimension) {
        if (sigma === 0) return 0;
        const { c } = half(degrees);
        if (c === 0) return Infinity;
        const [second, third] = inversePowers(degrees);
        const noise = sigma * sigma;
        return noise * ((1 + dimension) * second + noise * ((dimension + 2) * third - c * c * second * second));
    }

    function scale(degrees, dimension) {
        return 16 * dimension * half(degrees).s ** 2;
    }

    // Total variance of the gradient of ONE draw in all d^2 + d parameters of the affine field.
    function varianceOt(degrees, sigma, dimension) {
        return scale(degrees, dimension) * factorOt(degrees, sigma, dimension);
    }

    function variancePairOptimal(degrees, sigma, dimension) {
        return degrees === 0 ? 0 : scale(degrees, dimension) * factorPairOptimal(degrees, sigma, dimension);
    }

    // Var(OT) / Var(pair-optimal); NaN at 0 degrees, where both fields are the same and both variances 0.
    function varianceRatio(degrees, sigma, dimension) {
        return degrees === 0 ? NaN : factorOt(degrees, sigma, dimension) / factorPairOptimal(degrees, sigma, dimension);
    }

    // The sigma above which the OT field has the lower variance: a + d n = e n + f n^2 in n = sigma^2.
    function equalSigma(degrees, dimension) {
        const { c } = half(degrees);
        if (c === 0) return 0;
        const [second, third] = inversePowers(degrees);
        const e = (1 + dimension) * second - dimension;
        const f = (dimension + 2) * third - c * c * second * second;
        const a = factorOt(degrees, 0, dimension);
        return Math.sqrt((2 * a) / (e + Math.sqrt(e * e + 4 * a * f)));
    }

    // Variance of the gradient of one draw given its time.
    function profile(degrees, sigma, dimension, t) {
        const { c, s } = half(degrees);
        const w = c * c + 4 * s * s * (t - 0.5) ** 2;
        const noise = sigma * sigma;
        return {
            ot: scale(degrees, dimension) * (1 + dimension * (w + noise) + w),
            pairOptimal: sigma === 0 ? 0 : (scale(degrees, dimension) * (dimension + 1) * noise * (w + noise)) / w ** 3,
        };
    }

    // Where the flow carries the complex number x = [real, imaginary] until t: log(x_t / x_0) is the integral of
    // (e^(i phi) - 1) conj(B) / (w + sigma^2), the real part of which is w' / (2 (w + sigma^2)), the imaginary part
    // sin(phi) / (w + sigma^2). NaN from the pole on (180 degrees, sigma = 0, t >= 1/2).
    function flow(degrees, sigma, t, [real, imaginary]) {
        const { c, s } = half(degrees);
        const w = c * c + 4 * s * s * (t - 0.5) ** 2;
        const g = Math.hypot(c, sigma);
        if (g === 0 && t >= 0.5) return [NaN, NaN];
        const size = Math.sqrt((w + sigma * sigma) / (1 + sigma * sigma));
        const turn = g === 0 ? 0 : (c / g) * (Math.atan2(s * (2 * t - 1), g) + Math.atan2(s, g));
        const [x, y] = [size * Math.cos(turn), size * Math.sin(turn)];
        return [x * real - y * imaginary, x * imaginary + y * real];
    }

    return { selectedAngle, varianceOt, variancePairOptimal, varianceRatio, equalSigma, profile, flow };
})();
