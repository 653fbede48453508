// Drawing of the panel: axes and curves as SVG, which takes its colours from the style sheet; the two phase diagrams
// have a canvas behind it. All lengths are CSS pixels.
"use strict";
window.fvjaxPlots = (() => {
    const theory = window.fvjaxPanel;
    const SIGMA_DECADES = [-2, 1]; // of the logarithmic axis; below it a band for sigma = 0
    const ZERO_BAND = 18;
    const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"];
    const RED_BLUE = [
        "67001f",
        "b2182b",
        "d6604d",
        "f4a582",
        "fddbc7",
        "f7f7f7",
        "d1e5f0",
        "92c5de",
        "4393c3",
        "2166ac",
        "053061",
    ];

    function element(parent, tag, attributes = {}, content = "") {
        const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        if (content) made.textContent = content;
        parent.append(made);
        return made;
    }

    // An empty drawing as wide as its box, and the rectangle that its axes span.
    function stage(box, label, { height, left = 52, right = 12 }) {
        box.querySelector("svg")?.remove();
        const width = Math.max(box.clientWidth, 240);
        const svg = element(box, "svg", {
            viewBox: `0 0 ${width} ${height}`,
            width,
            height,
            role: "img",
            "aria-label": label,
        });
        return { svg, left, top: 8, width: width - left - right, height: height - 8 - 40 };
    }

    function xAxis({ svg, left, top, width, height }, ticks, place, title) {
        for (const tick of ticks) {
            element(svg, "line", {
                class: "grid",
                x1: place(tick),
                x2: place(tick),
                y1: top + height,
                y2: top + height + 5,
            });
            element(svg, "text", { x: place(tick), y: top + height + 18, "text-anchor": "middle" }, String(tick));
        }
        element(svg, "text", { x: left + width / 2, y: top + height + 35, "text-anchor": "middle" }, title);
    }

    function yAxis({ svg, left, top, height }, ticks, title) {
        for (const [label, y] of ticks) {
            element(svg, "line", { class: "grid", x1: left - 5, x2: left, y1: y, y2: y });
            element(svg, "text", { x: left - 8, y: y + 4, "text-anchor": "end" }, label);
        }
        const turned = `rotate(-90 12 ${top + height / 2})`;
        element(svg, "text", { x: 12, y: top + height / 2, "text-anchor": "middle", transform: turned }, title);
    }

    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

    function frame({ svg, left, top, width, height }) {
        element(svg, "rect", { class: "frame", x: left, y: top, width, height });
    }

    // A spiral of golden angles: however it is turned, no source comes to lie on another's target.
    const SOURCES = Array.from({ length: 7 }, (_, i) =>
        [Math.cos(2.4 * i), Math.sin(2.4 * i)].map((x) => x * (0.45 + 0.1 * i)),
    );
    const SHIFT = 3.2;

    function drawFlow(box, { degrees, sigma }) {
        const angle = theory.selectedAngle(degrees, sigma);
        const result = Number.isNaN(angle) ? "meet at a pole at t = 1/2" : `are turned by ${angle.toFixed(1)} degrees`;
        const width = Math.max(box.clientWidth, 240);
        const unit = (width - 24) / (SHIFT + 2.4);
        const { svg } = stage(box, `Seven sources ${result}`, { height: 2.5 * unit + 16 });
        const at = ([x, y], t) => [12 + (1.2 + x + SHIFT * t) * unit, 8 + (1.25 - y) * unit];
        const turn = (degrees * Math.PI) / 180;
        SOURCES.forEach((source, i) => {
            const color = `light-dark(hsl(${i * 51} 75% 33%), hsl(${i * 51} 75% 68%))`;
            const points = [];
            for (let k = 0; k <= 100; k++) {
                const place = theory.flow(degrees, sigma, k / 100, source);
                if (!Number.isNaN(place[0])) points.push(at(place, k / 100));
            }
            const ends = Number.isNaN(angle) ? null : points.at(-1);
            const [sx, sy] = at(source, 0);
            const [ox, oy] = at(source, 1);
            const [cosine, sine] = [Math.cos(turn), Math.sin(turn)];
            const [px, py] = at([cosine * source[0] - sine * source[1], sine * source[0] + cosine * source[1]], 1);
            const group = element(svg, "g", { style: `stroke: ${color}; fill: none; stroke-width: 1.8` });
            element(group, "path", { d: path(points) });
            element(group, "circle", { cx: sx, cy: sy, r: 4 });
            if (ends) element(group, "circle", { cx: ends[0], cy: ends[1], r: 4, style: `fill: ${color}` });
            element(group, "path", { d: `M${px - 6} ${py - 6}l12 12m0 -12l-12 12` });
            element(group, "path", { d: `M${ox - 8} ${oy}h16m-8 -8v16`, "stroke-width": 1, "stroke-opacity": 0.7 });
        });
    }

    function drawProfile(box, { degrees, sigma, dimension }) {
        const times = Array.from({ length: 401 }, (_, k) => k / 400);
        const values = times.map((t) => theory.profile(degrees, sigma, dimension, t));
        const drawn = values.flatMap(({ ot, pairOptimal }) => [ot, pairOptimal]).filter((v) => v > 0 && v < 1e12);
        const low = drawn.length ? Math.floor(Math.log10(Math.min(...drawn))) : -1;
        const high = drawn.length ? Math.max(Math.ceil(Math.log10(Math.max(...drawn))), low + 1) : 1;
        const label = "Variance of the gradient against time, for the OT field and the pair-optimal field";
        const area = stage(box, label, { height: 290 });
        const x = (t) => area.left + area.width * t;
        const y = (v) => area.top + (area.height * (high - Math.log10(v))) / (high - low);
        const step = Math.ceil((high - low) / 5);
        const ticks = [];
        for (let power = low; power <= high; power += step)
            ticks.push([power >= 0 && power < 4 ? String(10 ** power) : `1e${power}`, y(10 ** power)]);
        xAxis(area, [0, 0.25, 0.5, 0.75, 1], x, "time t");
        yAxis(area, ticks, "variance");
        for (const [, at] of ticks)
            element(area.svg, "line", { class: "grid", x1: area.left, x2: area.left + area.width, y1: at, y2: at });
        frame(area);
        for (const [key, name] of [
            ["ot", "ot"],
            ["pairOptimal", "pair-optimal"],
        ]) {
            const points = times.map((t, k) => [t, values[k][key]]).filter(([, v]) => v > 0 && v < 1e12);
            element(area.svg, "path", { class: `curve ${name}`, d: path(points.map(([t, v]) => [x(t), y(v)])) });
        }
    }

    function color(stops, share) {
        const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
        const k = Math.min(Math.floor(place), stops.length - 2);
        const channel = (stop, i) => parseInt(stop.slice(2 * i, 2 * i + 2), 16);
        return [0, 1, 2].map(
            (i) => channel(stops[k], i) + (place - k) * (channel(stops[k + 1], i) - channel(stops[k], i)),
        );
    }

    // Where (degrees, sigma) lies in a phase diagram, and back.
    function phaseScale(area) {
        const [low, high] = SIGMA_DECADES;
        const rows = area.height - ZERO_BAND;
        return {
            x: (degrees) => area.left + (area.width * degrees) / 180,
            y: (sigma) =>
                area.top +
                (sigma < 10 ** low ? rows + ZERO_BAND / 2 : (rows * (high - Math.log10(sigma))) / (high - low)),
            degrees: (x) => Math.min(Math.max((180 * (x - area.left)) / area.width, 0), 180),
            sigma: (y) =>
                y - area.top > rows ? 0 : Math.min(10 ** (high - ((high - low) * (y - area.top)) / rows), 10 ** high),
            floor: area.top + rows,
        };
    }

    const DIAGRAMS = {
        angle: {
            stops: VIRIDIS,
            ticks: [0, 45, 90, 135, 180],
            range: [0, 180],
            title: "selected angle, degrees",
            value: (degrees, sigma) => theory.selectedAngle(degrees, sigma),
            guide: (degrees) => Math.cos((degrees * Math.PI) / 360),
        },
        ratio: {
            stops: RED_BLUE,
            ticks: [-4, -2, 0, 2, 4],
            range: [-4, 4],
            title: "log10 of the ratio OT / pair-optimal",
            // Next to 0 degrees for its limit there: at 0 it is 0 / 0.
            value: (degrees, sigma, dimension) => Math.log10(theory.varianceRatio(degrees || 1e-6, sigma, dimension)),
            guide: (degrees, dimension) => theory.equalSigma(degrees, dimension),
        },
    };

    // One image of the values in device pixels, drawn only where size or dimension have changed.
    function paint(canvas, area, { stops, range, value }, dimension) {
        const ratio = window.devicePixelRatio || 1;
        const [columns, rows] = [Math.round(area.width * ratio), Math.round(area.height * ratio)];
        const key = `${columns} ${rows} ${dimension}`;
        if (canvas.dataset.key === key) return;
        canvas.dataset.key = key;
        [canvas.width, canvas.height] = [columns, rows];
        Object.assign(canvas.style, {
            left: `${area.left}px`,
            top: `${area.top}px`,
            width: `${area.width}px`,
            height: `${area.height}px`,
        });
        const table = Array.from({ length: 256 }, (_, i) => {
            const [red, green, blue] = color(stops, i / 255).map(Math.round);
            return (255 << 24) | (blue << 16) | (green << 8) | red;
        });
        const scale = phaseScale(area);
        const context = canvas.getContext("2d");
        const image = context.createImageData(columns, rows);
        const pixels = new Uint32Array(image.data.buffer);
        for (let row = 0; row < rows; row++) {
            const sigma = scale.sigma(area.top + (row + 0.5) / ratio);
            for (let column = 0; column < columns; column++) {
                const found = value((180 * (column + 0.5)) / columns, sigma, dimension);
                const share = Math.min(Math.max((found - range[0]) / (range[1] - range[0]), 0), 1);
                pixels[row * columns + column] = table[Math.round(255 * share)];
            }
        }
        context.putImageData(image, 0, 0);
    }

    function drawColorbar({ svg, left, top, width }, { stops, ticks, range, title }, id) {
        const y = top - 34;
        const gradient = element(svg, "linearGradient", { id });
        stops.forEach((stop, i) =>
            element(gradient, "stop", { offset: i / (stops.length - 1), "stop-color": `#${stop}` }),
        );
        element(svg, "text", { x: left + width / 2, y: y - 8, "text-anchor": "middle" }, title);
        element(svg, "rect", { x: left, y, width, height: 10, fill: `url(#${id})` });
        for (const tick of ticks) {
            const x = left + (width * (tick - range[0])) / (range[1] - range[0]);
            element(svg, "text", { x, y: y + 23, "text-anchor": "middle" }, String(tick));
        }
    }

    function drawPhase(box, name, { degrees, sigma, dimension }) {
        const diagram = DIAGRAMS[name];
        const area = stage(box, `Phase diagram over the angle and sigma: ${diagram.title}`, { height: 350, right: 14 });
        area.top += 50;
        area.height -= 50;
        const scale = phaseScale(area);
        let canvas = box.querySelector("canvas");
        if (!canvas) {
            canvas = document.createElement("canvas");
            canvas.setAttribute("aria-hidden", "true");
            box.prepend(canvas);
        }
        paint(canvas, area, diagram, dimension);
        drawColorbar(area, diagram, `${name}-scale`);
        xAxis(area, [0, 45, 90, 135, 180], scale.x, "angle of the pairs, degrees");
        yAxis(
            area,
            [
                ["10", scale.y(10)],
                ["1", scale.y(1)],
                ["0.1", scale.y(0.1)],
                ["0.01", scale.floor - 3],
                ["0", scale.y(0) + 1],
            ],
            "noise σ",
        );
        const line = [];
        for (let angle = 0; angle <= 180; angle += 0.5) {
            const at = diagram.guide(angle, dimension);
            if (at >= 10 ** SIGMA_DECADES[0]) line.push([scale.x(angle), scale.y(at)]);
        }
        element(area.svg, "path", { class: "halo", d: path(line) });
        element(area.svg, "path", { class: name === "angle" ? "guide dashed" : "guide", d: path(line) });
        element(area.svg, "path", { class: "frame", d: `M${area.left} ${scale.floor}h${area.width}` });
        frame(area);
        for (const style of ["point-back", "point"])
            element(area.svg, "circle", { class: style, cx: scale.x(degrees), cy: scale.y(sigma), r: 7 });
        return scale;
    }

    return { drawFlow, drawProfile, drawPhase };
})();
