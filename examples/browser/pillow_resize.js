// Pillow's resize, to the bit, for images on their way into a model that was trained on what Pillow made. transformers.js
// leaves resizing to the browser's canvas, or to sharp in Node, which blur less when they shrink: other pixels, other words.
// The algorithm is Pillow's (src/libImaging/Resample.c): two passes of weights in fixed point, rounded to bytes between them.

const BITS = 22;
const cubic = (x, a = -0.5) => {
    x = Math.abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
};
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
// By Pillow's numbers, as `resample` in preprocessor_config.json has them.
const FILTERS = {
    1: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) }, // lanczos
    2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear
    3: { support: 2, weight: cubic }, // bicubic
};

/** For each of `after` positions, where its weights begin, and the weights, of `before` positions. */
function weights(before, after, { support, weight }) {
    const scale = before / after;
    const wide = Math.max(scale, 1);
    const reach = support * wide;
    return Array.from({ length: after }, (_, position) => {
        const centre = (position + 0.5) * scale;
        const start = Math.max(0, Math.trunc(centre - reach + 0.5));
        const stop = Math.min(before, Math.trunc(centre + reach + 0.5));
        const found = [];
        for (let x = start; x < stop; ++x) found.push(weight((x - centre + 0.5) * (1 / wide)));
        const sum = found.reduce((a, b) => a + b, 0);
        const whole = found.map((one) => {
            const fixed = (sum === 0 ? one : one / sum) * (1 << BITS);
            return Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
        });
        return { start, whole };
    });
}

/** One pass over lines of pixels: `step` from one pixel of a line to the next, `across` from one line to the next. */
function pass(data, target, lines, after, steps, targetSteps, channels, filter, before) {
    const places = weights(before, after, filter);
    for (let line = 0; line < lines; ++line) {
        for (let position = 0; position < after; ++position) {
            const { start, whole } = places[position];
            for (let channel = 0; channel < channels; ++channel) {
                let sum = 1 << (BITS - 1);
                let from = line * steps.across + start * steps.step + channel;
                for (let k = 0; k < whole.length; ++k, from += steps.step) sum += data[from] * whole[k];
                target[line * targetSteps.across + position * targetSteps.step + channel] = Math.floor(sum / (1 << BITS));
            }
        }
    }
    return target;
}

/** Pixels, `(height, width, channels)` of bytes in a row, at another size. `resample` is Pillow's number of a filter. */
export function resize(data, width, height, newWidth, newHeight, channels = 3, resample = 3) {
    const filter = FILTERS[resample];
    if (!filter) throw new Error(`resample=${resample}: choose 1 (lanczos), 2 (bilinear) or 3 (bicubic).`);
    if (newWidth !== width) {
        const target = new Uint8ClampedArray(newWidth * height * channels);
        const steps = { across: width * channels, step: channels };
        data = pass(data, target, height, newWidth, steps, { across: newWidth * channels, step: channels }, channels, filter, width);
    }
    if (newHeight !== height) {
        const target = new Uint8ClampedArray(newWidth * newHeight * channels);
        const steps = { across: channels, step: newWidth * channels };
        data = pass(data, target, newWidth, newHeight, steps, steps, channels, filter, height);
    }
    return data;
}

/** An RGB `RawImage` at the size that this image processor asks for, which it then leaves as it is. */
export function resizedFor(imageProcessor, image) {
    const { size, resample, do_resize } = imageProcessor;
    if (!do_resize) return image;
    let [width, height] = [size.width, size.height];
    if (size.shortest_edge !== undefined) {
        const short = Math.min(image.width, image.height);
        [width, height] = [image.width, image.height].map((side) => Math.trunc((size.shortest_edge * side) / short));
    }
    const data = resize(image.data, image.width, image.height, width, height, image.channels, resample);
    return new image.constructor(data, width, height, image.channels);
}
