"use strict";
(() => {
    const root = document.documentElement;
    const theme = document.getElementById("theme");
    const dark = matchMedia("(prefers-color-scheme: dark)");

    function showTheme() {
        const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
        theme.setAttribute("aria-pressed", String(isDark));
    }
    theme.addEventListener("click", () => {
        root.dataset.theme = theme.getAttribute("aria-pressed") === "true" ? "light" : "dark";
        showTheme();
    });
    dark.addEventListener("change", showTheme);
    theme.hidden = false;
    showTheme();

    for (const button of document.querySelectorAll(".copy")) {
        const source = button.parentElement.querySelector("pre");
        button.hidden = false;
        button.addEventListener("click", async () => {
            getSelection().selectAllChildren(source); // what is left to do where the clipboard is refused
            try {
                await navigator.clipboard.writeText(source.textContent);
                button.textContent = "Copied";
            } catch {
                button.textContent = "Selected";
            }
            setTimeout(() => (button.textContent = "Copy"), 2000);
        });
    }

    // What can be scrolled must be reachable by the keyboard; what cannot should not hold up the tab key.
    const watch = new ResizeObserver((entries) => {
        for (const { target } of entries) {
            if (target.scrollWidth > target.clientWidth + 1) target.tabIndex = 0;
            else target.removeAttribute("tabindex");
        }
    });
    for (const box of document.querySelectorAll(".scroll")) watch.observe(box);
})();
