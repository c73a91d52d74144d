/* Runs before the page is drawn, so that it does not flash in the other theme. */
(() => {
  const themes = ["system", "light", "dark"];
  const root = document.documentElement;

  function apply(theme) {
    root.dataset.theme = theme;
    for (const button of document.querySelectorAll("[data-theme-button]")) {
      button.querySelector("use").setAttribute("href", `#icon-theme-${theme}`);
      button.title = `Theme: ${theme}`;
      button.setAttribute("aria-label", `Theme: ${theme}. Change it.`);
    }
  }

  let theme = localStorage.getItem("theme");
  if (!themes.includes(theme)) theme = "system";
  apply(theme);
  addEventListener("DOMContentLoaded", () => {
    apply(theme);
    for (const button of document.querySelectorAll("[data-theme-button]")) {
      button.addEventListener("click", () => {
        theme = themes[(themes.indexOf(theme) + 1) % themes.length];
        localStorage.setItem("theme", theme);
        apply(theme);
      });
    }
  });
})();
