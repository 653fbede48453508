// The panel's state and controls.
"use strict";
(() => {
    const theory = window.fvjaxPanel;
    const plots = window.fvjaxPlots;
    const find = (id) => document.getElementById(id);
    const state = { degrees: 150, sigma: 0.3, dimension: 2 };
    const scales = {};

    // The slider's position p: 0 is sigma = 0, then 100 steps a decade from 0.01 to 10.
    const sigmaAt = (position) => (position < 1 ? 0 : Number((10 ** ((position - 1) / 100 - 2)).toPrecision(3)));
    const sliderAt = (sigma) => (sigma < 0.01 ? (sigma > 0 ? 1 : 0) : Math.round(100 * (Math.log10(sigma) + 2)) + 1);

    function number(value) {
        if (Number.isNaN(value)) return "undefined";
        if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
        const size = Math.abs(value);
        return size !== 0 && (size < 1e-3 || size >= 1e6)
            ? value.toExponential(3)
            : String(Number(value.toPrecision(5)));
    }

    function put(id, value, unit = "") {
        find(id).textContent = number(value) + (Number.isFinite(value) ? unit : "");
        find(id).dataset.value = String(value);
    }

    function reasons({ degrees, sigma }) {
        if (degrees === 180 && sigma === 0)
            return (
                "All lines of the pairs meet in one point at t = 1/2, so without noise the flow has no answer; the " +
                "pair-optimal field still has no variance on its own lines."
            );
        if (degrees === 180)
            return (
                "At 180° the pair-optimal field has a pole at t = 1/2. Noise takes draws off the lines that pass " +
                "through it, and the variance is infinite (∞) for every σ > 0. The population minimiser's flow is " +
                "the OT map."
            );
        if (degrees === 0)
            return "The pairs are those of the OT map: both fields are the same, without variance; the ratio is 0 / 0.";
        if (sigma === 0)
            return (
                "Without noise the pair-optimal field meets every target exactly: its variance is 0, the ratio " +
                "infinite (∞), and the flow returns the pairs."
            );
        const kept = theory.selectedAngle(degrees, sigma) / degrees;
        return `The flow keeps ${(100 * kept).toFixed(kept < 0.1 ? 1 : 0)} % of the rotation of its pairs.`;
    }

    function showNumbers() {
        const { degrees, sigma, dimension } = state;
        put("selected-angle", theory.selectedAngle(degrees, sigma), "°");
        put("variance-ot", theory.varianceOt(degrees, sigma, dimension));
        put("variance-pair-optimal", theory.variancePairOptimal(degrees, sigma, dimension));
        put("variance-ratio", theory.varianceRatio(degrees, sigma, dimension));
        put("equal-sigma", theory.equalSigma(degrees, dimension));
        const summary = reasons(state);
        if (find("panel-summary").textContent !== summary) find("panel-summary").textContent = summary;
        const vanishes = sigma === 0 || degrees === 0;
        find("profile-note").textContent = vanishes ? "A variance of 0 has no place on the logarithmic axis." : "";
    }

    function showControls(source) {
        const set = (id, value) => {
            if (find(id) !== source) find(id).value = value;
        };
        set("angle", state.degrees);
        set("angle-number", Number(state.degrees.toPrecision(12)));
        set("sigma", sliderAt(state.sigma));
        set("sigma-number", Number(state.sigma.toPrecision(12)));
        set("dimension", state.dimension);
        find("angle").setAttribute("aria-valuetext", `${number(state.degrees)} degrees`);
        find("sigma").setAttribute("aria-valuetext", `sigma ${number(state.sigma)}`);
    }

    function draw() {
        plots.drawFlow(find("flow-plot"), state);
        plots.drawProfile(find("profile-plot"), state);
        for (const name of ["angle", "ratio"]) scales[name] = plots.drawPhase(find(`${name}-plot`), name, state);
    }

    let waiting = 0;
    function drawSoon() {
        cancelAnimationFrame(waiting);
        waiting = requestAnimationFrame(draw);
    }

    // Takes new settings from a control (which keeps what was typed into it), from a diagram, or from outside.
    function set(changes, source = null) {
        Object.assign(state, changes);
        showNumbers();
        showControls(source);
        drawSoon();
    }

    function onNumber(id, key) {
        find(id).addEventListener("input", ({ target }) => {
            const value = target.value.trim() === "" ? NaN : Number(target.value);
            const good = value >= Number(target.min) && value <= Number(target.max);
            target.setAttribute("aria-invalid", String(!good));
            if (good) set({ [key]: value }, target);
        });
        find(id).addEventListener("change", ({ target }) => {
            target.setAttribute("aria-invalid", "false");
            showControls(null);
        });
    }

    // A step of the arrow keys: one degree, or one position of sigma's slider; ten of them with Shift.
    const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

    function onDiagram(name) {
        const box = find(`${name}-plot`);
        const move = (event) => {
            const bounds = box.getBoundingClientRect();
            const degrees = scales[name].degrees(event.clientX - bounds.left);
            set({
                degrees: Math.round(degrees),
                sigma: Number(scales[name].sigma(event.clientY - bounds.top).toPrecision(3)),
            });
        };
        box.addEventListener("click", move); // not pointerdown: a finger that scrolls past must change nothing
        box.addEventListener(
            "pointermove",
            (event) => event.buttons === 1 && event.pointerType === "mouse" && move(event),
        );
        box.addEventListener("keydown", (event) => {
            const step = STEPS[event.key];
            if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
            event.preventDefault();
            const size = event.shiftKey ? 10 : 1;
            const degrees = Math.min(Math.max(state.degrees + size * step[0], 0), 180);
            const position = Math.min(Math.max(sliderAt(state.sigma) + size * step[1], 0), 301);
            set(step[1] ? { sigma: sigmaAt(position) } : { degrees });
        });
    }

    find("angle").addEventListener("input", ({ target }) => set({ degrees: Number(target.value) }, target));
    find("sigma").addEventListener("input", ({ target }) => set({ sigma: sigmaAt(Number(target.value)) }, target));
    find("dimension").addEventListener("change", ({ target }) => set({ dimension: Number(target.value) }, target));
    onNumber("angle-number", "degrees");
    onNumber("sigma-number", "sigma");
    onDiagram("angle");
    onDiagram("ratio");

    document.querySelector(".panel-body").hidden = false;
    set({});
    new ResizeObserver(drawSoon).observe(document.querySelector(".plots"));
    Object.assign(theory, { state: () => ({ ...state }), set });
})();
